"""DAFL's generator and losses (Chen et al. 2019): latents in, images out; what a net says of them.

linear - batch norm - x2 - conv 3x3 - batch norm - leaky ReLU - x2 - conv 3x3 - batch norm - leaky
ReLU - conv 3x3 - tanh - batch norm. The last one has no weights: z-space is what it gives.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqc.calib._generator import double_and_convolve, initialize

LATENT = 1000  # length of a latent vector (published for CIFAR-10)
CHANNELS = 128  # behind the linear layer and the first convolution (published); then half
_EPS = 0.8  # of the hidden batch norms: a slip of the published code, kept
_SLOPE = 0.2  # of the leaky ReLUs
_SCALE = 4  # from the linear layer's map to the image: two times two


class Generator(nn.Module):
    """Turns latents (n, `LATENT`) into z (n, c, h, w); one batch is normalized together.

    Sizes that are no multiple of 4 are cut out of the next larger one. Initial weights are those
    that torch's layers start with, drawn from `rng`.
    """

    def __init__(
        self, size: tuple[int, int, int], rng: torch.Generator, *, channels: int = CHANNELS
    ) -> None:
        super().__init__()
        colors, *self.size = size
        self.grid = [math.ceil(side / _SCALE) for side in self.size]
        self.channels, inner = channels, max(channels // 2, 1)
        self.linear = nn.utils.skip_init(nn.Linear, LATENT, channels * math.prod(self.grid))
        self.conv1 = nn.utils.skip_init(nn.Conv2d, channels, channels, 3)
        self.conv2 = nn.utils.skip_init(nn.Conv2d, channels, inner, 3)
        self.conv3 = nn.utils.skip_init(nn.Conv2d, inner, colors, 3)
        self.norm0 = nn.BatchNorm2d(channels, track_running_stats=False)
        self.norm1 = nn.BatchNorm2d(channels, _EPS, track_running_stats=False)
        self.norm2 = nn.BatchNorm2d(inner, _EPS, track_running_stats=False)
        self.norm3 = nn.BatchNorm2d(colors, affine=False, track_running_stats=False)
        for layer in (self.linear, self.conv1, self.conv2, self.conv3):
            initialize(layer, rng)

    def forward(self, latents: Tensor) -> Tensor:
        """Return z."""
        x = self.linear(latents).unflatten(1, (*self.grid, self.channels)).movedim(-1, 1)
        x = double_and_convolve(self.norm0(x), self.conv1.weight, self.conv1.bias)
        x = F.leaky_relu(self.norm1(x), _SLOPE)
        x = double_and_convolve(x, self.conv2.weight, self.conv2.bias)
        x = F.leaky_relu(self.norm2(x), _SLOPE)
        x = F.conv2d(x, self.conv3.weight, self.conv3.bias, padding=1)
        for dim, side in zip((2, 3), self.size, strict=True):
            x = x.narrow(dim, (x.shape[dim] - side) // 2, side)
        z: Tensor = self.norm3(torch.tanh(x.contiguous()))
        return z


def count_weights(size: tuple[int, int, int], channels: int) -> int:
    """Return the number of weights of a generator."""
    area = math.prod(math.ceil(side / _SCALE) for side in size[1:])
    inner = max(channels // 2, 1)
    return (LATENT + 1) * channels * area + 9 * (channels * (channels + inner) + inner * size[0])


def one_hot_loss(logits: Tensor) -> Tensor:
    """Cross-entropy with the class the net says itself: its answers are to be sure (eq. 2)."""
    return F.cross_entropy(logits, logits.detach().argmax(1))


def information_loss(logits: Tensor) -> Tensor:
    """Return the sum over classes of p log10 p, p the mean answer: all classes occur (eq. 4)."""
    mean = logits.softmax(1).mean(0)
    return (mean * mean.clamp_min(1e-12).log10()).sum()


def activation_loss(features: Tensor) -> Tensor:
    """Return minus the mean magnitude of the features before the classifier (eq. 3)."""
    return -features.abs().mean()
