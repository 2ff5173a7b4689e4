"""Rules on single Q and DQ nodes: types of codes, zero points, scales, axes and blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from dfqc.backends._trt_view import (
    Fault,
    View,
    attribute,
    has_input,
    type_name,
)

_INT8_GRID = "quantize to int8 with zero point 0"
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def uint8_codes(view: View) -> Iterator[Fault]:
    """No uint8: the parser refuses it."""
    for node in _pairs(view):
        silent = node.op_type == "QuantizeLinear" and not _says_type(node)  # a rule of its own
        if view.code_type(node) == TensorProto.UINT8 and not silent:
            yield Fault(view.label(node), "got uint8 codes, expected int8", _INT8_GRID)


def code_type(view: View) -> Iterator[Fault]:
    """Codes are int8, or int4; not 16 bits, not unsigned, not 2 bits."""
    told = (TensorProto.UINT8, TensorProto.INT32, TensorProto.INT8, TensorProto.INT4)
    for node in _pairs(view):
        kind = view.code_type(node)
        if kind not in told:
            got = type_name(kind)
            yield Fault(view.label(node), f"got {got} codes, expected int8 or int4", _INT8_GRID)


def int32_codes(view: View) -> Iterator[Fault]:
    """No int32: a bias stays float."""
    for node in view.of("DequantizeLinear"):
        if view.code_type(node) == TensorProto.INT32:
            yield Fault(
                view.label(node),
                "dequantizes int32, expected int8 or int4",
                "store the bias as float: codes times input scale times weight scale",
            )


def missing_zero_point(view: View) -> Iterator[Fault]:
    """A Q says that its codes are int8: ONNX's default is uint8, TensorRT's int8."""
    for node in view.of("QuantizeLinear"):
        if not _says_type(node):
            yield Fault(
                view.label(node),
                "has neither zero point nor output_dtype: uint8 to ONNX, int8 to TensorRT",
                "give it an int8 zero point of 0",
            )


def computed_zero_point(view: View) -> Iterator[Fault]:
    """Zero points are constants."""
    for node in _pairs(view):
        if has_input(node, 2) and view.array(node.input[2]) is None:
            yield Fault(
                view.label(node),
                f"its zero point {node.input[2]!r} is computed, expected a constant",
                "store it as an initializer of zeros",
            )


def nonzero_zero_point(view: View) -> Iterator[Fault]:
    """Zero points are zero."""
    for node in _pairs(view):
        zero = view.array(node.input[2]) if has_input(node, 2) else None
        if zero is not None and np.any(zero.astype(np.int64)):
            got = int(zero.reshape(-1)[np.flatnonzero(zero.astype(np.int64).reshape(-1))[0]])
            yield Fault(
                view.label(node),
                f"got zero point {got}, expected 0: TensorRT's grids are symmetric",
                "quantize symmetrically, scale = max |x| / 127",
            )


def zero_point_volume(view: View) -> Iterator[Fault]:
    """As many zero points as scales."""
    for node in _pairs(view):
        zero = view.array(node.input[2]) if has_input(node, 2) else None
        scale = view.array(node.input[1])
        if zero is not None and scale is not None and zero.size != scale.size:
            yield Fault(
                view.label(node),
                f"got {zero.size} zero points for {scale.size} scales",
                "give the zero point the shape of the scale",
            )


def computed_scale(view: View) -> Iterator[Fault]:
    """Scales are constants."""
    for node in _pairs(view):
        if view.array(node.input[1]) is None:
            yield Fault(
                view.label(node),
                f"its scale {node.input[1]!r} is computed, expected a constant",
                "fix the grid before export: dynamic quantization is not supported",
            )


def scale_positive(view: View) -> Iterator[Fault]:
    """Scales are above zero, and finite."""
    for node in _pairs(view):
        scale = view.array(node.input[1])
        if scale is None or scale.dtype.kind in "iu":
            continue
        bad = ~(np.isfinite(scale) & (scale > 0))
        if bad.any():
            got = float(scale[bad].reshape(-1)[0])
            yield Fault(
                view.label(node),
                f"got scale {got:g}, expected a positive number",
                "give channels without values the smallest positive scale",
            )


def scale_type(view: View) -> Iterator[Fault]:
    """Scales are floating point."""
    for node in _pairs(view):
        kind = view.type_of(node.input[1])
        if kind not in _FLOATS:
            yield Fault(
                view.label(node),
                f"got a scale of {type_name(kind)}, expected float, float16 or bfloat16",
                "store the scale in the type that the layer behind computes in",
            )


def scale_range(view: View) -> Iterator[Fault]:
    """The ends of a grid are numbers of the scale's type."""
    for node in _pairs(view):
        scale = view.array(node.input[1])
        if scale is None or scale.dtype != np.float16 or not np.isfinite(scale).all():
            continue
        end = 128 * float(scale.max())
        if end > _FLOAT16_MAX:
            yield Fault(
                view.label(node),
                f"its grid ends at {end:g}, beyond the largest float16",
                "build with --trt-base fp32",
            )


def activation_per_tensor(view: View) -> Iterator[Fault]:
    """One scale for an activation."""
    for node in _pairs(view):
        scale = view.array(node.input[1])
        if scale is not None and scale.size != 1 and not view.is_weight(node):
            yield Fault(
                view.label(node),
                f"got {scale.size} scales on an activation, expected one",
                "quantize activations per tensor",
            )


def weight_axis(view: View) -> Iterator[Fault]:
    """Weights have one scale, or one per output channel, along the right axis."""
    for layer, node in view.weighted_layers():
        scale, shape = view.array(node.input[1]), _shape(view, node.input[0])
        if scale is None or scale.size == 1 or shape is None or attribute(node, "block_size"):
            continue
        axis = attribute(node, "axis", 1) % len(shape)
        wanted = _output_axis(layer, len(shape))
        if axis != wanted or scale.ndim != 1 or scale.size != shape[wanted]:
            yield Fault(
                view.label(layer),
                f"its weight has scales of shape {list(scale.shape)} along axis {axis}, expected "
                f"{shape[wanted]} along axis {wanted}",
                "quantize weights per output channel",
            )


def block_shape(view: View) -> Iterator[Fault]:
    """Blocks run along one of the last two dimensions; scales have the weight's rank."""
    for node in _pairs(view):
        block = attribute(node, "block_size")
        scale, shape = view.array(node.input[1]), _shape(view, node.input[0])
        if not block or scale is None or shape is None:
            continue
        axis = attribute(node, "axis", 1) % len(shape)
        wanted = [math.ceil(d / block) if i == axis else d for i, d in enumerate(shape)]
        if axis < len(shape) - 2 or list(scale.shape) != wanted:
            yield Fault(
                view.label(node),
                f"got scales of shape {list(scale.shape)} for blocks of {block} along axis {axis} "
                f"of {list(shape)}, expected blocks along one of the last two axes and {wanted}",
                "write one scale per block of the input dimension",
            )


def _says_type(node: NodeProto) -> bool:
    return has_input(node, 2) or attribute(node, "output_dtype") != 0


def _pairs(view: View) -> list[NodeProto]:
    return view.of("QuantizeLinear", "DequantizeLinear")


def _output_axis(layer: NodeProto, rank: int) -> int:
    if layer.op_type == "Conv":
        return 0
    if layer.op_type == "ConvTranspose":
        return 1
    if layer.op_type == "Gemm":
        return 0 if attribute(layer, "transB") else 1
    return rank - 1


def _shape(view: View, name: str) -> tuple[int, ...] | None:
    tensor = view.tensors.get(name)
    return tuple(tensor.dims) if tensor is not None else None
