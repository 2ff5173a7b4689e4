"""Random views for training: images and a generator in, cropped, mirrored and mixed ones out.

Labels are not needed: the teacher is asked about every view anew.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor, rng: torch.Generator, *, crop: float, flip: bool, mix: float) -> Tensor:
    """Return one view of each image (n, c, h, w).

    Every image is shifted by up to the share `crop` of its sides (what comes in is its mirror
    image), mirrored half of the time if `flip`, and then, in the share `mix` of the calls, mixed
    with another one: in half of these blended (mixup), in the other half by a box (CutMix). All
    draws come from `rng`, a generator on the CPU.
    """
    images = shift(images, crop, rng)
    if flip:
        mirrored = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
        images = torch.where(mirrored.to(images.device), images.flip(3), images)
    if mix and _draw(rng) < mix:
        images = blend(images, rng) if _draw(rng) < 0.5 else paste(images, rng)
    return images


def shift(images: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Move each image by its own draw, uniform over whole pixels."""
    count, _, height, width = images.shape
    reach = [min(round(share * side), side - 1) for side in (height, width)]
    if not any(reach):
        return images
    down, right = reach
    padded = F.pad(images, (right, right, down, down), mode="reflect")
    rows, columns = (
        torch.randint(0, 2 * most + 1, (count, 1), generator=rng) + torch.arange(side)
        for most, side in ((down, height), (right, width))
    )
    first = torch.arange(count).view(-1, 1, 1)
    moved: Tensor = padded.movedim(1, 3)[first, rows.unsqueeze(2), columns.unsqueeze(1)]
    return moved.movedim(3, 1)


def blend(images: Tensor, rng: torch.Generator) -> Tensor:
    """Mix each image with another at a share drawn uniformly (mixup, Zhang et al. 2018)."""
    order = torch.randperm(len(images), generator=rng).to(images.device)
    share = torch.rand(len(images), 1, 1, 1, generator=rng).to(images)
    return images[order].lerp(images, share)


def paste(images: Tensor, rng: torch.Generator) -> Tensor:
    """Put a box of another image into each, the same box in all (CutMix, Yun et al. 2019)."""
    order = torch.randperm(len(images), generator=rng).to(images.device)
    top, tall = _draw_span(images.shape[2], rng)
    left, wide = _draw_span(images.shape[3], rng)
    mixed = images.clone()
    box = (..., slice(top, top + tall), slice(left, left + wide))
    mixed[box] = images[order][box]
    return mixed


def _draw_span(side: int, rng: torch.Generator) -> tuple[int, int]:
    """Draw start and length of a span inside 0 .. side."""
    length = 1 + int(_draw(rng) * side)
    return int(_draw(rng) * (side - length + 1)), length


def _draw(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng))
