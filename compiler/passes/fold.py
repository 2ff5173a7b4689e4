"""A graph with batch norms in, an equal graph with them folded into the layers beside them out.

Four rewrites, each exact in real arithmetic and computed in double precision:

1. layer -> batch norm: `W' = W * a`, `b' = b * a + c` per output channel, where
   `a = gamma / sqrt(var + eps)` and `c = beta - mean * a`. What leaves channels apart may stand
   between the two: average pooling without padding, max pooling if no `a` is negative, and
   merging the axes before a linear's features.
2. batch norm -> layers: `W' = W * a` per input channel, `b' = b + sum(W * c)`. With zero padding
   this is exact only if `c` is zero: the padding is added after the batch norm.
3. constant zero padding, the same on both sides -> the padding of the convolutions that follow.
4. `nn.Identity` and padding by nothing never reach this pass: they leave no node in the graph.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import fx, nn

from dfqc.compiler._aten import argument, pair
from dfqc.compiler.graph import Graph, Norm, batch_norms, copy_graph, node_shapes
from dfqc.compiler.passes._layers import (
    Layer,
    as_layer,
    assign,
    bias_or_zero,
    count_calls,
    norm_affine,
    readers,
    scale_outputs,
    sees_no_border,
    spread_inputs,
    sum_shift,
)

log = logging.getLogger(__name__)

aten = torch.ops.aten

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def fold(graph: Graph) -> Graph:
    """Return a copy with every batch norm folded that can be; the others stay, in eval mode."""
    graph = copy_graph(graph)
    calls = count_calls(graph)
    shapes = node_shapes(graph, batch=2)
    folded = left = pads = 0
    for node in list(graph.module.graph.nodes):
        pads += _fold_padding(graph, node, calls)
    for norm in batch_norms(graph):
        if _fold_into_producer(graph, norm, calls, shapes) or _fold_into_consumers(
            graph, norm, calls, shapes
        ):
            folded += 1
        else:
            left += 1
    graph.module.delete_all_unused_submodules()
    graph.module.graph.lint()
    graph.module.recompile()
    log.info("fold: %d batch norms folded, %d left; %d paddings folded", folded, left, pads)
    return graph


def _fold_into_producer(graph: Graph, norm: Norm, calls: Counter[str], shapes: Shapes) -> bool:
    """Case 1: the batch norm alone reads a layer that runs once."""
    scale, shift = norm_affine(norm.module)
    features = cast(fx.Node, norm.node.args[0])  # another one once the norm before was folded
    source = _skip_neutral(features, scale, shapes)
    layer = as_layer(graph, source, calls)
    if layer is None or len(readers(source)) != 1:
        return False
    if not _shares_channels(layer, features, shapes):
        return False
    weight = layer.weight.double()
    assign(
        layer, scale_outputs(layer, weight, scale), bias_or_zero(layer, len(scale)) * scale + shift
    )
    _remove(graph, norm.node)
    return True


def _skip_neutral(node: fx.Node, scale: torch.Tensor, shapes: Shapes) -> fx.Node:
    """Walk up through operators that give the same before and after scaling each channel."""
    while len(readers(node)) == 1 and node.op == "call_function":
        source = node.args[0]
        if node.target == aten.max_pool2d.default:
            same = bool((scale >= 0).all())
        elif node.target == aten.avg_pool2d.default:
            same = argument(node, 6) is None and not any(pair(argument(node, 3) or 0))
        elif node.target in (aten.reshape.default, aten.flatten.using_ints):
            same = _merges_rows(node, shapes)
        else:
            same = False
        if not same:
            break
        node = cast(fx.Node, source)
    return node


def _merges_rows(node: fx.Node, shapes: Shapes) -> bool:
    """Report whether a reshape makes (rows, features) out of (..., features)."""
    before, after = shapes[cast(fx.Node, node.args[0]).name], shapes[node.name]
    return len(after) == 2 and len(before) > 2 and before[-1] == after[-1]


def _shares_channels(layer: Layer, features: fx.Node, shapes: Shapes) -> bool:
    """Report whether layer and batch norm mean the same axis: 1 for convolutions, last else."""
    return len(shapes[features.name]) == (2 if isinstance(layer, nn.Linear) else 4)


def _fold_into_consumers(graph: Graph, norm: Norm, calls: Counter[str], shapes: Shapes) -> bool:
    """Case 2: only layers read the batch norm, each runs once, and none pads a shifted zero."""
    scale, shift = norm_affine(norm.module)
    shifted = bool(shift.any())
    layers: list[Layer] = []
    for user in readers(norm.node):
        layer = as_layer(graph, user, calls)
        if layer is None or (shifted and not sees_no_border(layer)):
            return False
        if not _shares_channels(layer, norm.node, shapes):
            return False
        layers.append(layer)
    for layer in layers:
        weight = layer.weight.double()
        per_input = spread_inputs(layer, scale)
        extra = sum_shift(layer, weight, shift)
        assign(layer, weight * per_input, bias_or_zero(layer, len(extra)) + extra)
    _remove(graph, norm.node)
    return bool(layers)


def _fold_padding(graph: Graph, node: fx.Node, calls: Counter[str]) -> bool:
    """Case 3: symmetric zero padding that only convolutions read, each run once."""
    widths = _zero_padding(node)
    if widths is None:
        return False
    left, right, top, bottom = widths
    layers = [as_layer(graph, user, calls) for user in node.users]
    if left != right or top != bottom or min(widths) < 0:
        return False
    if not all(isinstance(c, nn.Conv2d) and c.padding_mode == "zeros" for c in layers):
        return False
    for conv in cast("list[nn.Conv2d]", layers):
        height, width = cast("tuple[int, int]", conv.padding)
        conv.padding = (height + top, width + left)
    _remove(graph, node)
    return True


def _zero_padding(node: fx.Node) -> list[int] | None:
    """Return [left, right, top, bottom] of a constant zero padding of the two last axes."""
    if node.op != "call_function" or node.target != aten.pad.default:
        return None
    _, widths, mode, value = node.args
    if mode != "constant" or value != 0:
        return None
    fixed = [w for w in cast("list[Any]", widths) if type(w) is int]
    if len(fixed) != len(cast("list[Any]", widths)) or len(fixed) not in (2, 4):
        return None
    return fixed + [0] * (4 - len(fixed))


def _remove(graph: Graph, node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    graph.module.graph.erase_node(node)
