"""A traced fx.Graph in; the same function without mutation, dropout, no-ops and dead nodes out."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping

import torch
from torch import fx
from torch._ops import OpOverload

from dfqc.compiler._aten import argument, op_name
from dfqc.compiler._blame import blame_node
from dfqc.compiler.errors import UnsupportedError

aten = torch.ops.aten

# Composite operators that may return their input although their schema does not say so.
_MAY_RETURN_INPUT = {"dropout", "feature_dropout", "alpha_dropout", "type_as", "broadcast_tensors"}
_DROPOUT = {
    "dropout": (1, 2),  # positions of p and train
    "dropout_": (1, 2),
    "feature_dropout": (1, 2),
    "feature_dropout_": (1, 2),
    "alpha_dropout": (1, 2),
    "alpha_dropout_": (1, 2),
    "native_dropout": (1, 2),
}
_COPIES = {"contiguous", "clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "positive"}
_CASTS = {"to", "_to_copy", "type_as", "_to_dense"}


class AliasConflictError(Exception):
    """A mutation is seen through another view: this rewriting cannot tell the new value."""


def clean(graph: fx.Graph) -> None:
    """Make `graph` functional and free of dropout, no-ops and dead nodes, in place.

    Raises `AliasConflictError` if a mutation cannot be followed (nothing is changed then), and
    `UnsupportedError` for active dropout and for state that forward changes.
    """
    functionalize(graph)
    remove_dropout(graph)
    remove_noops(graph)
    remove_dead(graph)


def functionalize(graph: fx.Graph) -> None:
    """Replace every in-place operator by its functional form; later readers see the new value.

    A reader of the mutated tensor, by any of its names, after the mutation reads the new value.
    When a *different* view of the same memory is read afterwards, `AliasConflictError` is raised.
    """
    mutations = [n for n in graph.nodes if written_tensor(n) is not None]
    if not mutations:
        return
    order = {node: i for i, node in enumerate(graph.nodes)}
    roots, same = trace_memory(graph)
    for node in mutations:
        _check_mutation(node, order, roots, same)
    current: dict[fx.Node, fx.Node] = {}  # tensor -> the node that holds its value now
    pending = set(mutations)
    for node in list(graph.nodes):
        _rewire(node, lambda n: current.get(same[n], n))
        if node in pending:
            current[same[node]] = _replace_by_functional(graph, node)
    for node in reversed(mutations):
        graph.erase_node(node)


def remove_dropout(graph: fx.Graph) -> None:
    """Replace dropout that is off by its input."""
    for node in list(graph.nodes):
        position = _DROPOUT.get(op_name(node))
        if position is None:
            continue
        p, train = (argument(node, i) for i in position)
        if train and p:
            raise UnsupportedError(
                f"{node.target}{blame_node(node)}: dropout with p={p} is active, expected a model "
                "in eval mode; call model.eval() before exporting"
            )
        if op_name(node) == "native_dropout":
            _bypass_outputs(graph, node)
        else:
            _bypass(graph, node)


def remove_noops(graph: fx.Graph) -> None:
    """Replace copies, casts to the same type and full slices by their input.

    Needs a functional graph: a copy is a no-op only where nobody writes.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and _is_noop(node):
            _bypass(graph, node)


