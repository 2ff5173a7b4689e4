"""What a distillation can be told, and what each method and effort makes of it; loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dfqc.compiler.precision import Precision

METHODS = ("images", "dafl", "mix")
# Images of the fixed set by effort; a generator makes its own.
IMAGES: Mapping[str, int] = {"quick": 256, "standard": 1024, "max": 4096}


class DistillOptions(BaseModel):
    """How a student is trained; what `--distill-option NAME=VALUE` sets.

    `steps`, `batch_size`: of the training. `lr`, `momentum` (`nesterov`: Nesterov's),
    `weight_decay`: of SGD. `schedule`: `cosine` rises linearly over `warm_up` of the steps and
    falls to 0, `steps` divides by 10 after 40 % and 80 % of the steps. `temperature`: of the
    divergence, whose weight is `output`. `hint`: weight of the squared error of feature maps of
    equal shape, each relative to the teacher's variance; 0 leaves them out. `init`: take over
    blocks that the teacher has alike, or start at random. `crop`, `flip`, `mix`: how images are
    shown (see `views`). `precision`: of both networks, `auto` is bfloat16 on an accelerator that
    has it and float32 on a CPU. `points`: of the curve, and how often the state is stored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(2000, ge=1)
    batch_size: int = Field(128, ge=2)
    lr: float = Field(0.02, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Literal["cosine", "steps"] = "cosine"
    warm_up: float = Field(0.05, ge=0, lt=1)
    temperature: float = Field(4.0, gt=0)
    output: float = Field(1.0, ge=0)
    hint: float = Field(20.0, ge=0)
    init: Literal["teacher", "random"] = "teacher"
    crop: float = Field(0.125, ge=0, le=0.5)
    flip: bool = True
    mix: float = Field(0.5, ge=0, le=1)
    precision: Precision = "auto"
    points: int = Field(10, ge=1)


_PUBLISHED: Mapping[str, Any] = {
    "steps": 240_000,
    "batch_size": 1024,
    "lr": 0.1,
    "nesterov": False,
    "schedule": "steps",
    "warm_up": 0.0,
    "temperature": 1.0,
    "hint": 0.0,
    "init": "random",
    "points": 100,
}
# What the generator is told, before what the user says. DAFL shows images as they are made.
SOURCE: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("dafl", "max"): {"clip": False},
    ("mix", "quick"): {"mix": 0.5},
    ("mix", "standard"): {"mix": 0.5},
    ("mix", "max"): {"mix": 0.5, "clip": False},
}
# DAFL's schedule for CIFAR-10 is 2,000 epochs of 120 steps.
PRESETS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("images", "quick"): {"steps": 300},
    ("images", "standard"): {},
    ("images", "max"): _PUBLISHED,
    ("dafl", "quick"): {"steps": 300},
    ("dafl", "standard"): {},
    ("dafl", "max"): {**_PUBLISHED, "crop": 0.0, "flip": False, "mix": 0.0},
    ("mix", "quick"): {"steps": 300},
    ("mix", "standard"): {},
    ("mix", "max"): {**_PUBLISHED, "crop": 0.0, "flip": False, "mix": 0.0},
}
