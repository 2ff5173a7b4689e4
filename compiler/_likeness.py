"""How alike images are: pixels in, those that nearly equal each other and nearest neighbors out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dfqc.compiler.contracts import ImageSpec

HALF_CODE = 0.5 / 255  # what rounding to 8 bits hides
TWINS_AT = 0.99  # no pair of 5,000 images of CIFAR-10, 5,000 of CIFAR-100, 1,000 of ImageNet has it
_PAIRS_SHOWN = 8
_BLOCK = 1024  # images compared with others at once


@dataclass(frozen=True)
class Twins:
    """Images that nearly equal an earlier one; `pairs` are some of (first, second, correlation)."""

    images: int
    closest: float
    pairs: tuple[tuple[int, int, float], ...]


def to_pixels(images: Tensor, image: ImageSpec) -> Tensor:
    """Undo a model's normalization: (n, c, h, w) with 0..1 for what an image file can hold."""
    mean, std = (
        torch.tensor(v, dtype=images.dtype, device=images.device).view(-1, 1, 1)
        for v in (image.mean, image.std)
    )
    return torch.addcmul(mean, images, std)


def shrink(pixels: Tensor, side: int) -> Tensor:
    """Average (n, c, h, w) over areas until no side is longer than `side`."""
    height, width = pixels.shape[-2:]
    return F.adaptive_avg_pool2d(pixels, (min(height, side), min(width, side)))


def find_twins(thumbnails: Tensor) -> Twins:
    """Find rows (n, d) whose normalized cross-correlation with an earlier one is over 0.99.

    It does not see brightness and contrast, which add no new content, and thumbnails do not see
    fine noise. Images that are flat to half a code of 8 bits are twins of each other.
    """
    vectors = _unit_vectors(thumbnails.float())
    count, closest = 0, -1.0
    pairs: list[tuple[int, int, float]] = []
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        likeness = block @ vectors[: start + len(block)].T
        likeness = likeness.tril(start - 1).masked_fill_(
            torch.ones_like(likeness, dtype=torch.bool).triu(start), -1.0
        )
        highest, first = likeness.max(1)
        closest = max(closest, float(highest.max()))
        twins = (highest > TWINS_AT).nonzero().flatten().tolist()
        count += len(twins)
        shown = twins[: _PAIRS_SHOWN - len(pairs)]
        pairs.extend((int(first[i]), start + i, float(highest[i])) for i in shown)
    return Twins(count, min(closest, 1.0), tuple(pairs))


class Nearest:
    """Finds, for each row of `queries` (n, d), the nearest of rows that come in batches.

    Attributes:
        distance: root mean square difference to the nearest so far, (n,); infinite before any.
        index: which row that is, (n,).
    """

    def __init__(self, queries: Tensor) -> None:
        self.queries = queries
        self.distance = torch.full((len(queries),), math.inf)
        self.index = torch.full((len(queries),), -1)

    def add(self, rows: Tensor, start: int, *, own: Tensor | None = None) -> Tensor:
        """Take in rows (m, d), the first of number `start`; return which queries got nearer.

        `own` (n,) is the number of the row that each query is itself, and not compared with.
        """
        found = torch.zeros(len(self.queries), dtype=torch.bool)
        squares = rows.square().sum(1)
        for first in range(0, len(self.queries), _BLOCK):
            part = slice(first, first + _BLOCK)
            # |q - r|² without |q|², which is the same for every row.
            distance = torch.addmm(squares, self.queries[part], rows.T, alpha=-2)
            if own is not None:
                numbers = torch.arange(start, start + len(rows))
                distance.masked_fill_(own[part, None] == numbers, math.inf)
            choice = distance.argmin(1)
            # Rows that are nearly equal lose all digits above: once more, for the chosen.
            exact = (self.queries[part] - rows[choice]).square().mean(1).sqrt()
            if own is not None:
                exact.masked_fill_(own[part] == choice + start, math.inf)  # no other row here
            found[part] = exact < self.distance[part]
            self.distance[part] = torch.where(found[part], exact, self.distance[part])
            self.index[part] = torch.where(found[part], choice + start, self.index[part])
        return found


def _unit_vectors(rows: Tensor) -> Tensor:
    """Center and scale every row to length 1; flat ones point along an axis of their own."""
    centered = rows - rows.mean(1, keepdim=True)
    length = torch.linalg.vector_norm(centered, dim=1, keepdim=True)
    flat = length <= HALF_CODE * math.sqrt(rows.shape[1])
    return torch.cat([torch.where(flat, 0.0, centered / length), flat.float()], 1)
