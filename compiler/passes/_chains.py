"""Operators between two layers in, second moments of the channels that cross them out.

A chain runs from the layer that makes channels (its producer) to one that reads them (its user),
through operators that keep channels apart: batch norm, activation, depthwise convolution,
pooling, flattening.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from dfqc.compiler._aten import argument, pair
from dfqc.compiler.covariance import (
    InputModel,
    Lag,
    activation_moments,
    depthwise_covariance,
    hermite,
    is_known_activation,
    kernel_products,
    mehler,
    output_covariance,
)
from dfqc.compiler.graph import Graph, layer_nodes
from dfqc.compiler.moments import AVERAGING, Moments
from dfqc.compiler.operators import CAT, GRID_PRESERVING
from dfqc.compiler.passes._layers import bias_or_zero

_aten = torch.ops.aten
Covariance = Callable[[Lag], Tensor]
Shapes = Mapping[str, tuple[int, ...]]
SMALLEST = 1e-12


@dataclass(frozen=True)
class Chain:
    """Nodes between `producer` and `user` (module paths), in the order they run.

    `offsets` says at which channel of each node the producer's begin: behind a concat not at 0.
    """

    producer: str
    user: str
    nodes: tuple[fx.Node, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Channels to correlate: those of `graph`, all of them or the ones at `keep`."""

    graph: Graph
    keep: Tensor | None = None

    def pick(self, values: Tensor) -> Tensor:
        """Return what belongs to the channels (axis 0), float64."""
        chosen = values if self.keep is None else values[self.keep.to(values.device)]
        return chosen.detach().cpu().double()

    def pick_among(self, values: Tensor, offset: int, size: int) -> Tensor:
        """Return what belongs to the channels, `size` in all, that begin at `offset`."""
        return self.pick(values[offset : offset + size])


@dataclass(frozen=True)
class Signal:
    """Channels at one point of a chain: mean and variance (channels,), covariance at a lag."""

    mean: Tensor
    var: Tensor
    covariance: Covariance


def find_chain(graph: Graph, shapes: Shapes, producer: str, user: str) -> Chain | None:
    """Return the chain between two layers, None if there is none or it mixes channels.

    `shapes` are `node_shapes` of the graph.
    """
    nodes = dict(layer_nodes(graph))
    start, node = nodes[producer], nodes[user]
    path = _walk_back(graph, shapes, node.args[0], start)
    if path is None:
        return None
    links, _ = path
    return Chain(producer, user, tuple(n for n, _ in links), tuple(o for _, o in links))


def follow_chain(
    chain: Chain, rows: tuple[Rows, ...], source: Moments, model: InputModel
) -> Signal:
    """Return the channels of all `rows`, one after the other, as the user reads them.

    Batch norms state mean and standard deviation; without one they follow from the source.

    Args:
        chain: between the layers.
        rows: channels of the original network, or of it and of the changed one.
        source: moments of the producer's input, maps of (1, channels, ...).
        model: how the producer's input correlates.
    """
    signal = _start(chain, rows, source, model)
    size = len(cast(Tensor, rows[0].graph.module.get_submodule(chain.producer).weight))
    for node, offset in zip(chain.nodes, chain.offsets, strict=True):
        signal = _step(node, rows, signal, (offset, size))
    return signal


def _walk_back(
    graph: Graph, shapes: Shapes, node: Any, start: fx.Node
) -> tuple[list[tuple[fx.Node, int]], int] | None:
    """Return the nodes from behind `start` to `node`, and where the channels begin in `node`.

    Each node comes with the place where they begin in it.
    """
    if node is start:
        return [], 0
    if not isinstance(node, fx.Node):
        return None
    if node.target is CAT:
        before = 0
        for part in cast("list[fx.Node]", node.args[0]):
            way = _walk_back(graph, shapes, part, start)
            if way is not None:
                return way[0], before + way[1]
            before += shapes[part.name][1]
        return None
    if not _keeps_channels_apart(graph, node):
        return None
    before_it = cast(fx.Node, node.args[0])
    way = _walk_back(graph, shapes, before_it, start)
    if way is None:
        return None
    links, offset = way
    # A flatten makes several features of each channel. Parameters of such are not followed.
    spread = shapes[node.name][1] // shapes[before_it.name][1]
    if node.op == "call_module" and any(_spreads(shapes, link) for link, _ in links):
        return None
    return [*links, (node, offset)], offset * spread


def _spreads(shapes: Shapes, node: fx.Node) -> bool:
    return shapes[node.name][1] != shapes[cast(fx.Node, node.args[0]).name][1]


def _keeps_channels_apart(graph: Graph, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = graph.module.get_submodule(str(node.target))
        return isinstance(module, nn.modules.batchnorm._BatchNorm) or _is_depthwise(module)
    if node.op != "call_function":
        return False
    passes = GRID_PRESERVING - {_aten.pixel_shuffle.default, _aten.channel_shuffle.default}
    passes -= {_aten.permute.default, _aten.transpose.int, _aten.slice.Tensor}
    return (
        node.target in passes
        or node.target in AVERAGING
        or is_known_activation(node.target, tuple(node.args[1:]))
    )


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )


