"""Which kernel runs each layer: stored and optimized ONNX models in, kernel names out.

ONNX Runtime renames values and nodes while it fuses them, so a layer is followed by three traces,
the surest first: the names of its weight, the name of its node, the values behind it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto

from dfqc.compiler.errors import LoadError

INTEGER_KERNELS = frozenset(
    {
        "ConvInteger",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
MISSING = "not found in the optimized graph"

_COMPUTE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# What the runtime may make of them; anything else that reads a weight only passes it on.
_KERNELS = INTEGER_KERNELS | _COMPUTE | {"FusedConv", "FusedGemm", "FusedMatMul", "MatMulNBits"}
# Ops that a float kernel may absorb behind it, so that its output bears their name.
_ABSORBED = frozenset({"Add", "Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})


def kernels(stored: ModelProto, optimized: ModelProto, layers: Mapping[str, str]) -> dict[str, str]:
    """Return the kernel of each layer: `QLinearConv`, `QGemm`, `Conv (float)` ….

    `layers` maps module paths to the values that the layers compute in `stored`. A layer without a
    trace in `optimized` is `MISSING`; a value that `stored` does not have is a `LoadError`.
    """
    before, after = _index(stored.graph), _index(optimized.graph)
    found = {}
    for path, value in layers.items():
        if value not in before.producer:
            raise LoadError(
                f"{path}: value {value!r} is computed by no node of the model; the name map and "
                "the model do not belong together"
            )
        node = _find_kernel(before, after, value)
        found[path] = _label(node) if node else MISSING
    return found


def census(model: ModelProto) -> Counter[str]:
    """Count the nodes by operator; operators outside of ONNX bear their domain."""
    return Counter(_qualified(node) for node in model.graph.node)


def is_integer(kernel: str) -> bool:
    """Report whether a kernel name of `kernels` multiplies integers."""
    return kernel in INTEGER_KERNELS


@dataclass(frozen=True)
class _Index:
    """A graph by value name: who makes a value, who reads it, which are constants."""

    nodes: list[NodeProto]
    producer: dict[str, NodeProto]
    consumers: dict[str, list[NodeProto]]
    constants: frozenset[str]


def _index(graph: GraphProto) -> _Index:
    producer: dict[str, NodeProto] = {}
    consumers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        producer.update(dict.fromkeys(node.output, node))
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    constants = frozenset(tensor.name for tensor in graph.initializer)
    return _Index(list(graph.node), producer, consumers, constants)


def _find_kernel(before: _Index, after: _Index, value: str) -> NodeProto | None:
    layer = _layer_node(before, value)
    if layer is None:
        return None
    hits = list(_readers_of_weight(before, after, layer))
    if len(hits) == 1:
        return hits[0]
    # None: the weight was repacked. Several: layers share it. The name of the node decides.
    named = [n for n in hits or after.nodes if _is_kernel(n) and _same_name(n.name, layer.name)]
    if named:
        return named[0]
    return None if hits else _by_value(before, after, layer)


def _layer_node(before: _Index, value: str) -> NodeProto | None:
    """Walk up from a layer's value (perhaps behind its bias add) to its convolution or matmul."""
    queue = [value]
    for name in queue:
        node = before.producer.get(name)
        if node is None:
            continue
        if node.op_type in _COMPUTE:
            return node
        queue += [n for n in node.input if n not in queue]
    return None


def _readers_of_weight(before: _Index, after: _Index, layer: NodeProto) -> Iterator[NodeProto]:
    """Yield the kernels of the optimized graph that read the weight under any of its names."""
    names = _weight_names(before, layer)
    for name in names:
        for node in after.consumers.get(name, ()):
            if _is_kernel(node):
                yield node
            else:  # a DequantizeLinear that stayed, a transpose: the weight goes on behind it
                names += [n for n in node.output if n not in names]


def _weight_names(before: _Index, layer: NodeProto) -> list[str]:
    """Return the names that the weight bears on its way from the initializer to the layer."""
    for start in reversed(layer.input[:2]):  # a MatMul may have it on either side
        names = [start]
        while names[-1] in before.producer:
            names.append(before.producer[names[-1]].input[0])
        if names[-1] in before.constants:
            return names
    return []


def _same_name(name: str, stored: str) -> bool:
    """Report whether `name` is `stored`, or what a rewrite of the runtime made of it."""
    return bool(stored) and re.fullmatch(re.escape(stored) + r"(_token_\d+|/.*)*", name) is not None


def _by_value(before: _Index, after: _Index, layer: NodeProto) -> NodeProto | None:
    """Find a float kernel by its output, or that of an activation it absorbed."""
    kernels_by_output = {n.output[0]: n for n in after.nodes if _is_kernel(n)}
    blocked = {n.name.removesuffix("_nchwc"): n for n in after.nodes if n.name.endswith("_nchwc")}
    value: str | None = layer.output[0]
    while value is not None:
        node = kernels_by_output.get(value) or blocked.get(value)
        if node is not None:
            return node
        readers = before.consumers.get(value, [])
        absorbed = len(readers) == 1 and readers[0].op_type in _ABSORBED
        value = readers[0].output[0] if absorbed else None
    return None


def _is_kernel(node: NodeProto) -> bool:
    return node.op_type in _KERNELS


def _label(node: NodeProto) -> str:
    return node.op_type if node.op_type in INTEGER_KERNELS else f"{node.op_type} (float)"


def _qualified(node: NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type
