"""Look-ups that the rules share: an ONNX model in, producers, readers and constants by name out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class Fault:
    """What is wrong at a node, and what mends it."""

    node: str
    message: str
    mend: str


class View:
    """A model by name. Types are ONNX's `TensorProto.DataType`, 0 where they are unknown."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.tensors: dict[str, TensorProto] = {t.name: t for t in model.graph.initializer}
        self.producer: dict[str, NodeProto] = {}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.output:
                self.producer[name] = node
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in model.graph.output}
        self._types: dict[str, int] | None = None

    def of(self, *kinds: str) -> list[NodeProto]:
        """Return the nodes of these operators."""
        return [node for node in self.nodes if node.op_type in kinds]

    def label(self, node: NodeProto) -> str:
        """Return a name to find a node by: its own, or its operator and what it writes."""
        return node.name or f"{node.op_type} {node.output[0]!r}"

    def array(self, name: str) -> np.ndarray | None:
        """Return a constant, or None for what is computed."""
        tensor = self.tensors.get(name)
        if tensor is None:
            made = self.producer.get(name)
            if made is None or made.op_type != "Constant":
                return None
            values = [a.t for a in made.attribute if a.name == "value"]
            if not values:
                return None
            tensor = values[0]
        return numpy_helper.to_array(tensor)

    def type_of(self, name: str) -> int:
        """Return the element type of a value."""
        if name in self.tensors:
            return int(self.tensors[name].data_type)
        node = self.producer.get(name)
        if node is not None and node.op_type == "QuantizeLinear":
            return self.code_type(node)
        if node is not None and node.op_type == "DequantizeLinear":
            return self.type_of(node.input[1])
        if self._types is None:
            self._types = _infer(self.model)
        return self._types.get(name, 0)

    def code_type(self, node: NodeProto) -> int:
        """Return the type of the codes of a Q (as ONNX reads it) or of a DQ."""
        if node.op_type == "DequantizeLinear":
            return self.type_of(node.input[0])
        if has_input(node, 2):
            return self.type_of(node.input[2])
        return attribute(node, "output_dtype") or TensorProto.UINT8

    def is_weight(self, node: NodeProto) -> bool:
        """Report whether a Q or DQ works on a constant."""
        name = node.input[0]
        made = self.producer.get(name)
        while name not in self.tensors and made is not None:
            if made.op_type == "Constant":
                return True
            if made.op_type not in ("Cast", "QuantizeLinear"):
                return False
            name = made.input[0]
            made = self.producer.get(name)
        return name in self.tensors

    def weighted_layers(self) -> Iterator[tuple[NodeProto, NodeProto]]:
        """Yield layers with the DQ of their weight."""
        for layer in self.of(*LAYERS):
            node = self.dequantize(layer.input[1])
            if node is not None and self.is_weight(node):
                yield layer, node

    def dequantize(self, name: str) -> NodeProto | None:
        """Return the DQ that writes `name`, if one does."""
        node = self.producer.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def quantize(self, name: str) -> NodeProto | None:
        """Return the Q whose codes the DQ writing `name` reads."""
        pair = self.dequantize(name)
        node = self.producer.get(pair.input[0]) if pair is not None else None
        return node if node is not None and node.op_type == "QuantizeLinear" else None

    def unclipped(self, name: str) -> str:
        """Return the tensor in front of the float Clip that belongs to a quantizer."""
        node = self.producer.get(name)
        return node.input[0] if node is not None and node.op_type == "Clip" else name


def attribute(node: NodeProto, name: str, default: int = 0) -> int:
    """Return an integer attribute."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def has_input(node: NodeProto, index: int) -> bool:
    """Report whether an optional input is there."""
    return len(node.input) > index and node.input[index] != ""


def type_name(kind: int) -> str:
    """Return `int8` and the like."""
    return str(TensorProto.DataType.Name(kind)).lower() if kind else "an unknown type"


def _infer(model: ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    return {value.name: int(value.type.tensor_type.elem_type) for value in values}
