"""The space images are optimized in: standardized pixels in, normalized images out, and back.

A model's normalized space can be anything (mean 0 and std 1/255 means inputs of 0..255), so a step
size tuned on one model means nothing on the next. Synthesizers therefore work on z, the pixel
standardized by the statistics of natural images; for ImageNet's mean and std, z is nearly the
normalized pixel itself, so published learning rates carry over to every model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.precision import Precision

# Mean and standard deviation of a pixel (0..1) over natural images, all channels alike.
PIXEL_MEAN = 0.45
PIXEL_STD = 0.225
# What 0 and 1 are in z.
Z_LOW = (0.0 - PIXEL_MEAN) / PIXEL_STD
Z_HIGH = (1.0 - PIXEL_MEAN) / PIXEL_STD


class ImageOptions(BaseModel):
    """What every synthesizer that optimizes images lets its user choose.

    `batch_size`: images optimized together; they match the statistics together.
    `clip`: keep every pixel in the range of real ones, the only ones that an engine's input grid
    has; it was worth about 1 dB of output SQNR at W8A8 on the CIFAR nets.
    `low_pass`: cut-off of a Gaussian low-pass filter over the finished images in cycles per pixel,
    None for no filter. SynQ (Kim et al. 2025) takes 40 to 80 of 224 frequencies: 0.18 to 0.36.
    `precision`: of the model's convolutions; statistics and images are float32 always. `auto` is
    bfloat16 on an accelerator that has it, and float32 on a CPU. With bfloat16 the batch norms'
    distance stayed within 0.003 (ResNet-20, Tiny Darknet). On a CPU with AVX-512-BF16 a pass took
    0.74 (ResNet-20), 0.60 (Tiny Darknet) and 1.25 (MobileNet) of the time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(64, ge=1)
    clip: bool = True
    low_pass: float | None = Field(None, gt=0)
    precision: Precision = "float32"


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


def finish(z: Tensor, pixels: PixelMap, options: ImageOptions) -> Tensor:
    """Filter and clip as the options say; return normalized images (n, c, h, w) on the CPU."""
    z = z.detach()
    if options.low_pass is not None:
        z = filter_low(z, options.low_pass)
    if options.clip:
        z = z.clamp(Z_LOW, Z_HIGH)
    return pixels.to_normalized(z).contiguous().cpu()


def filter_low(z: Tensor, cutoff: float) -> Tensor:
    """Multiply the spectrum of (n, c, h, w) by exp(-f^2 / (2 cutoff^2)), f in cycles per pixel.

    SynQ (Kim et al. 2025): synthetic images have more energy at high frequencies than photographs.
    """
    height, width = z.shape[-2:]
    rows = torch.fft.fftfreq(height, device=z.device).unsqueeze(1)
    columns = torch.fft.rfftfreq(width, device=z.device)
    gain = torch.exp(-(rows.square() + columns.square()) / (2 * cutoff**2))
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(z) * gain, s=(height, width))
    return filtered
