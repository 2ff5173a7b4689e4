"""How results are chosen between without labels: images in, those to fit to and to judge by out.

What is fitted to images is never judged by them, and kinds of images that differ in how hard they
are count alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

_SHARE, _MOST = 4, 64  # every fourth calibration image judges, or about so many
_LEAST = 1e-12  # a divergence that is nothing
SHIFT = 0.125  # of each side, at most


def split_judges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images to learn from, and every fourth, or some 64, to judge by; none of few."""
    if len(images) < _SHARE:
        return images, images[:0]
    step = max(_SHARE, len(images) // _MOST)
    judged = torch.arange(len(images)) % step == step - 1
    judged[-1] = True
    return images[~judged], images[judged]


def mean_divergence(found: Iterable[float]) -> float:
    """Return the geometric mean of divergences by several kinds of images: their ratios count."""
    return math.exp(statistics.fmean(math.log(max(one, _LEAST)) for one in found))


def augmented(images: Tensor, copies: int, rng: torch.Generator) -> Tensor:
    """Return the images and, behind them, `copies` - 1 others of each, mirrored and shifted.

    What is learned is what the float network answers, to any image: each is its own label.
    """
    host = torch.Generator().manual_seed(rng.initial_seed())
    made = [images]
    for _ in range(copies - 1):
        copy = images.clone()
        mirrored = torch.rand(len(copy), generator=host) < 0.5
        copy[mirrored] = copy[mirrored].flip(3)
        for index in range(len(copy)):
            down, right = (
                int(torch.randint(-limit, limit + 1, (), generator=host))
                for limit in (round(SHIFT * side) for side in copy.shape[2:])
            )
            copy[index] = copy[index].roll((down, right), (1, 2))
        made.append(copy)
    return torch.cat(made)
