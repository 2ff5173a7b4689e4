"""What inversion can be told: options and an image size in, settings out, published or chosen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from dfqc.calib._pixels import ImageOptions

Schedule = Literal["cosine", "constant", "anneal"]

_LARGE = 64  # pixels of the shorter side from which on an image is large


class InversionOptions(ImageOptions):
    """How images are optimized; steps, norms and rates are in standardized pixels (see `_pixels`).

    None takes what was published for the size of the image; see `LARGE` and `SMALL`.
    `schedule`: of the rate within a phase. `cosine` rises linearly over `warm_up` iterations and
    falls to 0, `constant` stays, `anneal` stays for half of the phase and falls linearly to 0.
    `low_res`: share of the iterations that are done first, at half the resolution.
    `init`: noise to start from.
    `bn_loss`: `var` is as published, `relative` weighs layers alike; `bn_weight` goes with it.
    `first_bn`: what the first batch norm counts, relative to the others.
    `classify`, `tv`, `l2`: weights of cross-entropy, total variation and the images' L2 norm.
    `roll`: largest shift as a share of the side; `flip`: mirror half of the time.
    """

    iterations: int | None = Field(None, ge=1)
    lr: float | None = Field(None, gt=0)
    schedule: Schedule | None = None
    warm_up: int = Field(100, ge=0)
    low_res: float | None = Field(None, ge=0, lt=1)
    init: Literal["gaussian", "pink"] = "gaussian"
    classify: float = Field(1.0, ge=0)
    bn_loss: Literal["var", "relative"] = "var"
    bn_weight: float | None = Field(None, ge=0)
    first_bn: float | None = Field(None, ge=0)
    tv: float | None = Field(None, ge=0)
    l2: float | None = Field(None, ge=0)
    roll: float | None = Field(None, ge=0, le=0.5)
    flip: bool | None = None


@dataclass(frozen=True)
class Settings:
    """What depends on the size of the image; the names are those of `InversionOptions`."""

    iterations: int
    lr: float
    schedule: Schedule
    betas: tuple[float, float]
    low_res: float
    bn_weight: float
    first_bn: float
    tv: float
    l2: float
    roll: float
    flip: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return dataclasses.asdict(self) | {"betas": list(self.betas)}


# DeepInversion's for ImageNet (2,000 iterations at half the resolution, then 1,000 at full), and
# for CIFAR-10.
LARGE = Settings(
    iterations=3000, lr=0.25, schedule="cosine", betas=(0.5, 0.9), low_res=2 / 3,
    bn_weight=0.01, first_bn=10, tv=1e-4, l2=1e-5, roll=30 / 224, flip=True,
)  # fmt: skip
SMALL = Settings(
    iterations=2000, lr=0.05, schedule="constant", betas=(0.9, 0.999), low_res=0,
    bn_weight=10, first_bn=1, tv=2.5e-5, l2=0, roll=2 / 32, flip=False,
)  # fmt: skip


def resolve(options: InversionOptions, size: tuple[int, int, int]) -> Settings:
    """Return what holds for images of `size`: the user's choice, else what was published."""
    published = LARGE if min(size[1:]) >= _LARGE else SMALL
    given = {f.name: getattr(options, f.name, None) for f in dataclasses.fields(Settings)}
    return dataclasses.replace(published, **{k: v for k, v in given.items() if v is not None})


def count_passes(options: InversionOptions, size: tuple[int, int, int]) -> float:
    """Return the forward-and-backward passes per image and net; a quarter at half resolution."""
    settings = resolve(options, size)
    return settings.iterations * (1 - 0.75 * settings.low_res)
