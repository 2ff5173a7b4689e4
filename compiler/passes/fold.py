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

from dfqc.compiler._aten import argument, op_name, pair
from dfqc.compiler.graph import LAYER_TYPES, Graph, Norm, batch_norms, copy_graph, node_shapes

log = logging.getLogger(__name__)

aten = torch.ops.aten

Layer: TypeAlias = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def fold(graph: Graph) -> Graph:
    """Return a copy with every batch norm folded that can be; the others stay, in eval mode."""
    graph = copy_graph(graph)
    calls = _count_calls(graph)
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
    scale, shift = _affine(norm.module)
    features = cast(fx.Node, norm.node.args[0])  # another one once the norm before was folded
    source = _skip_neutral(features, scale, shapes)
    layer = _as_layer(graph, source, calls)
    if layer is None or len(_readers(source)) != 1:
        return False
    if not _shares_channels(layer, features, shapes):
        return False
    weight = layer.weight.double()
    _assign(layer, _scale_outputs(layer, weight, scale), _bias(layer, len(scale)) * scale + shift)
    _remove(graph, norm.node)
    return True


def _skip_neutral(node: fx.Node, scale: torch.Tensor, shapes: Shapes) -> fx.Node:
    """Walk up through operators that give the same before and after scaling each channel."""
    while len(_readers(node)) == 1 and node.op == "call_function":
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
    scale, shift = _affine(norm.module)
    shifted = bool(shift.any())
    layers: list[Layer] = []
    for user in _readers(norm.node):
        layer = _as_layer(graph, user, calls)
        if layer is None or (shifted and not _sees_no_border(layer)):
            return False
        if not _shares_channels(layer, norm.node, shapes):
            return False
        layers.append(layer)
    for layer in layers:
        weight = layer.weight.double()
        per_input = _spread_inputs(layer, scale)
        extra = _sum_shift(layer, weight, shift)
        _assign(layer, weight * per_input, _bias(layer, len(extra)) + extra)
    _remove(graph, norm.node)
    return bool(layers)


def _fold_padding(graph: Graph, node: fx.Node, calls: Counter[str]) -> bool:
    """Case 3: symmetric zero padding that only convolutions read, each run once."""
    widths = _zero_padding(node)
    if widths is None:
        return False
    left, right, top, bottom = widths
    layers = [_as_layer(graph, user, calls) for user in node.users]
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


def _as_layer(graph: Graph, node: fx.Node, calls: Counter[str]) -> Layer | None:
    """Return the layer module of a node if it is one and is called only here."""
    if node.op != "call_module" or calls[str(node.target)] != 1:
        return None
    module = graph.module.get_submodule(str(node.target))
    return module if isinstance(module, LAYER_TYPES) else None


def _readers(node: fx.Node) -> list[fx.Node]:
    """List the users that read the values of a node, not only its shape."""
    return [user for user in node.users if not op_name(user).startswith("sym_")]


def _count_calls(graph: Graph) -> Counter[str]:
    nodes = graph.module.graph.nodes
    return Counter(str(n.target) for n in nodes if n.op == "call_module")


def _affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch norm in eval mode as scale and shift per channel, in double precision."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def _scale_outputs(layer: Layer, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if not isinstance(layer, nn.ConvTranspose2d):
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (groups, in, out, kh, kw)
    return (grouped * scale.reshape(layer.groups, 1, -1, 1, 1)).flatten(0, 1)


def _spread_inputs(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    """Shape one value per input channel so that it broadcasts against the layer's weight."""
    if isinstance(layer, nn.Linear):
        return values.reshape(1, -1)
    if isinstance(layer, nn.ConvTranspose2d):
        return values.reshape(-1, 1, 1, 1)
    per_group = values.reshape(layer.groups, 1, -1, 1, 1)
    repeated = per_group.expand(-1, layer.out_channels // layer.groups, -1, -1, -1)
    return repeated.flatten(0, 1)


def _sum_shift(layer: Layer, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return what a constant input `shift` adds to each output channel."""
    if isinstance(layer, nn.ConvTranspose2d):
        return torch.zeros(layer.out_channels, dtype=torch.double)  # only folded without shift
    return (weight * _spread_inputs(layer, shift)).flatten(1).sum(1)


def _sees_no_border(layer: Layer) -> bool:
    """Report whether every output of the layer sums over all taps of the kernel."""
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not any(cast("tuple[int, int]", layer.padding))
    return isinstance(layer, nn.Linear)


def _bias(layer: Layer, channels: int) -> torch.Tensor:
    if layer.bias is None:
        return torch.zeros(channels, dtype=torch.double, device=layer.weight.device)
    bias: torch.Tensor = layer.bias
    return bias.detach().double()


def _assign(layer: Layer, weight: torch.Tensor, bias: torch.Tensor) -> None:
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype).contiguous(), requires_grad=False)


def _remove(graph: Graph, node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    graph.module.graph.erase_node(node)
