"""ZeroQ (Cai et al. 2020): noise in, images out whose inputs to every batch norm have its moments.

The images themselves are optimized; there are no labels and no generator. Published settings:
`statistic=per_image loss=std init=gaussian schedule=plateau iterations=500 lr=0.5 patience=0`. The
defaults differ where that was measured to be better. Above all, moments are those of the batch:
asking every image for the moments of all classes together makes images that no class resembles,
and activations near the output then stay far below those of real images.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dfqc.calib import _bns
from dfqc.calib._pixels import Z_HIGH, Z_LOW, PixelMap, pixel_map
from dfqc.calib.noise import draw
from dfqc.compiler.contracts import CalibSet, Progress, silent
from dfqc.compiler.graph import Graph

NEEDS_BN = True

# Changes to the defaults of `Options`. 256 images of a CIFAR ResNet-20 take about 15, 25 and 130 s
# on two cores, 128 images of a 0.25 MobileNet at 224 pixels about 40 s, 70 s and 6 min.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"iterations": 60},
    "standard": {"iterations": 100},
    "max": {"iterations": 500},
}

_LOSSES: Mapping[str, _bns.Loss] = {
    "relative": _bns.relative_loss,
    "std": _bns.std_loss,
    "kl": _bns.kl_loss,
}
_MIN_GAIN = 0.01  # a loss that is not this much below the lowest so far has not fallen
_MIN_LR = 1e-4


class Options(BaseModel):
    """How the images are optimized; steps are in standardized pixels (see `_pixels`).

    `statistic`: the moments to match are those of the batch, or of each image by itself.
    `schedule`: `anneal` keeps `lr` for the first `hold` of the iterations, then lowers it to 0;
    `plateau` divides it by 10 when the loss has not fallen for 100 iterations.
    `patience`: once the loss has not fallen by 1 % for that many iterations, `anneal` goes on to
    lowering `lr`, over as many iterations as that takes anyway, and `plateau` stops when `lr` is
    as low as it gets. 0: all iterations are done.
    `clip`: keep every pixel in the range of real ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    iterations: int = Field(100, ge=1)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(0.2, gt=0)
    schedule: Literal["anneal", "plateau"] = "anneal"
    hold: float = Field(0.5, ge=0, lt=1)
    patience: int = Field(50, ge=0)
    statistic: Literal["batch", "per_image"] = "batch"
    loss: Literal["relative", "std", "kl"] = "relative"
    init: Literal["pink", "gaussian"] = "pink"
    clip: bool = False