def remove_dead(graph: fx.Graph) -> None:
    """Erase every node that the output does not depend on (needs a functional graph)."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def written_tensor(node: fx.Node) -> fx.Node | None:
    """Return the tensor an in-place operator writes to."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    if not node.target._schema.is_mutable:
        return None
    for i, declared in enumerate(node.target._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            value = argument(node, i)
            if isinstance(value, fx.Node):
                return value
    return None


def trace_memory(
    graph: fx.Graph,
) -> tuple[dict[fx.Node, frozenset[fx.Node]], dict[fx.Node, fx.Node]]:
    """Give each node the nodes whose memory it may share, and the tensor it is another name of."""
    roots: dict[fx.Node, frozenset[fx.Node]] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        shared = [roots[n] for n in _aliased_inputs(node)]
        roots[node] = frozenset().union(*shared) if shared else frozenset({node})
        written = written_tensor(node)
        same[node] = same[written] if written is not None else node
    return roots, same


def _aliased_inputs(node: fx.Node) -> list[fx.Node]:
    if node.target is operator.getitem or op_name(node) in _MAY_RETURN_INPUT:
        return node.all_input_nodes
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return []
    schema = node.target._schema
    if all(r.alias_info is None for r in schema.returns):
        return []
    found: list[fx.Node] = []
    for i, declared in enumerate(schema.arguments):
        if declared.alias_info is not None:
            fx.map_arg(argument(node, i), found.append)
    return found


def _check_mutation(
    node: fx.Node,
    order: Mapping[fx.Node, int],
    roots: Mapping[fx.Node, frozenset[fx.Node]],
    same: Mapping[fx.Node, fx.Node],
) -> None:
    """Refuse a mutation whose effect is visible through another name than its own."""
    written = written_tensor(node)
    assert written is not None
    for state in roots[written]:
        if state.op == "get_attr":
            raise UnsupportedError(
                f"{node.target}{blame_node(node)}: changes the model's {state.target!r} while it "
                "runs; expected a pure function of the image: call model.eval() before exporting"
            )
    if _functional_form(node) is None:
        raise AliasConflictError(f"{node.target}")
    for other, memory in roots.items():
        if order[other] >= order[node] or same[other] is same[written]:
            continue
        if memory & roots[written] and any(order[user] > order[node] for user in other.users):
            raise AliasConflictError(f"{node.target}: {other.name} is read after {node.name}")


def _functional_form(node: fx.Node) -> OpOverload | None:
    """Return `aten.relu.default` for `aten.relu_.default`; None if there is no such operator."""
    assert isinstance(node.target, OpOverload)
    name = op_name(node)
    if not name.endswith("_") or not hasattr(aten, name[:-1]):
        return None
    form = getattr(getattr(aten, name[:-1]), node.target._overloadname, None)
    return form if isinstance(form, OpOverload) and not form._schema.is_mutable else None


def _replace_by_functional(graph: fx.Graph, node: fx.Node) -> fx.Node:
    form = _functional_form(node)
    assert form is not None
    with graph.inserting_after(node):
        new = graph.create_node("call_function", form, node.args, node.kwargs)
    new.meta.update(node.meta)
    return new


def _rewire(node: fx.Node, change: Callable[[fx.Node], fx.Node]) -> None:
    node.args = fx.map_arg(node.args, change)
    node.kwargs = fx.map_arg(node.kwargs, change)


def _is_noop(node: fx.Node) -> bool:
    name = op_name(node)
    if name in _COPIES:
        return True
    if name in _CASTS:
        source = node.args[0]
        return isinstance(source, fx.Node) and _same_type(source, node)
    if name == "slice":
        start, end, step = (argument(node, i) for i in (2, 3, 4))
        return start in (0, None) and end in (None, sys.maxsize) and step in (1, None)
    if name in ("pad", "constant_pad_nd"):
        widths = node.args[1]
        return isinstance(widths, (list, tuple)) and all(w == 0 for w in widths)
    return False


def _same_type(a: fx.Node, b: fx.Node) -> bool:
    before, after = a.meta.get("val"), b.meta.get("val")
    return (
        isinstance(before, torch.Tensor)
        and isinstance(after, torch.Tensor)
        and before.dtype == after.dtype
    )


def _bypass(graph: fx.Graph, node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    graph.erase_node(node)


def _bypass_outputs(graph: fx.Graph, node: fx.Node) -> None:
    """Replace the first output of an operator with several; the mask must be unused."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    for item in list(node.users):
        if item.target is operator.getitem and item.args[1] == 0:
            item.replace_all_uses_with(source)
            graph.erase_node(item)