def _start(chain: Chain, rows: tuple[Rows, ...], source: Moments, model: InputModel) -> Signal:
    """Return what the producer puts out; its groups have no input in common."""
    layers = [cast(Any, row.graph.module.get_submodule(chain.producer)) for row in rows]
    first, pairs = layers[0], list(zip(rows, layers, strict=True))
    size = len(first.weight)
    weight = torch.cat([row.pick(m.weight) for row, m in pairs])
    weight = weight[:, :, None, None] if isinstance(first, nn.Linear) else weight
    bias = torch.cat([row.pick(bias_or_zero(m, size)) for row, m in pairs])
    mean, var = (_per_channel(first, value) for value in (source.mean, source.var))
    if model == "identity":
        var = torch.ones_like(var)
    dilation, stride, groups = (1, 1), (1, 1), 1
    if isinstance(first, nn.Conv2d):
        dilation, stride, groups = pair(first.dilation), pair(first.stride), first.groups
    owner = torch.cat([row.pick(torch.arange(size) // (size // groups)) for row in rows]).long()
    mean, var = mean.view(groups, -1), var.view(groups, -1)
    own = [(owner == i).nonzero().flatten() for i in range(groups)]
    products = [
        (places, kernel_products(weight[places], var[i], dilation))
        for i, places in enumerate(own)
        if len(places)
    ]

    def covariance(lag: Lag) -> Tensor:
        total = weight.new_zeros(len(weight), len(weight))
        apart = (lag[0] * stride[0], lag[1] * stride[1])
        for places, blocks in products:
            total[places[:, None], places] = output_covariance(blocks, apart, model)
        return total

    expected = (weight * mean[owner][:, :, None, None]).sum((1, 2, 3)) + bias
    return Signal(expected, covariance((0, 0)).diagonal().clone(), _remember(covariance))


def _per_channel(layer: nn.Module, value: Tensor) -> Tensor:
    """Return the mean over positions of a map that a layer reads, (channels,)."""
    if isinstance(layer, nn.Linear):
        return value.reshape(-1, value.shape[-1]).mean(0)
    return value.mean((0, 2, 3))


def _step(node: fx.Node, rows: tuple[Rows, ...], signal: Signal, place: tuple[int, int]) -> Signal:
    """Return the channels behind one node of a chain; they begin, so many, at `place` of it."""
    if node.op == "call_module":
        modules = [row.graph.module.get_submodule(str(node.target)) for row in rows]
        if isinstance(modules[0], nn.Conv2d):
            return _depthwise(cast("list[nn.Conv2d]", modules), rows, signal, place)
        return _normalize(cast("list[nn.BatchNorm2d]", modules), rows, signal, place)
    args = tuple(node.args[1:])
    if is_known_activation(node.target, args):
        return _activate(node.target, args, signal)
    if node.target in (_aten.max_pool2d.default, _aten.avg_pool2d.default):
        stride = pair(argument(node, 2) or argument(node, 1))
        inner = signal.covariance
        return Signal(
            signal.mean,
            signal.var,
            lambda lag: inner((lag[0] * stride[0], lag[1] * stride[1])),
        )
    return signal


def _normalize(
    modules: list[nn.BatchNorm2d], rows: tuple[Rows, ...], signal: Signal, place: tuple[int, int]
) -> Signal:
    ones = [torch.ones(m.num_features) for m in modules]
    gamma = torch.cat(
        [r.pick_among(o if m.weight is None else m.weight, *place)
         for r, m, o in zip(rows, modules, ones, strict=True)]
    )  # fmt: skip
    beta = torch.cat(
        [r.pick_among(torch.zeros_like(o) if m.bias is None else m.bias, *place)
         for r, m, o in zip(rows, modules, ones, strict=True)]
    )  # fmt: skip
    factor = gamma / signal.var.clamp_min(SMALLEST).sqrt()
    inner = signal.covariance
    return Signal(beta, gamma.square(), lambda lag: inner(lag) * torch.outer(factor, factor))


def _activate(target: Any, args: tuple[Any, ...], signal: Signal) -> Signal:
    std = signal.var.clamp_min(SMALLEST).sqrt()
    series = hermite(target, args, signal.mean, std)
    moments = activation_moments(target, args, signal.mean, std)
    inner = signal.covariance

    def covariance(lag: Lag) -> Tensor:
        correlation = (inner(lag) / torch.outer(std, std)).clamp(-1, 1)
        return mehler(correlation, series, moments.var)

    return Signal(moments.mean, moments.var, _remember(covariance))


def _depthwise(
    modules: list[nn.Conv2d], rows: tuple[Rows, ...], signal: Signal, place: tuple[int, int]
) -> Signal:
    first = modules[0]
    pairs = list(zip(rows, modules, strict=True))
    weight = torch.cat([r.pick_among(m.weight[:, 0], *place) for r, m in pairs])
    bias = torch.cat([r.pick_among(bias_or_zero(m, m.out_channels), *place) for r, m in pairs])
    stride, dilation = pair(first.stride), pair(first.dilation)

    def covariance(lag: Lag) -> Tensor:
        return depthwise_covariance(weight, lag, stride, dilation, signal.covariance)

    expected = signal.mean * weight.sum((1, 2)) + bias
    return Signal(expected, covariance((0, 0)).diagonal().clone(), covariance)


def _remember(covariance: Covariance) -> Covariance:
    """Keep what was computed: a lag and its opposite are one matrix and its transpose."""
    known: dict[Lag, Tensor] = {}

    def recall(lag: Lag) -> Tensor:
        if lag < (0, 0):
            return recall((-lag[0], -lag[1])).mT
        if lag not in known:
            known[lag] = covariance(lag)
        return known[lag]

    return recall
