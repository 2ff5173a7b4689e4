"""DeepInversion (Yin et al. 2020): noise and labels in, images of those classes out.

The images themselves are optimized: for their classes, for the batch norms' statistics and for
smoothness, shifted and mirrored at random in every iteration. `max` is as published for the size of
the image, except for the size of a batch and that pixels of small images are clipped too.

`quick` and `standard` start from pink noise, weigh layers alike in the batch norms' loss, shift
small images further and mirror them, anneal the rate, and stay at full resolution; all are options.
Of 64 images from a CIFAR ResNet-20, a ResNet-56 that had no part in it recognized 91 % at `quick`
and 45 % at `max`; without the larger shifts and mirroring, 78 %. On a 0.25 MobileNet at 224 pixels,
half of the iterations at half the resolution took 0.7 of the time, but left the batch norms'
distance at 0.25 instead of 0.18.

Adaptive DeepInversion, in which teacher and student disagree, needs a student that is trained and
belongs to where it is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from dfqc.calib import _inversion_options
from dfqc.calib._inversion import invert
from dfqc.calib._inversion_options import InversionOptions
from dfqc.calib._objective import Method
from dfqc.compiler.contracts import CalibSet, Progress, Supplies, silent
from dfqc.compiler.graph import Graph

NEEDS_BN = True
NEEDS_CLASSES = True
USES_ZOO = False
CARRIES = False

# What is measured to be better than the published settings when iterations are few.
CHEAP: Mapping[str, Any] = {
    "init": "pink",
    "schedule": "anneal",
    "lr": 0.25,
    "low_res": 0.0,
    "bn_loss": "relative",
    "bn_weight": 10.0,
    "first_bn": 1.0,
    "tv": 0.01,
    "l2": 0.0,
    "roll": 0.125,
    "flip": True,
}
# Changes to the defaults of `Options`. Measured, in CPU seconds: 8 and 20 for 64 images of a CIFAR
# ResNet-20 (quick and standard), 26 for 32 images of a 0.25 MobileNet at 224 pixels (quick).
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {**CHEAP, "iterations": 60},
    "standard": {**CHEAP, "iterations": 150},
    "max": {"batch_size": 128},
}


class Options(InversionOptions):
    """How the images are optimized; the defaults are as published."""


def count_passes(options: Options, size: tuple[int, int, int], nets: int) -> float:
    """Return the forward-and-backward passes per image."""
    return _inversion_options.count_passes(options, size)


def count_bytes(options: Options, size: tuple[int, int, int], count: int) -> int:
    """Return the bytes of the images, their gradients, Adam's two moments, and a shifted copy."""
    return 20 * count * math.prod(size)


def synthesize(
    graph: Graph,
    count: int,
    options: Options,
    *,
    rng: torch.Generator,
    device: torch.device,
    progress: Progress = silent,
    supplies: Supplies = Supplies(),
) -> CalibSet:
    """Return one batch of `count` images with labels; on a CPU, equal seeds give equal images.

    Raises:
        UnsupportedError: the graph has no batch norm with running statistics, or no classes.
    """
    return invert(
        graph, [graph], count, options, Method("deepinversion"),
        rng=rng, device=device, progress=progress, supplies=supplies,
    )  # fmt: skip
