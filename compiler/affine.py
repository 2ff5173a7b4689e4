"""The only place where rounding and clamping are written: real tensors in, integer codes out.

`real = (code - zero_point) * scale`, rounding half to even, as ONNX QuantizeLinear does.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dfqc.compiler.contracts import QParams, QTensor, QuantState, WeightGrid
from dfqc.compiler.errors import UnsupportedError
from dfqc.compiler.spec import QScheme

INT32_MAX = 2**31 - 1
# Biases may use this much of int32: the accumulator needs the rest.
BIAS_LIMIT = 2**30
SMALLEST_SCALE = 1e-30
_LARGEST_HALF = 65504.0
_SMALLEST_HALF = 2.0**-24  # the smallest positive float16


def quantize(x: Tensor, scale: Tensor, zero_point: float | Tensor, scheme: QScheme) -> Tensor:
    """Return integer codes as a float tensor of the shape of `x`; `scale` must broadcast."""
    return (x / scale).round_().add_(zero_point).clamp_(scheme.quant_min, scheme.quant_max)


def quantize_by_range(x: Tensor, scale: Tensor, zero_point: int, scheme: QScheme) -> Tensor:
    """Return the codes that `quantize` does, but where `x` is halfway between two.

    There, an engine that knows a grid by the real values of its 8-bit container's ends decides by
    `x` times the steps per unit plus the code of zero, rounded to float32 once. Found by comparing
    formulas with OpenVINO 2026.4: no code of MobileNetV1 differs on 8 images, nor one of 60,000
    pixels, half of them between two codes.
    """
    first = -128 if scheme.signed else 0
    low, high = (first - zero_point) * scale, (first + 255 - zero_point) * scale
    per_unit = 255 / (high - low)
    # A product of two float32 is exact in float64: this is a fused multiply-add.
    zero = low * 255 / (high - low)  # in this order: rounded twice, unlike `low * per_unit`
    codes = x.double().mul_(per_unit.double()).sub_(zero.double()).float().round_()
    return codes.add_(first).clamp_(scheme.quant_min, scheme.quant_max)


def dequantize(codes: Tensor, scale: Tensor, zero_point: int | Tensor) -> Tensor:
    """Return `(codes - zero_point) * scale`."""
    return (codes - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: float | Tensor, scheme: QScheme) -> Tensor:
    """Round `x` to the grid and come back to real values (no gradient)."""
    return quantize(x, scale, zero_point, scheme).sub_(zero_point).mul_(scale)


def channel_view(values: Tensor, ndim: int, axis: int | None) -> Tensor:
    """Shape per-channel `values` (channels,) so that they broadcast along `axis` of `ndim` dims."""
    if axis is None:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.view(shape)


def round_to_grid(weight: Tensor, grid: WeightGrid, axis: int) -> QTensor:
    """Round a weight to the nearest codes of its channels' grids; `axis` is the channel axis."""
    scale, low = (channel_view(v, weight.dim(), axis) for v in (grid.scale, grid.low))
    return QTensor(nearest_codes(weight, scale, low, grid.levels).to(torch.int8), grid.scale)


def nearest_codes(real: Tensor, scale: Tensor, low: Tensor, levels: int) -> Tensor:
    """Return the nearest codes among low .. low + levels - 1 as floats; all must broadcast."""
    return clamp_codes((real / scale).round_(), low, levels)


def clamp_codes(codes: Tensor, low: Tensor, levels: int) -> Tensor:
    """Return `codes` cut off at low .. low + levels - 1; differentiable, `low` must broadcast."""
    # Not by maximum and minimum: those halve the gradient of codes that lie on an end.
    return torch.clamp(codes, low, low + (levels - 1))


def dequantize_weight(weight: QTensor, axis: int | None) -> Tensor:
    """Return the float32 weight that the codes stand for."""
    return weight.codes.float() * channel_view(weight.scale, weight.codes.dim(), axis)


