"""How far a quantized unit, or network, is from its float output: rows in, one number out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dfqc.compiler.quantize._stream import Rows

_NO_ERROR = 1e-14  # of float32


def output_error(
    function: Callable[[Tensor], Tensor],
    inputs: Rows,
    target: Rows,
    *,
    batch: int,
    device: torch.device,
) -> float:
    """Return the geometric mean over the images of |function(x) - target|^2 / |target|^2.

    Every image counts alike, however large its activations are, and every kind of image, however
    hard it is: images that are unlike the model's data have by far the larger errors.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for start in range(0, len(inputs), batch):
            rows = slice(start, start + batch)
            wanted = target.read(rows, device)
            wanted = wanted.reshape(len(wanted), -1)  # one number per image is a row too
            found = function(inputs.read(rows, device)).reshape(len(wanted), -1)
            noise = (found - wanted).square().sum(1)
            relative = (noise / wanted.square().sum(1).clamp_min(1e-12)).double()
            total += relative.clamp_min(_NO_ERROR).log().sum()
    return math.exp(float(total) / max(1, len(inputs)))
