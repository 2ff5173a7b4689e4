"""Operators between two layers in, second moments of the channels that cross them out.

A chain runs from the layer that makes channels (its producer) to one that reads them (its user),
through operators that keep channels apart: batch norm, activation, depthwise convolution,
pooling, flattening.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

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
    spatial_correlation,
)
from dfqc.compiler.graph import Graph, layer_nodes
from dfqc.compiler.moments import AVERAGING, Moments
from dfqc.compiler.passes._layers import bias_or_zero
from dfqc.compiler.placement import CAT, GRID_PRESERVING

_aten = torch.ops.aten
Covariance = Callable[[Lag], Tensor]
SMALLEST = 1e-12


@dataclass(frozen=True)
class Chain:
    """Nodes between `producer` and `user` (module paths), in the order they run."""

    producer: str
    user: str
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Rows:
    """Channels to correlate: those of `graph`, all of them or the ones at `keep`."""

    graph: Graph
    keep: Tensor | None = None

    def pick(self, values: Tensor) -> Tensor:
        """Return what belongs to the channels (axis 0), float64."""
        chosen = values if self.keep is None else values[self.keep.to(values.device)]
        return chosen.detach().cpu().double()


@dataclass(frozen=True)
class Signal:
    """Channels at one point of a chain: mean and variance (channels,), covariance at a lag."""

    mean: Tensor
    var: Tensor
    covariance: Covariance


def find_chain(graph: Graph, producer: str, user: str) -> Chain | None:
    """Return the chain between two layers, None if there is none or it mixes channels."""
    nodes = dict(layer_nodes(graph))
    start, node = nodes[producer], nodes[user]
    path = _walk_back(graph, node.args[0], start)
    return None if path is None else Chain(producer, user, tuple(reversed(path)))


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
    for node in chain.nodes:
        signal = _step(node, rows, signal)
    return signal


def _walk_back(graph: Graph, node: Any, start: fx.Node) -> list[fx.Node] | None:
    """Return the nodes from `node` back to the one behind `start`."""
    if node is start:
        return []
    if not isinstance(node, fx.Node):
        return None
    if node.target is CAT:
        parts = cast("list[fx.Node]", node.args[0])
        ways = [_walk_back(graph, part, start) for part in parts]
        return next((way for way in ways if way is not None), None)
    if not _keeps_channels_apart(graph, node):
        return None
    rest = _walk_back(graph, node.args[0], start)
    return None if rest is None else [node, *rest]


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
    """Return what the producer puts out."""
    layers = [row.graph.module.get_submodule(chain.producer) for row in rows]
    first = layers[0]
    weight = torch.cat(
        [row.pick(_dense(cast(Any, m))) for row, m in zip(rows, layers, strict=True)]
    )
    bias = torch.cat(
        [
            row.pick(bias_or_zero(cast(Any, m), m.weight.shape[0]))
            for row, m in zip(rows, layers, strict=True)
        ]
    )
    mean, var = (_per_channel(first, value) for value in (source.mean, source.var))
    if model == "identity":
        var = torch.ones_like(var)
    dilation = pair(first.dilation) if isinstance(first, nn.Conv2d) else (1, 1)
    stride = pair(first.stride) if isinstance(first, nn.Conv2d) else (1, 1)
    products = kernel_products(weight, var, dilation)

    def covariance(lag: Lag) -> Tensor:
        return output_covariance(products, (lag[0] * stride[0], lag[1] * stride[1]), model)

    expected = (weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3)) + bias
    return Signal(expected, covariance((0, 0)).diagonal().clone(), _remember(covariance))


def _dense(module: nn.Conv2d | nn.Linear) -> Tensor:
    """Return a weight as (outputs, all channels, height, width), zeros between groups."""
    weight = module.weight.detach()
    if isinstance(module, nn.Linear):
        return weight[:, :, None, None]
    if module.groups == 1:
        return weight
    per = module.out_channels // module.groups
    blocks = weight.new_zeros(module.out_channels, module.in_channels, *module.kernel_size)
    for group in range(module.groups):
        out = slice(group * per, (group + 1) * per)
        size = weight.shape[1]
        blocks[out, group * size : (group + 1) * size] = weight[out]
    return blocks


def _per_channel(layer: nn.Module, value: Tensor) -> Tensor:
    """Return the mean over positions of a map that a layer reads, (channels,)."""
    if isinstance(layer, nn.Linear):
        return value.reshape(-1, value.shape[-1]).mean(0)
    return value.mean((0, 2, 3))


def _step(node: fx.Node, rows: tuple[Rows, ...], signal: Signal) -> Signal:
    """Return the channels behind one node of a chain."""
    if node.op == "call_module":
        modules = [row.graph.module.get_submodule(str(node.target)) for row in rows]
        if isinstance(modules[0], nn.Conv2d):
            return _depthwise(cast("list[nn.Conv2d]", modules), rows, signal)
        return _normalize(cast("list[nn.BatchNorm2d]", modules), rows, signal)
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


def _normalize(modules: list[nn.BatchNorm2d], rows: tuple[Rows, ...], signal: Signal) -> Signal:
    ones = [torch.ones(m.num_features) for m in modules]
    gamma = torch.cat(
        [r.pick(o if m.weight is None else m.weight)
         for r, m, o in zip(rows, modules, ones, strict=True)]
    )  # fmt: skip
    beta = torch.cat(
        [r.pick(torch.zeros_like(o) if m.bias is None else m.bias)
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


def _depthwise(modules: list[nn.Conv2d], rows: tuple[Rows, ...], signal: Signal) -> Signal:
    first = modules[0]
    weight = torch.cat([r.pick(m.weight[:, 0]) for r, m in zip(rows, modules, strict=True)])
    bias = torch.cat(
        [r.pick(bias_or_zero(m, m.out_channels)) for r, m in zip(rows, modules, strict=True)]
    )
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


@dataclass(frozen=True)
class PatchMoments:
    """Covariance of what a user's kernel covers, channels first and then taps, float64.

    `near` is None where the whole matrix would be too large: then it is `channels`, the covariance
    at one position, times `taps`, the correlation of positions.

    Attributes:
        channels: (rows, rows) at one position.
        taps: (taps, taps).
        near: (rows * taps, rows * taps).
        split: of the rows, how many are targets; the rest are their replacements. All of them
            are both where `keep` is given.
        keep: targets that are their own replacements.
    """

    channels: Tensor
    taps: Tensor
    near: Tensor | None
    split: int
    keep: Tensor | None

    def target_rows(self) -> Tensor:
        """Return the rows of the original channels."""
        return torch.arange(self.split)

    def kept_rows(self) -> Tensor:
        """Return the rows of the channels that stay."""
        return torch.arange(self.split, len(self.channels)) if self.keep is None else self.keep

    def block(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the covariance of two sets of rows with all taps; needs `near`."""
        assert self.near is not None
        return self.near[self._with_taps(left)][:, self._with_taps(right)]

    def predict(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Return the variance of every output, (outputs,), of a weight (outputs, rows, taps)."""
        if self.near is not None:
            flat = weight.flatten(1)
            return ((flat @ self.block(rows, rows)) * flat).sum(1)
        inner = self.channels[rows][:, rows] @ weight @ self.taps
        return (inner * weight).sum((1, 2))

    def _with_taps(self, rows: Tensor) -> Tensor:
        taps = len(self.taps)
        return (rows[:, None] * taps + torch.arange(taps)).flatten()


def gather_patches(
    user: nn.Conv2d | nn.Linear,
    spread: int,
    signal: Signal,
    maps: Moments,
    order: Tensor,
    *,
    limit: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return `PatchMoments.channels`, `taps` and `near` for one user.

    Zero padding lowers covariances by the share of positions at which both taps see the image, and
    lets the mean vary over positions, which counts as covariance: a constant cannot correct it.

    Args:
        user: the layer that reads.
        spread: features per channel (a flattened map).
        signal: channels in front of it.
        maps: moments of the channels as the user reads them, (1, channels, ...).
        order: channel of `maps` that belongs to each row of `signal`.
        limit: side of the largest matrix to build.
    """
    places, mean, seen = _windows(user, spread, maps)
    channels = signal.covariance((0, 0))
    count, rows = len(places), len(order)
    if rows * count > limit:
        return channels, tap_correlation(places), None
    shared = seen[:, 0].double()  # padding is the same for all channels
    valid = (shared.mT @ shared) / len(shared)
    near = torch.empty(rows, count, rows, count, dtype=torch.float64)
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            near[:, i, :, j] = signal.covariance((v - y, u - x)) * valid[i, j]
    patches = mean[:, order].flatten(1)
    centered = patches - patches.mean(0)
    flat = near.view(rows * count, rows * count)
    flat += centered.mT @ centered / len(centered)
    return channels, torch.eye(count, dtype=torch.float64), flat


def tap_correlation(places: list[Lag]) -> Tensor:
    """Return the correlation of a channel between the places of a kernel's taps, (taps, taps)."""
    rows = [
        [spatial_correlation((a - c, b - d), "spatial") for c, d in places] for a, b in places
    ]
    return torch.tensor(rows, dtype=torch.float64)


def tap_places(layer: nn.Conv2d) -> list[Lag]:
    """Return where the taps of a kernel lie, in pixels."""
    dilation = pair(layer.dilation)
    height, width = layer.kernel_size
    return [(y * dilation[0], x * dilation[1]) for y in range(height) for x in range(width)]


def _windows(
    user: nn.Conv2d | nn.Linear, spread: int, maps: Moments
) -> tuple[list[Lag], Tensor, Tensor]:
    """Return the taps' places, and (positions, channels, taps): the mean, and what is not padding.

    A flattened map that is not square counts as one row.
    """
    if isinstance(user, nn.Linear):
        side = round(spread**0.5)
        width = side if side * side == spread else spread
        places = [(i // width, i % width) for i in range(spread)]
        mean = maps.mean.reshape(-1, maps.mean.shape[-1] // spread, spread)
        return places, mean, torch.ones_like(mean, dtype=torch.bool)
    places = tap_places(user)
    opened = [
        F.unfold(
            F.pad(value, user._reversed_padding_repeated_twice),
            user.kernel_size,
            dilation=user.dilation,
            stride=user.stride,
        )[0]
        .mT.reshape(-1, value.shape[1], len(places))
        for value in (maps.mean, (maps.var > 0).double())
    ]
    return places, opened[0], opened[1] > 0
