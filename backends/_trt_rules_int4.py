"""Rules on INT4: for weights of products alone, two to a byte, read by DQ."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onnx import TensorProto

from dfqc.backends._trt_view import CONVOLUTIONS, Fault, View


def int4_even(view: View) -> Iterator[Fault]:
    """INT4 tensors have an even number of elements."""
    for name, shape in _int4(view):
        if math.prod(shape) % 2:
            yield Fault(
                name,
                f"got {math.prod(shape)} INT4 elements, expected an even number",
                "store this weight as int8 codes",
            )


def int4_last_even(view: View) -> Iterator[Fault]:
    """The parser of 10.1 wanted the last dimension even."""
    for name, shape in _int4(view):
        if shape and shape[-1] % 2 and math.prod(shape) % 2 == 0:
            yield Fault(
                name,
                f"its last dimension is {shape[-1]}, expected an even one before TensorRT 10.2",
                "use a newer TensorRT, or store this weight as int8 codes",
            )


def int4_reader(view: View) -> Iterator[Fault]:
    """INT4 constants are read by DQ, not by a Cast."""
    for name, _ in _int4(view):
        for node in view.readers.get(name, ()):
            if node.op_type != "DequantizeLinear":
                yield Fault(
                    view.label(node),
                    f"{node.op_type} reads the INT4 tensor {name!r}, expected DequantizeLinear",
                    "store the codes as int8, or dequantize INT4 in blocks",
                )


def int4_activation(view: View) -> Iterator[Fault]:
    """No Q writes INT4."""
    for node in view.of("QuantizeLinear"):
        if view.code_type(node) == TensorProto.INT4 and not view.is_weight(node):
            yield Fault(
                view.label(node),
                "quantizes an activation to INT4, which is for weights only",
                "write int8 codes behind a float Clip to the narrow grid",
            )


def int4_conv(view: View) -> Iterator[Fault]:
    """No convolution has INT4 weights."""
    for layer, node in view.weighted_layers():
        if layer.op_type in CONVOLUTIONS and view.code_type(node) == TensorProto.INT4:
            yield Fault(
                view.label(layer),
                "a convolution with INT4 weights, for which TensorRT has no kernel",
                "store the codes as int8: they keep the narrow grid",
            )


def int4_beside_codes(view: View) -> Iterator[Fault]:
    """INT4 weights go with float activations."""
    for layer, node in view.weighted_layers():
        if view.code_type(node) != TensorProto.INT4 or layer.op_type in CONVOLUTIONS:
            continue
        if view.dequantize(layer.input[0]) is not None:
            yield Fault(
                view.label(layer),
                "INT4 weights beside quantized activations: the product is computed in float",
                "store the weight as int8 codes, or leave the activation in float (w4a16)",
            )


def _int4(view: View) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (name, tuple(tensor.dims))
        for name, tensor in view.tensors.items()
        if tensor.data_type == TensorProto.INT4
    ]
