"""Second moments of layer inputs: a layer with activations or their moments in, E[x x^T] out.

`x` is a column of the unfolded input of a Conv2d, padding included, or the input of a Linear.
From images the moments are measured; from batch-norm statistics they are derived: channels are
taken as independent, and neighbors as correlated with 0.6 to the power of their distance, as they
are in natural images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqc.compiler.moments import Moments

CORRELATION = 0.6  # of neighboring positions in one channel
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples fill [0, 1) evenly
HESSIAN_BYTES = 8 << 30  # of a layer's, where nobody set a limit: up to 9,400 weights per channel
_MATRICES = 12  # float64 of the Hessian's size, at once: moments, factors and what they are made of
_GATHER_BYTES = 1 << 26  # patches are held this many bytes at a time


@dataclass(frozen=True)
class SecondMoments:
    """Moments of a layer's input patches, per group, float64; `dim` is a group's row of weights.

    Attributes:
        quantized: E[q q^T] of what the quantized layer reads, (groups, dim, dim).
        cross: E[x q^T] with the float layer's input x, (groups, dim, dim); None: x is q.
        quantized_mean: E[q], (groups, dim).
        float_mean: E[x], (groups, dim); None: x is q.
    """

    quantized: Tensor
    cross: Tensor | None
    quantized_mean: Tensor
    float_mean: Tensor | None


def measure_moments(
    module: nn.Conv2d | nn.Linear,
    quantized: Sequence[Tensor],
    floats: Sequence[Tensor] | None = None,
    *,
    limit: int,
) -> SecondMoments:
    """Return the second moments of a layer's input over batches of activations.

    Args:
        module: the layer.
        quantized: its inputs in the quantized network, batches of (n, c, h, w) or (..., features).
        floats: its inputs in the float network on the same images; None: take no cross moments.
        limit: patches to use at most, but one per batch; spread over all images.
    """
    groups, dim = group_shape(module)
    device = quantized[0].device
    total = torch.zeros(groups, dim, dim, dtype=torch.float64, device=device)
    mean = torch.zeros(groups, dim, dtype=torch.float64, device=device)
    cross, float_mean = (None, None) if floats is None else (total.clone(), mean.clone())
    share = limit / sum(count_patches(module, value) for value in quantized)
    count = 0
    for index, value in enumerate(quantized):
        wanted = max(1, int(count_patches(module, value) * share))
        for part in pick_patches(count_patches(module, value), wanted, groups * dim):
            patches = gather_patches(value, module, part)
            count += patches.shape[1]
            mean += patches.sum(1, dtype=torch.float64)
            total += (patches.mT @ patches).double()
            if floats is not None and cross is not None and float_mean is not None:
                others = gather_patches(floats[index], module, part)
                float_mean += others.sum(1, dtype=torch.float64)
                cross += (others.mT @ patches).double()
    if cross is not None and float_mean is not None:
        cross, float_mean = cross / count, float_mean / count
    return SecondMoments(total.div_(count), cross, mean / count, float_mean)


def derive_moments(module: nn.Conv2d | nn.Linear, moments: Moments, *, limit: int) -> SecondMoments:
    """Return the second moments that mean and variance maps of the input imply.

    Args:
        module: the layer.
        moments: of its input for one image, maps of (1, c, h, w) or (1, ..., features).
        limit: positions to average over at most.
    """
    exact = measure_moments(module, [moments.mean], limit=limit)
    spread = measure_moments(module, [moments.var.sqrt()], limit=limit)
    related = spread.quantized * _correlations(module).to(spread.quantized.device)
    return SecondMoments(exact.quantized + related, None, exact.quantized_mean, None)


def blend_moments(measured: SecondMoments, derived: SecondMoments, share: float) -> SecondMoments:
    """Return measured second moments, a share of them taken from derived ones.

    What layers before changed is measured alone: the cross moments move with the others, so that
    their difference is (1 - share) of the measured one. The means stay those measured.
    """
    both = [measured.quantized] + ([] if measured.cross is None else [measured.cross])
    quantized, *cross = [torch.lerp(m, derived.quantized.to(m), share) for m in both]
    return dataclasses.replace(measured, quantized=quantized, cross=cross[0] if cross else None)


def group_shape(module: nn.Conv2d | nn.Linear) -> tuple[int, int]:
    """Return the groups of a layer, and how many weights an output channel has."""
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    return groups, module.weight[0].numel()


def count_patches(module: nn.Conv2d | nn.Linear, value: Tensor) -> int:
    """Return how many patches an input has."""
    if isinstance(module, nn.Linear):
        return value.numel() // module.in_features
    size = _output_size(module, value.shape[-2], value.shape[-1])
    return len(value) * size[0] * size[1]


def gather_patches(value: Tensor, module: nn.Conv2d | nn.Linear, index: Tensor) -> Tensor:
    """Return chosen patches of an input, (groups, len(index), dim).

    `index` counts patches over images, rows and columns. Only what was chosen is copied: a whole
    unfolded feature map is kernel height x width times the feature map.
    """
    if isinstance(module, nn.Linear):
        return value.reshape(1, -1, module.in_features)[:, index]
    rows, columns = _output_size(module, value.shape[-2], value.shape[-1])
    padded = F.pad(value, module._reversed_padding_repeated_twice).contiguous()
    strides, step, dilation = padded.stride(), module.stride, module.dilation
    windows = padded.as_strided(
        (len(padded), rows, columns, padded.shape[1], *module.kernel_size),
        (
            strides[0],
            strides[2] * step[0],
            strides[3] * step[1],
            strides[1],
            strides[2] * dilation[0],
            strides[3] * dilation[1],
        ),
    )
    index = index.to(value.device)
    image, position = index // (rows * columns), index % (rows * columns)
    patches = windows[image, position // columns, position % columns]
    return patches.reshape(len(index), module.groups, -1).transpose(0, 1)


def _output_size(module: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    left, right, top, bottom = module._reversed_padding_repeated_twice
    sizes = (height + top + bottom, width + left + right)
    rows, columns = (
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            sizes, module.kernel_size, module.stride, module.dilation, strict=True
        )
    )
    return rows, columns


def pick_patches(patches: int, wanted: int, width: int) -> tuple[Tensor, ...]:
    """Return patch numbers spread over all of them, in parts that fit the memory set aside.

    One of every equal stretch, at places in it that do not repeat: evenly spaced ones would walk
    down single columns of a feature map.
    """
    if wanted >= patches:
        index = torch.arange(patches)
    else:
        steps = torch.arange(wanted, dtype=torch.float64)
        index = ((steps + (steps * _GOLDEN) % 1) * (patches / wanted)).long()
    parts: tuple[Tensor, ...] = index.split(max(1, _GATHER_BYTES // (4 * width)))
    return parts


def _correlations(module: nn.Conv2d | nn.Linear) -> Tensor:
    """Return the correlation of any two weights' inputs, (dim, dim): zero between channels."""
    if isinstance(module, nn.Linear):
        return torch.eye(module.in_features, dtype=torch.float64)
    height, width = (
        torch.arange(size, dtype=torch.float64) * dilation
        for size, dilation in zip(module.kernel_size, module.dilation, strict=True)
    )
    near = [CORRELATION ** (x[:, None] - x[None, :]).abs() for x in (height, width)]
    spatial = torch.kron(near[0].contiguous(), near[1].contiguous())
    channels = torch.eye(module.in_channels // module.groups, dtype=torch.float64)
    return torch.kron(channels, spatial)


def hessian_bytes(module: nn.Module) -> int:
    """Return what rounding a layer by its Hessian takes, counting every matrix of that size."""
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        return 0
    groups, dim = group_shape(module)
    return _MATRICES * 8 * groups * dim**2


def hessian_room(memory_bytes: int | None) -> int:
    """Return what a layer's Hessian may take; without a limit the same on every machine."""
    return memory_bytes // 2 if memory_bytes else HESSIAN_BYTES
