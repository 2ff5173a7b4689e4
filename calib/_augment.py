"""Changes of images that keep their classes: images and a generator in, jittered or mixed ones out.

All of it is differentiable, costs no loop over images and has one shape whatever is drawn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def jitter(images: Tensor, roll: float, flip: bool, host: torch.Generator) -> Tensor:
    """Roll (n, c, h, w) by up to the share `roll` of each side and mirror it in half of the calls.

    All images are moved alike, as published. `host` is a generator on the CPU: what is drawn are
    sizes, which a generator on another device would have to be waited for.
    """
    down, right = (
        int(torch.randint(-limit, limit + 1, (), generator=host))
        for limit in (round(roll * side) for side in images.shape[2:])
    )
    images = images.roll((down, right), (2, 3))
    if flip and int(torch.randint(2, (), generator=host)):
        images = images.flip(3)
    return images


def draw_boxes(count: int, size: tuple[int, int], rng: torch.Generator) -> Tensor:
    """Draw boxes inside an image of (height, width): (count, 4) of top, left, height, width.

    Height and width are uniform over 1 ... that of the image, and so is then the place (MixMix, Li
    et al. 2021, section 5).
    """
    limits = torch.tensor(size, device=rng.device)
    draws = torch.rand(2, count, 2, generator=rng, device=rng.device)
    extent = torch.minimum(1 + (draws[0] * limits).floor(), limits)
    corner = torch.minimum((draws[1] * (limits - extent + 1)).floor(), limits - extent)
    return torch.cat((corner, extent), 1)


def mix(images: Tensor, order: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Put the whole image `order[i]`, resized bilinearly, into box i of image i.

    Returns the mixed images and the share of the area that the boxes take, (n,): the share of the
    second image's class (MixMix, eqs. 7 to 9; other than CutMix, which cuts out a part).
    """
    height, width = images.shape[-2:]
    top, left, tall, wide = boxes.to(images).unsqueeze(2).unbind(1)
    rows, columns = _sources(top, tall, height), _sources(left, wide, width)
    shape = (len(images), height, width)
    grid = torch.stack((columns.unsqueeze(1).expand(shape), rows.unsqueeze(2).expand(shape)), 3)
    resized = F.grid_sample(images[order], grid, padding_mode="border", align_corners=False)
    inside = (rows.abs() < 1).unsqueeze(2) & (columns.abs() < 1).unsqueeze(1)
    share = (tall * wide).squeeze(1) / (height * width)
    return torch.where(inside.unsqueeze(1), resized, images), share


def _sources(start: Tensor, extent: Tensor, length: int) -> Tensor:
    """Return, per box and pixel of an axis, the place it shows: -1 ... 1; outside, it is beyond."""
    centers = torch.arange(length, device=start.device, dtype=start.dtype) + 0.5
    return 2 * (centers - start) / extent - 1
