"""An fx graph of ATen calls in; operator names, arguments and what carries image data out."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

# Pointwise operators that ATen does not tag as such.
_POINTWISE = ("hardswish", "prelu")


def op_name(node: fx.Node) -> str:
    """Return the name without overload, `relu_` for `aten.relu_.default`; empty for no operator."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return ""
    return str(node.target._schema.name).rpartition("::")[2]


def argument(node: fx.Node, position: int) -> Any:
    """Return an argument by schema position, wherever the call put it, or its default."""
    if position < len(node.args):
        return node.args[position]
    assert isinstance(node.target, OpOverload)
    declared = node.target._schema.arguments[position]
    if declared.name in node.kwargs:
        return node.kwargs[declared.name]
    return declared.default_value if declared.has_default_value() else None


def is_pointwise(node: fx.Node) -> bool:
    """Report whether an operator computes every output value from its values at one position."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or op_name(node) in _POINTWISE


def rank(node: Any) -> int | None:
    """Return the number of axes of a traced tensor, None if its shape is not known."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else None


def pair(value: Any) -> tuple[int, int]:
    """Return (height, width) of an argument that may be one number, or a list of one or two."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return (int(values[0]), int(values[-1]))


def data_nodes(graph: fx.Graph) -> list[fx.Node]:
    """List the nodes that depend on the image's values: no constants, no size arithmetic."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        depends = any(n in found for n in node.all_input_nodes)
        if node.op == "placeholder" or (depends and not _computes_size(node)):
            found[node] = None
    return list(found)


def _computes_size(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if isinstance(node.target, OpOverload):
        return op_name(node).startswith("sym_")
    return True
