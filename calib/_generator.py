"""Genie's generator (Jeon et al. 2023): latent vectors in, standardized images of any size out.

linear - batch norm - x2 - conv 3x3 - batch norm - leaky ReLU - x2 - conv 3x3 - tanh - batch norm.
The last batch norm has no weights and always reads its own batch: every channel has mean 0 and
variance 1 over the batch, which is what z-space is (`_pixels`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT = 256  # length of a latent vector (published)
CHANNELS = 128  # behind the linear layer (published); half as many behind the first convolution
Squash = Literal["tanh", "none"]
_SLOPE = 0.2  # of the leaky ReLU
_SCALE = 4  # from the linear layer's map to the image: two times two


class Generator(nn.Module):
    """Turns latents (n, `LATENT`) into z (n, c, h, w); one batch is normalized together.

    Sizes that are no multiple of 4 are cut out of the next larger one, in the middle. Initial
    weights are those that torch's layers start with, drawn from `rng`. `squash` "none" leaves the
    tanh out.
    """

    def __init__(
        self,
        size: tuple[int, int, int],
        rng: torch.Generator,
        *,
        channels: int = CHANNELS,
        squash: Squash = "tanh",
    ) -> None:
        super().__init__()
        self.squash = squash
        colors, *self.size = size
        self.grid = [math.ceil(side / _SCALE) for side in self.size]
        self.channels = channels
        inner = max(channels // 2, 1)
        self.linear = nn.utils.skip_init(nn.Linear, LATENT, channels * math.prod(self.grid))
        self.conv1 = nn.utils.skip_init(nn.Conv2d, channels, inner, 3)
        self.conv2 = nn.utils.skip_init(nn.Conv2d, inner, colors, 3)
        self.norm1 = nn.BatchNorm2d(channels, track_running_stats=False)
        self.norm2 = nn.BatchNorm2d(inner, track_running_stats=False)
        self.norm3 = nn.BatchNorm2d(colors, affine=False, track_running_stats=False)
        for layer in (self.linear, self.conv1, self.conv2):
            initialize(layer, rng)

    def forward(self, latents: Tensor) -> Tensor:
        """Return z."""
        x = self.linear(latents).unflatten(1, (*self.grid, self.channels)).movedim(-1, 1)
        x = double_and_convolve(self.norm1(x), self.conv1.weight, self.conv1.bias)
        x = F.leaky_relu(self.norm2(x), _SLOPE)
        x = double_and_convolve(x, self.conv2.weight, self.conv2.bias)
        x = cut_middle(x, self.size)
        x = x.contiguous()  # with three channels, batch norm is four times as fast this way
        z: Tensor = self.norm3(torch.tanh(x) if self.squash == "tanh" else x)
        return z


def count_weights(size: tuple[int, int, int], channels: int) -> int:
    """Return the number of weights of a generator, biases of the convolutions left out."""
    area = math.prod(math.ceil(side / _SCALE) for side in size[1:])
    inner = max(channels // 2, 1)
    return (LATENT + 1) * channels * area + 9 * inner * (channels + size[0])


def count_outputs(size: tuple[int, int, int], channels: int) -> int:
    """Return how many values per image a backward pass through a generator keeps."""
    area = math.prod(math.ceil(side / _SCALE) for side in size[1:])
    inner = max(channels // 2, 1)
    # Each layer's output and its normalized copy: at a quarter of the side, at half, and at full.
    return 2 * (channels * area + inner * 4 * area + size[0] * 16 * area)


def double_and_convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the 3x3 convolution, padding 1, of `x` magnified twice by repeating pixels.

    Of nine taps on a magnified map at most four see different pixels. Adding the weights of those
    that see the same makes it a transposed convolution 4x4 of stride 2 on the small map: exactly
    equal, with 4/9 of the products and without the large map.
    """
    return F.conv_transpose2d(x, _widen(_widen(weight, 2), 3).transpose(0, 1), bias, 2, 1)


def _widen(weight: Tensor, dim: int) -> Tensor:
    """Turn the taps (a, b, c) along one side into (c, b + c, a + b, a)."""
    a, b, c = weight.unbind(dim)
    return torch.stack((c, b + c, a + b, a), dim)


def cut_middle(x: Tensor, size: list[int]) -> Tensor:
    """Crop the middle of (n, c, H, W) to `size`."""
    for dim, side in zip((2, 3), size, strict=True):
        x = x.narrow(dim, (x.shape[dim] - side) // 2, side)
    return x


def initialize(layer: nn.Linear | nn.Conv2d, rng: torch.Generator) -> None:
    """Draw weights and biases uniformly within the root of 1 / inputs, as torch does."""
    bound = 1 / math.sqrt(layer.weight[0].numel())
    for values in (layer.weight, layer.bias):
        assert values is not None
        with torch.no_grad():
            drawn = torch.empty(values.shape, device=rng.device)
            values.copy_(drawn.uniform_(-bound, bound, generator=rng))
