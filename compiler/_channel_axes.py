"""A node that moves, keeps or reduces axes in; the channel axis of what it puts out.

Rules by ATen name; each returns the layout of the output, or freezes the channels that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from dfqc.compiler._aten import argument, op_name
from dfqc.compiler._channel_spans import Layout, Site, Value, follow

if TYPE_CHECKING:
    from dfqc.compiler._channel_walk import Walk

_aten = torch.ops.aten


def _keep(walk: Walk, node: fx.Node) -> Value:
    """The operator leaves the axis and the channels apart."""
    x = walk.layout(node.args[0])
    if x is None or walk.rank(node) != walk.rank(node.args[0]):
        return walk.lose(node, f"{node.name} mixes or moves channels")
    return Layout(x.axis, follow(x.spans, node))


def _pool(walk: Walk, node: fx.Node) -> Value:
    x = walk.layout(node.args[0])
    if x is None or x.axis != 1 or walk.rank(node) != 4:
        return walk.lose(node, f"{node.name} mixes channels")
    return _keep(walk, node)


def _pad(walk: Walk, node: fx.Node) -> Value:
    x, widths = walk.layout(node.args[0]), cast("list[Any]", argument(node, 1))
    if x is None:
        return walk.lose(node, f"{node.name} reads a tensor that is not followed")
    at = 2 * (walk.rank(node) - 1 - x.axis)
    if any(width != 0 for width in widths[at : at + 2]):
        return walk.lose(node, f"{node.name} adds channels")
    return _keep(walk, node)


def _permute(walk: Walk, node: fx.Node) -> Value:
    x, rank = walk.layout(node.args[0]), walk.rank(node)
    order = list(range(rank))
    if op_name(node) == "transpose":
        a, b = (argument(node, i) % rank for i in (1, 2))
        order[a], order[b] = order[b], order[a]
    else:
        order = [axis % rank for axis in argument(node, 1)]
    assert x is not None
    return Layout(order.index(x.axis), follow(x.spans, node))


def _reshape(walk: Walk, node: fx.Node) -> Value:
    """Row-major: an axis may take in axes behind it; `spread` says how many values."""
    x = walk.layout(node.args[0])
    assert x is not None
    before, after = walk.shape(node.args[0]), walk.shape(node)
    size = before[x.axis]
    for axis, length in enumerate(after):
        same = math.prod(after[:axis]) == math.prod(before[: x.axis])
        if same and size > 1 and length % size == 0:
            break
    else:
        return walk.lose(node, f"{node.name} splits or merges channels")
    factor = length // size
    spans = tuple(s._replace(spread=s.spread * factor) for s in follow(x.spans, node))
    return _resize(walk, node, Layout(axis, spans))


def _resize(walk: Walk, node: fx.Node, layout: Layout) -> Value:
    """Note the channel count in the list of sizes that the node was given."""
    sizes = argument(node, 1) if op_name(node) in ("reshape", "expand") else None
    if isinstance(sizes, (list, tuple)) and sizes[layout.axis] != -1:
        if not isinstance(sizes[layout.axis], int):
            return walk.lose(node, f"{node.name} computes with the number of channels")
        for span, offset in walk.offsets(layout):
            site = Site("size", node.name, span.spread, offset, layout.axis)
            walk.sites.append((span.atom, site))
    return layout


def _expand(walk: Walk, node: fx.Node) -> Value:
    x, source = walk.layout(node.args[0]), node.args[0]
    if x is None or walk.rank(node) != walk.rank(source):
        return walk.lose(node, f"{node.name} moves channels")
    if walk.shape(node)[x.axis] != walk.shape(source)[x.axis]:
        return walk.lose(node, f"{node.name} repeats channels")
    if op_name(node) == "expand_as":
        return walk.combine(node)
    return _resize(walk, node, Layout(x.axis, follow(x.spans, node)))


def _reduce(walk: Walk, node: fx.Node) -> Value:
    x, rank = walk.layout(node.args[0]), walk.rank(node.args[0])
    known = node.target in (_aten.mean.dim, _aten.sum.dim_IntList, _aten.amax.default)
    given = argument(node, 1) if known else None
    axes = {axis % rank for axis in (given if isinstance(given, (list, tuple)) else [])}
    if x is None or not axes or x.axis in axes:
        return walk.lose(node, f"{node.name} mixes channels")
    gone = 0 if argument(node, 2) else sum(axis < x.axis for axis in axes)
    return Layout(x.axis - gone, follow(x.spans, node))


def _softmax(walk: Walk, node: fx.Node) -> Value:
    x = walk.layout(node.args[0])
    if x is None or argument(node, 1) % walk.rank(node) == x.axis:
        return walk.lose(node, f"{node.name} mixes channels")
    return _keep(walk, node)


def _slice(walk: Walk, node: fx.Node) -> Value:
    x = walk.layout(node.args[0])
    if x is None or walk.shape(node)[x.axis] != walk.shape(node.args[0])[x.axis]:
        return walk.lose(node, f"{node.name} picks channels")
    return _keep(walk, node)


def _split(walk: Walk, node: fx.Node) -> Value:
    x = walk.layout(node.args[0])
    if x is None or argument(node, 2) % walk.rank(node.args[0]) == x.axis:
        return walk.lose(node, f"{node.name} splits channels")
    parts = 1 + max(
        (cast(int, u.args[1]) for u in node.users if u.op == "call_function"), default=0
    )
    return [Layout(x.axis, follow(x.spans, node))] * parts


RULES: Mapping[str, Callable[[Walk, fx.Node], Value]] = {
    **dict.fromkeys(("clone", "contiguous", "dropout", "detach", "alias"), _keep),
    **dict.fromkeys(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"), _pool),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d"), _pool),
    **dict.fromkeys(("reshape", "flatten", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("permute", "transpose"), _permute),
    **dict.fromkeys(("expand", "expand_as"), _expand),
    **dict.fromkeys(("mean", "sum", "amax"), _reduce),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), _split),
    "softmax": _softmax,
    "slice": _slice,
    "cat": lambda walk, node: walk.concatenate(node),
    "pad": _pad,
}
