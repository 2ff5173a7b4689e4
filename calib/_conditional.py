"""GDFQ's generators of images of given classes: latents and labels in, standardized images out.

Xu et al. 2020, whose code AdaSG and AdaDFQ keep: linear - norm - x2 - conv - norm - leaky ReLU - x2
- conv - norm - leaky ReLU - conv - tanh - norm. For small images the latent is multiplied by an
embedding of the class and norms have one scale and shift per channel; for large ones, norms have
them per channel and class. Every norm reads its own batch. The norms behind convolutions add 0.8 to
the variance, as released: what was meant as a decay became the epsilon.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqc.calib._generator import cut_middle, double_and_convolve, initialize

LATENT = 100  # length of a latent vector (published)
CHANNELS = 128  # behind the linear layer (published); half as many behind the second convolution
LARGE = 64  # pixels of the shorter side from which on classes are told by norms
Form = Literal["embedding", "norms"]
_SLOPE = 0.2  # of the leaky ReLU
_SCALE = 4  # from the linear layer's map to the image: two times two
_EPS, _CONV_EPS = 1e-5, 0.8


class ConditionalGenerator(nn.Module):
    """Turns latents (n, `LATENT`) and labels (n,) into z (n, c, h, w), normalized as one batch.

    Sizes that are no multiple of 4 are cut out of the next larger one, in the middle. Initial
    weights are those that torch's layers start with, drawn from `rng`.
    """

    def __init__(
        self,
        size: tuple[int, int, int],
        classes: int,
        rng: torch.Generator,
        *,
        channels: int = CHANNELS,
        form: Form | None = None,
    ) -> None:
        super().__init__()
        colors, *self.size = size
        self.form: Form = form or form_of(size)
        self.grid = [math.ceil(side / _SCALE) for side in self.size]
        self.channels, inner = channels, max(channels // 2, 1)
        self.embedding: nn.Parameter | None = None
        if self.form == "embedding":
            drawn = torch.empty(classes, LATENT, device=rng.device).normal_(generator=rng)
            self.embedding = nn.Parameter(drawn)
        self.linear = nn.utils.skip_init(nn.Linear, LATENT, channels * math.prod(self.grid))
        self.conv1 = nn.utils.skip_init(nn.Conv2d, channels, channels, 3)
        self.conv2 = nn.utils.skip_init(nn.Conv2d, channels, inner, 3)
        self.conv3 = nn.utils.skip_init(nn.Conv2d, inner, colors, 3, padding=1)
        kinds = classes if self.form == "norms" else 1
        self.norm0 = _Norm(kinds, channels, _EPS)
        self.norm1 = _Norm(kinds, channels, _CONV_EPS)
        self.norm2 = _Norm(kinds, inner, _CONV_EPS)
        for layer in (self.linear, self.conv1, self.conv2, self.conv3):
            initialize(layer, rng)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Return z."""
        kinds = labels if self.form == "norms" else torch.zeros_like(labels)
        if self.embedding is not None:
            latents = latents * self.embedding[labels]
        x = self.linear(latents).unflatten(1, (*self.grid, self.channels)).movedim(-1, 1)
        x = double_and_convolve(self.norm0(x, kinds), self.conv1.weight, self.conv1.bias)
        x = F.leaky_relu(self.norm1(x, kinds), _SLOPE)
        x = double_and_convolve(x, self.conv2.weight, self.conv2.bias)
        x = F.leaky_relu(self.norm2(x, kinds), _SLOPE)
        x = torch.tanh(cut_middle(self.conv3(x), self.size)).float().contiguous()
        return F.batch_norm(x, None, None, training=True, eps=_EPS)


class _Norm(nn.Module):
    """Batch norm over its own batch with a scale and a shift per kind and channel."""

    def __init__(self, kinds: int, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(kinds, channels))
        self.shift = nn.Parameter(torch.zeros(kinds, channels))

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        """Return (n, c, h, w) normalized, then scaled and shifted as `kinds` (n,) say."""
        if len(self.scale) == 1:
            return F.batch_norm(
                x, None, None, self.scale[0], self.shift[0], training=True, eps=self.eps
            )
        x = F.batch_norm(x, None, None, training=True, eps=self.eps)
        return torch.addcmul(
            self.shift[kinds][..., None, None], x, self.scale[kinds][..., None, None]
        )


def form_of(size: tuple[int, int, int]) -> Form:
    """Return how classes are told for images of that size (published)."""
    return "norms" if min(size[1:]) >= LARGE else "embedding"


def count_weights(size: tuple[int, int, int], classes: int, channels: int) -> int:
    """Return the number of a generator's weights; those of norms and embedding only per class."""
    area = math.prod(math.ceil(side / _SCALE) for side in size[1:])
    inner = max(channels // 2, 1)
    kernels = 9 * (channels * channels + inner * (channels + size[0]))
    per_class = LATENT if form_of(size) == "embedding" else 4 * channels + 2 * inner
    return (LATENT + 1) * channels * area + kernels + classes * per_class


def count_outputs(size: tuple[int, int, int], channels: int) -> int:
    """Return how many values per image a backward pass through a generator keeps."""
    area = math.prod(math.ceil(side / _SCALE) for side in size[1:])
    inner = max(channels // 2, 1)
    # Each layer's output and what follows it: at a quarter of the side, at half, and at full.
    return 2 * channels * area + 3 * channels * 4 * area + (3 * inner + 2 * size[0]) * 16 * area
