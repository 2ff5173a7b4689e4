"""A traced fx.Graph with its tensors in; values that no image and no parameter enters, computed.

Attention masks, coordinate grids and index tables are often built inside forward, some by writing
into slices of zeros. They are the same for every image, so they are run once here, as they stand.
What is computed from *parameters* stays in the graph: training must still reach it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from dfqc.compiler._aten import op_name
from dfqc.compiler.passes.clean import trace_memory, written_tensor

# They read the type of their first argument, not its values.
_TYPE_ONLY = ("new_zeros", "new_ones", "new_full", "new_empty")


def fold_constants(graph: fx.Graph, state: dict[str, torch.Tensor]) -> None:
    """Replace constant expressions by get_attr nodes, in place; adds the values to `state`.

    Works on graphs with mutation: constants are run in order, and each reader gets the value of
    its moment.
    """
    constant = _find_constants(graph, state)
    values: dict[fx.Node, Any] = {}
    stored: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node in constant:
            written = written_tensor(node)
            values[node] = _run(node, values, state)
            if written is not None:
                stored.clear()  # any name of this memory may have a new value
        else:
            for source in node.all_input_nodes:
                if source in constant and source.op != "get_attr":
                    if source not in stored:
                        stored[source] = _store(graph, node, values[source], state)
                    node.replace_input_with(source, stored[source])
    for node in reversed(list(graph.nodes)):
        if node in constant and not node.users:
            graph.erase_node(node)


def _find_constants(graph: fx.Graph, state: dict[str, torch.Tensor]) -> set[fx.Node]:
    """Find the nodes with fixed values, all of whose memory is written with fixed values only."""
    roots, _ = trace_memory(graph)
    tainted: set[fx.Node] = set()  # memory that something variable is written into
    while True:
        constant: set[fx.Node] = set()
        spoiled: set[fx.Node] = set()
        for node in graph.nodes:
            fixed = _is_fixed(node, constant, state) and not roots[node] & tainted
            written = written_tensor(node)
            if fixed and not (written is not None and _is_state(roots[written])):
                constant.add(node)
            elif written is not None:
                spoiled |= roots[written]
        if spoiled <= tainted:
            return _with_tensor_results(constant)
        tainted |= spoiled


def _is_fixed(node: fx.Node, constant: set[fx.Node], state: dict[str, torch.Tensor]) -> bool:
    if node.op == "get_attr":
        return not isinstance(state[str(node.target)], nn.Parameter)
    if node.op != "call_function":
        return False
    inputs = node.all_input_nodes
    if isinstance(node.target, OpOverload):
        if torch.Tag.nondeterministic_seeded in node.target.tags or op_name(node) == "dropout":
            return False
        if op_name(node) in _TYPE_ONLY:
            inputs = [n for n in inputs if n is not node.args[0]]
    elif not inputs:
        return False
    return all(n in constant for n in inputs)


def _is_state(memory: frozenset[fx.Node]) -> bool:
    return any(n.op == "get_attr" for n in memory)


def _with_tensor_results(constant: set[fx.Node]) -> set[fx.Node]:
    """Leave constants that a variable node reads and that are no tensors to the graph."""
    return {
        node
        for node in constant
        if node.op == "get_attr"
        or isinstance(node.meta.get("val"), torch.Tensor)
        or all(user in constant for user in node.users)
    }


def _run(node: fx.Node, values: dict[fx.Node, Any], state: dict[str, torch.Tensor]) -> Any:
    if node.op == "get_attr":
        return state[str(node.target)]
    args, kwargs = node.args, node.kwargs
    if op_name(node) in _TYPE_ONLY and node.args[0] not in values:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        args = (torch.empty(0, dtype=source.meta["val"].dtype), *args[1:])
    assert callable(node.target)
    with torch.no_grad():
        return node.target(
            *fx.map_arg(args, values.__getitem__), **fx.map_arg(kwargs, values.__getitem__)
        )


def _store(
    graph: fx.Graph, reader: fx.Node, value: torch.Tensor, state: dict[str, torch.Tensor]
) -> fx.Node:
    count = sum(name.startswith("constant_") for name in state)
    while f"constant_{count}" in state:
        count += 1
    name = f"constant_{count}"
    state[name] = value.detach().clone().contiguous()
    with graph.inserting_before(reader):
        node = graph.create_node("get_attr", name)
    node.meta["val"] = state[name]
    return node