def affine_qparams(low: float, high: float, scheme: QScheme) -> QParams:
    """Return the grid that covers [low, high] and holds zero exactly.

    An asymmetric grid moves its zero point; a symmetric one has zero point 0. An empty range
    gives scale 1: every value there is zero.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"activation range is not finite: [{low}, {high}]")
    if scheme.symmetric:
        bounds = [high / scheme.quant_max]
        if scheme.quant_min < 0:
            bounds.append(low / scheme.quant_min)
        scale = _float32(max(bounds))
        return QParams(scale if scale > SMALLEST_SCALE else 1.0, 0)
    scale = _float32((high - low) / (scheme.quant_max - scheme.quant_min))
    if scale <= SMALLEST_SCALE:
        return QParams(1.0, scheme.quant_min)
    zero_point = round(scheme.quant_min - low / scale)
    return QParams(scale, min(max(zero_point, scheme.quant_min), scheme.quant_max))


def moving_grid(low: Tensor, high: Tensor, scheme: QScheme) -> tuple[Tensor, Tensor]:
    """Return scale (float32) and zero point of `affine_qparams` for a range that is on a device.

    Nothing waits for the device; `low` and `high` are float64 tensors of one number, and finite.
    """
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    if scheme.symmetric:
        scale = high / scheme.quant_max
        if scheme.quant_min < 0:
            scale = torch.maximum(scale, low / scheme.quant_min)
        scale = scale.float()
        scale = torch.where(scale > SMALLEST_SCALE, scale, 1.0)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / (scheme.quant_max - scheme.quant_min)).float()
    empty = scale <= SMALLEST_SCALE
    zero_point = (scheme.quant_min - low / scale.double()).round_()
    zero_point = zero_point.clamp_(scheme.quant_min, scheme.quant_max).float()
    zero_point = torch.where(empty, float(scheme.quant_min), zero_point)
    return torch.where(empty, 1.0, scale), zero_point


def _float32(value: float) -> float:
    """Round to float32, the type the engine stores: simulation and file hold the same number."""
    return float(torch.tensor(value, dtype=torch.float32))


def bias_codes(bias: Tensor, input_scale: float, weight_scale: Tensor) -> Tensor:
    """Snap a float bias (channels,) to the int32 grid `input_scale * weight_scale`.

    ONNX Runtime rounds biases to this grid itself; doing it here first makes simulation and
    engine equal.
    """
    step = bias_scale(input_scale, weight_scale)
    codes = (bias.double() / step.double()).round_()
    if codes.abs().max() > INT32_MAX:
        raise ValueError("bias does not fit the int32 grid: raise the weight scale of the channel")
    return codes.to(torch.int32)


def snap_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Return the values that `bias_codes` stand for, while steps and bias are being learned.

    Nothing is checked (and nothing waits for a device): the codes must fit.
    """
    step = input_scale * weight_scale
    codes = (bias.double() / step.double()).round_()
    return codes.float() * step


def bias_scale(input_scale: float, weight_scale: Tensor) -> Tensor:
    """Return the float32 step of the bias grid, one per output channel."""
    return torch.tensor(input_scale, dtype=torch.float32) * weight_scale


def half_scales(state: QuantState) -> QuantState:
    """Return the state with every scale a float16 number: what a file in float16 can hold.

    Codes stay; a scale moves by 2^-12 of itself at most, at the ends of an 8-bit grid 1/32 of a
    step. Scales below float16's smallest number are raised to it: zero is no scale. A grid that
    float16 cannot reach raises `UnsupportedError`.
    """
    for name, grid in state.acts.items():
        if 128 * grid.scale > _LARGEST_HALF:
            raise UnsupportedError(
                f"{name}: its values reach {128 * grid.scale:.3g}, float16 ends at "
                f"{_LARGEST_HALF:.0f}; build with --trt-base fp32"
            )
    weights = {
        name: QTensor(w.codes, _half(w.scale).to(w.scale.device))
        for name, w in state.weights.items()
    }
    acts = {
        name: QParams(float(_half(torch.tensor(grid.scale))), grid.zero_point)
        for name, grid in state.acts.items()
    }
    return dataclasses.replace(state, weights=weights, acts=acts)


def _half(scale: Tensor) -> Tensor:
    return scale.clamp(min=_SMALLEST_HALF).half().float()


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB; infinite where the tensors are equal."""
    noise = (reference.double() - value.double()).pow(2).sum().item()
    signal = reference.double().pow(2).sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(signal, 1e-300) / noise)
