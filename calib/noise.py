"""Noise images, made without looking at the model: a count in, random images out.

`gaussian` is the honest lower bound of every comparison; `pink` has the second-order statistics of
natural images and serves models without batch norms and held-out sets.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dfqc.calib._pixels import Z_HIGH, Z_LOW, pixel_map
from dfqc.compiler.contracts import CalibSet, Progress, Supplies, silent
from dfqc.compiler.graph import Graph

NEEDS_BN = False
NEEDS_CLASSES = False
USES_ZOO = False
CARRIES = False

Kind = Literal["gaussian", "pink", "uniform"]

# Of natural photographs, in units of the pixel's standard deviation. Within an image the spectrum
# falls as 1/f^a with a of 1 to 1.4 (Field 1987; Ruderman 1994); light, blue-yellow and green-red
# are nearly uncorrelated and fall off in this order (Ruderman, Cronin and Chiao 1998).
EXPONENT = 1.2
_CONTRAST = 0.85  # median standard deviation within an image
_CONTRAST_SPREAD = 0.3  # standard deviation of its logarithm over images
_BRIGHTNESS = 0.5  # standard deviation of the mean over images
_COLOR_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
_COLOR_STD = (1.0, 0.3, 0.15)


class Options(BaseModel):
    """`exponent` is the slope of the pink spectrum: 0 is white, 2 is brown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = "gaussian"
    exponent: float = Field(EXPONENT, ge=0, le=3)
    batch_size: int = Field(256, ge=1)


def count_passes(options: Options, size: tuple[int, int, int], nets: int) -> float:
    """Return 0: no model is run."""
    return 0.0


def count_bytes(options: Options, size: tuple[int, int, int], count: int) -> int:
    """Return the bytes of nothing but the images."""
    return 0


def synthesize(
    graph: Graph,
    count: int,
    options: Options,
    *,
    rng: torch.Generator,
    device: torch.device,
    progress: Progress = silent,
    supplies: Supplies = Supplies(),
) -> CalibSet:
    """Return `count` images for the preprocessing of `graph`; its weights are not used.

    `gaussian` keeps values no pixel can have, as in the literature; the others are valid pixels.
    """
    z = draw(options.kind, count, graph.image.size, rng, exponent=options.exponent)
    images = pixel_map(graph.image, z.device).to_normalized(z).cpu()
    progress(count, count, options.kind)
    return CalibSet(images, None, f"noise/{options.kind}", {"kind": options.kind})


def draw(
    kind: Kind,
    count: int,
    size: tuple[int, int, int],
    rng: torch.Generator,
    *,
    exponent: float = EXPONENT,
) -> Tensor:
    """Return noise as standardized pixels (see `_pixels`), on the device of `rng`."""
    shape = (count, *size)
    if kind == "gaussian":
        return torch.randn(shape, generator=rng, device=rng.device)
    if kind == "uniform":
        return torch.empty(shape, device=rng.device).uniform_(Z_LOW, Z_HIGH, generator=rng)
    return _draw_pink(shape, rng, exponent).clamp_(Z_LOW, Z_HIGH)


def _draw_pink(shape: tuple[int, int, int, int], rng: torch.Generator, exponent: float) -> Tensor:
    """Draw images of 1/f noise whose brightness, contrast and colors vary as photographs' do."""
    count, channels, height, width = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=rng, device=rng.device)

    texture = _filter(normal(count, channels, height, width), exponent)
    contrast = _CONTRAST * torch.exp(_CONTRAST_SPREAD * normal(count, 1, 1, 1))
    fields = contrast * texture + _BRIGHTNESS * normal(count, channels, 1, 1)
    if channels != 3:
        return fields
    mixed: Tensor = torch.einsum("nkhw,kc->nchw", fields, _color_mix().to(fields))
    return mixed


def _filter(white: Tensor, exponent: float) -> Tensor:
    """Give white noise the amplitude spectrum 1/f^exponent, mean 0 and expected variance 1."""
    height, width = white.shape[-2:]
    rows = torch.fft.fftfreq(height, device=white.device).unsqueeze(1)
    columns = torch.fft.fftfreq(width, device=white.device)
    frequency = torch.hypot(rows, columns)
    amplitude = torch.where(frequency > 0, frequency, math.inf).pow(-exponent)
    if exponent == 0:
        amplitude[0, 0] = 0
    amplitude /= amplitude.square().mean().sqrt().clamp_min(1e-12)  # 1x1 images have only a mean
    half = amplitude[:, : width // 2 + 1]
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * half, s=(height, width))
    return filtered


def _color_mix() -> Tensor:
    """Return the matrix from color axes to RGB that gives every channel variance 1."""
    axes = torch.tensor(_COLOR_AXES)
    mix = F.normalize(axes, dim=1) * torch.tensor(_COLOR_STD).unsqueeze(1)
    return F.normalize(mix, dim=0)
