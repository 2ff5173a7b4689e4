"""The unquantized rest of a QDQ model in float16: a float32 model in, the same in float16 out.

Inputs and outputs stay float32, with a Cast behind the one and in front of the other. Scales become
float16 too: a strongly typed engine computes in the type of the scales.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
_TYPED = {"Cast": "to"}  # operators that name their output's type
_TENSORS = {"Constant": "value", "ConstantOfShape": "value"}


def to_half(model: ir.Model) -> None:
    """Rewrite a model in place."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.const_value is not None and value.const_value.dtype == FLOAT:
            _convert_initializer(graph, value)
    nodes = list(graph)
    for node in nodes:
        _convert_attributes(node)
        for value in node.outputs:
            if value.dtype == FLOAT:
                value.dtype = HALF
    _cast_inputs(graph)
    _cast_outputs(graph)


def halved(model: onnx.ModelProto) -> bytes:
    """Return a float32 model in float16: what a deployment without integers would run."""
    found = ir.serde.deserialize_model(model)
    to_half(found)
    data: bytes = ir.serde.serialize_model(found).SerializeToString()
    return data


def half(array: np.ndarray) -> np.ndarray:
    """Return float16; what is too large or too small for it becomes the largest or smallest."""
    wide = array.astype(np.float32)
    finite = np.where(np.isfinite(wide), np.clip(wide, -_LARGEST, _LARGEST), wide)
    narrow: np.ndarray = finite.astype(np.float16)
    lost = (narrow == 0) & (wide != 0)  # a scale of zero would be refused
    narrow[lost] = np.copysign(np.float16(_SMALLEST), wide[lost])
    return narrow


def _convert_initializer(graph: ir.Graph, value: ir.Value) -> None:
    """Convert a constant; readers that want float32 by ONNX's definition keep theirs."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    kept = [use for use in value.uses() if use.node.op_type == "Resize" and use.idx in (1, 2)]
    if kept and len(kept) == len(list(value.uses())):
        return
    if kept:
        name = f"{value.name}.f32"
        single = ir.Value(
            name=name,
            type=ir.TensorType(FLOAT),
            shape=value.shape,
            const_value=ir.tensor(array, name=name),
        )
        graph.register_initializer(single)
        for use in kept:
            use.node.replace_input_with(use.idx, single)
    value.const_value = ir.tensor(half(array), name=value.name)
    value.dtype = HALF


def _convert_attributes(node: ir.Node) -> None:
    name = _TYPED.get(node.op_type)
    if name and node.attributes[name].as_int() == FLOAT:
        node.attributes[name] = ir.AttrInt64(name, int(HALF))
    name = _TENSORS.get(node.op_type)
    if name and name in node.attributes:
        tensor = node.attributes[name].as_tensor()
        if tensor.dtype == FLOAT:
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(half(tensor.numpy())))
    elif node.op_type == "ConstantOfShape":  # float32 zeros unless it says otherwise
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.zeros(1, np.float16)))


def _cast_inputs(graph: ir.Graph) -> None:
    for value in graph.inputs:
        if value.dtype != FLOAT:
            continue
        readers = list(value.uses())
        cast = ir.node("Cast", [value], {"to": HALF})
        cast.outputs[0].dtype = HALF
        cast.outputs[0].shape = value.shape
        for use in readers:
            use.node.replace_input_with(use.idx, cast.outputs[0])
        first = next(node for node in graph)
        graph.insert_before(first, [cast])


def _cast_outputs(graph: ir.Graph) -> None:
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype != HALF:
            continue
        cast = ir.node("Cast", [value], {"to": FLOAT})
        output, name = cast.outputs[0], value.name
        value.name = f"{name}.f16"
        output.name, output.dtype, output.shape = name, FLOAT, value.shape
        graph.append(cast)
        graph.outputs[index] = output
