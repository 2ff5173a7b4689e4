"""Options of AdaDFQ's game between a generator and a student: the user's choice in, settings out.

What was published depends on the size of the image; `resolve` fills in what the user left open.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dfqc.compiler.precision import Precision

Method = Literal["adadfq", "adasg"]
LARGE_IMAGE = 64  # pixels of the shorter side from which on an image is large

PUBLISHED_ITERATIONS = 400 * 200
# Of a shorter game, 1 % are too few for a generator to learn anything, and for ranges to follow it.
_LEAST_WARM_UP, _MOST_WARM_UP = 200, 0.25


class GameOptions(BaseModel):
    """How both sides play; None takes what was published for the method and the size of the image.

    `method`: AdaSG (Qian et al., AAAI 2023) is AdaDFQ with `alpha_ds` 0.1 and `lambda_l` 0.3.
    `iterations`: of both; the published 400 "epochs" are of 200 iterations each.
    `game_batch`: images per iteration; the adaptability is normalized over them.
    `alpha_ds`, `alpha_as`: weights of the cross-entropies of disagreement and agreement samples;
    `lambda_l`, `lambda_u`: bounds of the adaptability. `beta` weighs both cross-entropies, `gamma`
    the batch norms' loss. For ResNet-50 and at 4 and 5 bits the authors took other values (0.1 to
    0.3 for `alpha_ds`, 0.1 to 0.4 for `lambda_l`).
    `temperature`: of the student's loss.
    `lr_student`, `lr_generator`: of SGD with Nesterov's momentum, and of Adam. From a reconstructed
    start the student, too, learns by Adam: weights, in steps of their grids, at `lr_latent`; steps
    and biases, relative to what they begin with, at `lr_steps`.
    `warm_up`: share of the iterations in which only the generator learns; `observe`: in which the
    ranges of activations follow its images (without a reconstructed start). Those published are for
    80,000 iterations: of fewer, also of those that a short time leaves, both are 200 iterations at
    least, or a quarter of all.
    `milestones`: shares of the iterations after which both rates are multiplied by `decay`.
    `channels`: of the generator, behind its first layer.
    `clip_inside`: show both networks the pixels that an image can have, as the engine's input grid
    does to one of them anyway (published: no).
    `precision`: of convolutions and matrix products; statistics and losses are float32 always.
    `auto` is bfloat16 on an accelerator that has it, and float32 on a CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "adadfq"
    iterations: int = Field(2000, ge=1)
    game_batch: int = Field(16, ge=1)
    alpha_ds: float | None = Field(None, ge=0)
    alpha_as: float = Field(0.1, ge=0)
    lambda_l: float | None = Field(None, ge=0, le=1)
    lambda_u: float = Field(0.8, ge=0, le=1)
    beta: float = Field(1.0, ge=0)
    gamma: float = Field(1.0, ge=0)
    temperature: float | None = Field(None, gt=0)
    lr_student: float | None = Field(None, gt=0)
    lr_generator: float = Field(1e-3, gt=0)
    lr_latent: float = Field(1e-3, gt=0)
    lr_steps: float = Field(1e-3, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    warm_up: float | None = Field(None, ge=0, lt=1)
    observe: float | None = Field(None, ge=0, le=1)
    milestones: tuple[float, ...] | None = None
    decay: float = Field(0.1, gt=0, le=1)
    channels: int = Field(128, ge=2)
    clip_inside: bool = True
    precision: Precision = "auto"


@dataclass(frozen=True)
class Settings:
    """What depends on the method or on the size of the image; names are those of `GameOptions`."""

    alpha_ds: float
    lambda_l: float
    temperature: float
    lr_student: float
    warm_up: float
    observe: float
    milestones: tuple[float, ...]

    def factor(self, fraction: float, decay: float) -> float:
        """Return the factor of both rates after that share of the iterations."""
        return decay ** sum(fraction >= milestone for milestone in self.milestones)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return dataclasses.asdict(self) | {"milestones": list(self.milestones)}


# CIFAR's ResNet-20 and ImageNet's ResNet-18 and MobileNetV2; the released configurations.
SMALL = Settings(
    alpha_ds=0.2, lambda_l=0.1, temperature=20, lr_student=1e-4, warm_up=4 / 400,
    observe=4 / 400, milestones=(100 / 400, 200 / 400, 300 / 400),
)  # fmt: skip
LARGE = dataclasses.replace(
    SMALL, temperature=5, lr_student=1e-5, warm_up=50 / 400, milestones=(350 / 400,)
)


def in_beginning(share: float, given: float | None, *, fraction: float, done: int) -> bool:
    """Report whether `fraction` of a game, after `done` iterations, lies in its first `share`.

    A share that was not given lasts for as many iterations as it must, however short the game has
    become: `resolve` knows only how long it was planned.
    """
    if fraction < share:
        return True
    return given is None and done < _LEAST_WARM_UP and fraction < _MOST_WARM_UP


def resolve(options: GameOptions, size: tuple[int, int, int]) -> Settings:
    """Return what holds for images of `size`: the user's choice, else what was published."""
    published = LARGE if min(size[1:]) >= LARGE_IMAGE else SMALL
    if options.method == "adasg":
        published = dataclasses.replace(published, alpha_ds=0.1, lambda_l=0.3)
    least = min(_MOST_WARM_UP, _LEAST_WARM_UP / options.iterations)
    published = dataclasses.replace(
        published,
        warm_up=max(published.warm_up, least),
        observe=max(published.observe, least),
    )
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)}
    return dataclasses.replace(published, **{k: v for k, v in given.items() if v is not None})
