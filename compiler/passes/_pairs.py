"""Pairs of layers between which a channel's scale can move: an unfolded graph in, `Pair`s out.

Between the two stand only operators that leave channels apart and commute with a positive factor
per channel, each read by nobody else: a batch norm right behind the first layer, ReLU and leaky
ReLU, zero and edge padding, pooling, global means, flattening.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import fx, nn

from dfqc.compiler._aten import argument, pair
from dfqc.compiler.graph import NORM_TYPES, Graph, node_shapes
from dfqc.compiler.operators import CLIP, CONSTANT_PAD, PAD, RELU
from dfqc.compiler.passes._layers import as_layer, count_calls, readers

Norm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d

_aten = torch.ops.aten
_LEAKY = _aten.leaky_relu.default
_MAX_POOL, _AVG_POOL = _aten.max_pool2d.default, _aten.avg_pool2d.default
_FLATTEN = (_aten.flatten.using_ints, _aten.reshape.default)
_MEANS = (_aten.mean.dim, _aten.adaptive_avg_pool2d.default)
_KEPT_SHAPE = (RELU, _LEAKY, CLIP)


@dataclass(frozen=True)
class Pair:
    """Two layers by module path, and what stands between them.

    `norm` is the batch norm right behind the first layer. Input channels of the second layer are
    those of the first, each `spread` times in a row (a map that was flattened). `clips` are the
    nodes that clip to 0 .. cap: with them, factors do not commute.
    """

    first: str
    second: str
    norm: str | None
    spread: int
    activations: tuple[Any, ...]  # operators
    clips: tuple[str, ...]
    shifts_pass: bool  # a constant per channel goes through unchanged, activations aside


def find_pairs(graph: Graph) -> list[Pair]:
    """List the pairs of an unfolded graph in the order their first layers run."""
    calls, shapes = count_calls(graph), node_shapes(graph, batch=2)
    found = (_follow(graph, node, calls, shapes) for node in graph.module.graph.nodes)
    return [one for one in found if one is not None]


def _follow(
    graph: Graph, node: fx.Node, calls: Counter[str], shapes: Mapping[str, tuple[int, ...]]
) -> Pair | None:
    """Walk down from a layer to the next one; None if something between them is in the way."""
    layer = as_layer(graph, node, calls)
    if layer is None or not _same_axis(layer, shapes[node.name]):
        return None
    first, norm = node, _norm_behind(graph, node, calls)
    node = norm or node
    spread, shifts_pass = 1, True
    activations: list[Any] = []
    clips: list[str] = []
    while True:
        users = readers(node)
        if len(users) != 1:
            return None
        node = users[0]
        second = as_layer(graph, node, calls)
        if second is not None:
            break
        factor = _widening(node, shapes)
        if factor is None:
            return None
        spread *= factor
        shifts_pass &= _passes_shift(node)
        if node.target in _KEPT_SHAPE:
            activations.append(node.target)
        if node.target is CLIP:
            clips.append(node.name)
    if not _same_axis(second, shapes[cast(fx.Node, node.args[0]).name]):
        return None
    name = None if norm is None else str(norm.target)
    chain = (tuple(activations), tuple(clips), shifts_pass)
    return Pair(str(first.target), str(node.target), name, spread, *chain)


def _norm_behind(graph: Graph, node: fx.Node, calls: Counter[str]) -> fx.Node | None:
    """Return the batch norm that alone reads a layer and runs once."""
    users = readers(node)
    if len(users) != 1 or users[0].op != "call_module" or calls[str(users[0].target)] != 1:
        return None
    module = graph.module.get_submodule(str(users[0].target))
    return users[0] if isinstance(module, NORM_TYPES) else None


def _widening(node: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return how often an operator repeats each channel in a row; None if it is in the way."""
    if node.op != "call_function" or not node.args:
        return None
    target, source = node.target, node.args[0]
    if not isinstance(source, fx.Node) or source.name not in shapes or node.name not in shapes:
        return None
    before, after = shapes[source.name], shapes[node.name]
    if target in (RELU, _MAX_POOL, _AVG_POOL):
        return 1
    if target is _LEAKY:
        return 1 if (argument(node, 1) or 0) >= 0 else None
    if target is CLIP:
        return 1 if argument(node, 1) == 0 and argument(node, 2) > 0 else None
    if target in (PAD, CONSTANT_PAD):
        return 1 if before[:2] == after[:2] and _pads_zero(node) else None
    if target in _MEANS:
        kept = before[:2] == after[:2] and len(before) == 4
        return 1 if kept and _averages_maps(node) else None
    if target in _FLATTEN and len(before) == 4 and len(after) == 2 and before[0] == after[0]:
        return before[2] * before[3]
    return None


def _pads_zero(node: fx.Node) -> bool:
    if node.target is CONSTANT_PAD:
        return bool(argument(node, 2) == 0)
    return argument(node, 2) != "constant" or argument(node, 3) in (None, 0)


def _averages_maps(node: fx.Node) -> bool:
    if node.target is not _aten.mean.dim:
        return True
    axes = {int(axis) % 4 for axis in cast("list[int]", argument(node, 1))}
    return axes <= {2, 3}


def _passes_shift(node: fx.Node) -> bool:
    """Report whether a constant per channel comes through unchanged; activations aside."""
    if node.target in (PAD, CONSTANT_PAD):
        return False
    if node.target is not _AVG_POOL:
        return True
    return argument(node, 6) is None and not any(pair(argument(node, 3) or 0))


def _same_axis(layer: nn.Module, shape: tuple[int, ...]) -> bool:
    """Report whether channels are where the layer has its features."""
    return len(shape) == (2 if isinstance(layer, nn.Linear) else 4)
