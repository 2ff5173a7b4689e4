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

# Every fourth calibration image judges, of many about so many. Real images of which the network is
# sure differ little, and a few decide: by 64 of 1,024 the closed form stood in front of what was
# nearer on 3,000 others, by 256 it does not (ResNet-20). All that share a calibration set share the
# split: what one fits and another starts from must not judge there.
_SHARE, _MOST = 4, 256
_CHUNK = 64  # images moved at once
_LEAST = 1e-12  # a divergence that is nothing
SHIFT = 0.125  # of each side, at most


def split_judges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images to learn from, and every fourth, or some 256, to judge by; none of few."""
    judged = _judged(len(images))
    return images[~judged], images[judged]


def count_judges(samples: int) -> int:
    """Return how many of so many images judge."""
    return int(_judged(samples).sum())


def _judged(samples: int) -> Tensor:
    if samples < _SHARE:
        return torch.zeros(samples, dtype=torch.bool)
    step = max(_SHARE, samples // _MOST)
    judged = torch.arange(samples) % step == step - 1
    judged[-1] = True
    return judged


def mean_divergence(found: Iterable[float]) -> float:
    """Return the geometric mean of divergences by several kinds of images: their ratios count."""
    return math.exp(statistics.fmean(math.log(max(one, _LEAST)) for one in found))


def augmented(images: Tensor, copies: int, rng: torch.Generator) -> Tensor:
    """Return the images and, behind them, `copies` - 1 others of each, mirrored and shifted."""
    every = Copies(images, copies, rng)
    found = images.new_empty(len(every), *images.shape[1:])
    for part in torch.arange(len(every)).split(_CHUNK):
        found[part] = every.read(part, images.device)
    return found


class Copies:
    """The images and, behind them, others of each, mirrored and shifted when they are read.

    What is learned is what the float network answers, to any image: each is its own label.
    """

    def __init__(self, images: Tensor, copies: int, rng: torch.Generator) -> None:
        """Draw how every copy is moved.

        Args:
            images: (n, c, h, w); the only pixels that are held.
            copies: of each, itself included.
            rng: its seed decides.
        """
        host = torch.Generator().manual_seed(rng.initial_seed())
        self.images = images
        self.mirrored = [torch.zeros(len(images), dtype=torch.bool)]
        self.ways = [(0, 0)] * len(images)
        limits = [round(SHIFT * side) for side in images.shape[2:]]
        for _ in range(copies - 1):
            self.mirrored.append(torch.rand(len(images), generator=host) < 0.5)
            for _ in range(len(images)):
                down, right = (int(torch.randint(-n, n + 1, (), generator=host)) for n in limits)
                self.ways.append((down, right))

    def __len__(self) -> int:
        """Return the number of images, copies included."""
        return len(self.ways)

    def read(self, index: Tensor | slice, device: torch.device) -> Tensor:
        """Return some of them."""
        numbers = torch.arange(len(self))[index]
        ways = [self.ways[number] for number in numbers.tolist()]
        chosen = self.images[(numbers % len(self.images)).to(self.images.device)]
        return move(chosen, torch.cat(self.mirrored)[numbers], ways).to(device)

    def free(self) -> None:
        """Nothing is held but the images."""


def move(images: Tensor, mirrored: Tensor, ways: Iterable[tuple[int, ...]]) -> Tensor:
    """Return images (n, c, h, w), some mirrored, each shifted around its edges.

    Args:
        images: stay as they are.
        mirrored: (n,) bool.
        ways: pixels down and right, per image.
    """
    chosen = mirrored.to(images.device)[:, None, None, None]
    images = torch.where(chosen, images.flip(3), images)
    return torch.stack([one.roll(way, (1, 2)) for one, way in zip(images, ways, strict=True)])
