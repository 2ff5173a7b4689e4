"""The space images are optimized in: standardized pixels in, normalized images out, and back.

A model's normalized space can be anything (mean 0 and std 1/255 means inputs of 0..255), so a step
size tuned on one model means nothing on the next. Synthesizers therefore work on z, the pixel
standardized by the statistics of natural images; for ImageNet's mean and std, z is nearly the
normalized pixel itself, so published learning rates carry over to every model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfqc.compiler.contracts import ImageSpec

# Mean and standard deviation of a pixel (0..1) over natural images, all channels alike.
PIXEL_MEAN = 0.45
PIXEL_STD = 0.225
# What 0 and 1 are in z.
Z_LOW = (0.0 - PIXEL_MEAN) / PIXEL_STD
Z_HIGH = (1.0 - PIXEL_MEAN) / PIXEL_STD


@dataclass(frozen=True)
class PixelMap:
    """The affine map per channel: normalized = z * gain + offset, both (c, 1, 1)."""

    gain: Tensor
    offset: Tensor

    def to_normalized(self, z: Tensor) -> Tensor:
        """Map z to what the model reads."""
        return torch.addcmul(self.offset, z, self.gain)

    def to_z(self, images: Tensor) -> Tensor:
        """Map normalized images to z."""
        return (images - self.offset) / self.gain


def pixel_map(image: ImageSpec, device: torch.device) -> PixelMap:
    """Return the map of a model's preprocessing."""
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (image.mean, image.std)
    )
    gain, offset = PIXEL_STD / std, (PIXEL_MEAN - mean) / std
    return PixelMap(gain.float().to(device), offset.float().to(device))
