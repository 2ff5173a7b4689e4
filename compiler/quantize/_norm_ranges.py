"""Distributions of activations without images: batch norms in, histograms out.

A batch norm states mean (beta) and standard deviation (|gamma|) of its output, channel by channel;
Nagel et al. 2019 (DFQ) take beta +- 6 |gamma| for the range. Here the normal distributions within
those six standard deviations go through the activations behind them, point by point, and all
channels count alike: what comes out is searched for a grid as a histogram of images is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dfqc.compiler.covariance import LEAKY, is_known_activation
from dfqc.compiler.graph import LAYER_TYPES, Graph, batch_norms
from dfqc.compiler.moments import AVERAGING, SMOOTH, Moments, node_moments, went_into_producer
from dfqc.compiler.operators import ADD, CAT, CLIP, GRID_PRESERVING, RELU
from dfqc.compiler.quantize._ranges import BINS, Histogram

SIGMAS = 6.0  # of a channel, on both sides of its mean
POINTS = 257
_aten = torch.ops.aten


def norm_histograms(unfolded: Graph, graph: Graph, sources: Sequence[str]) -> dict[str, Histogram]:
    """Return a histogram of every node in `sources` that batch norms describe.

    Left out is what they do not describe: outputs of layers without a batch norm behind them (how
    their inputs are correlated decides on the variance), whatever is computed from those, and
    operators that `moments` does not know.

    Args:
        unfolded: the model with its batch norms.
        graph: the same, folded.
        sources: names of nodes of `graph`.
    """
    spreads, stated = _Spreads(unfolded), _outputs_of_norms(unfolded, graph)
    found = {source: spreads.of(stated.get(source, source)) for source in sources}
    return {source: _count(rows) for source, rows in found.items() if rows is not None}


def _outputs_of_norms(unfolded: Graph, graph: Graph) -> dict[str, str]:
    """Return, by node of the folded graph, the batch norm whose output it has taken over."""
    kept = {node.name for node in graph.module.graph.nodes}
    inputs: dict[str, str] = {}  # of folded norms: the first of a row of them
    stated = {}
    for norm in batch_norms(unfolded):
        if norm.node.name in kept:
            continue
        first = inputs.get(norm.input.name) if len(norm.input.users) == 1 else None
        if first is not None or went_into_producer(norm, unfolded, graph):
            inputs[norm.node.name] = first or norm.input.name
            stated[first or norm.input.name] = norm.node.name
    return stated


class _Spreads:
    """Points of the distribution of every node, (channels, POINTS) float64; None: not known."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = {node.name: node for node in graph.module.graph.nodes}
        self.moments = node_moments(graph)
        # What a batch norm reads has its running statistics, however it was computed.
        self.read = {
            norm.input.name: Moments(norm.module.running_mean, norm.module.running_var)
            for norm in batch_norms(graph)
            if norm.module.running_mean is not None and norm.module.running_var is not None
        }
        self.found: dict[str, Tensor | None] = {}

    def of(self, name: str) -> Tensor | None:
        """Return the points of a node; a name that the graph does not have is not known."""
        if name not in self.found:
            node = self.nodes.get(name)
            points = None if node is None else self._compute(node)
            if points is None and name in self.read:
                points = _normal(self.read[name].mean.view(1, -1), self.read[name].var.view(1, -1))
            self.found[name] = points
        return self.found[name]

    def _compute(self, node: fx.Node) -> Tensor | None:
        moments = self.moments.get(node.name)
        if node.op == "call_module":
            layer = isinstance(self.graph.module.get_submodule(str(node.target)), LAYER_TYPES)
            return None if moments is None or layer else _normal(moments.mean, moments.var)
        if node.op == "placeholder" and moments is not None:
            return _normal(moments.mean, moments.var)
        if node.op != "call_function" or moments is None:
            return None
        if node.target is CAT:
            parts = [self.of(source.name) for source in node.all_input_nodes]
            known = [part for part in parts if part is not None]
            return torch.cat(known) if len(known) == len(parts) else None
        return self._through(node, moments)

    def _through(self, node: fx.Node, moments: Moments) -> Tensor | None:
        """Return the points behind a function of one or two activations."""
        inputs = [arg for arg in node.args if isinstance(arg, fx.Node) and arg.name in self.moments]
        if node.target is _aten.mul.Tensor and len(inputs) == 2:
            # As `moments` has it: the smaller one is a gate, and nearly constant.
            gate, scaled = sorted(inputs, key=lambda n: self.moments[n.name].mean.numel())
            points, factor = self.of(scaled.name), self.moments[gate.name].mean
            alike = points is None or factor.numel() != len(points)
            return None if points is None or alike else points * factor.view(-1, 1)
        before = [self.of(source.name) for source in inputs]
        known = [points for points in before if points is not None]
        if not known or len(known) < len(before):
            return None
        points = known[0]
        if is_known_activation(node.target, node.args[1:]):
            return _activate(node.target, node.args[1:], points)
        if node.target is ADD:
            # The running statistics of a batch norm know how the two are correlated.
            return None if node.name in self.read else self._sum(inputs)
        if node.target in AVERAGING:
            # A mean lies between its values; how much less it varies is not known.
            mean = _normal(moments.mean, moments.var)
            return mean.clamp(points.min(), points.max())
        if node.target is _aten.slice.Tensor:
            whole = self.moments[inputs[0].name].mean
            if node.args[1:2] == (1,) and whole.dim() in (2, 4) and len(points) == whole.shape[1]:
                start, end, step = (*node.args[2:], None, None, None)[:3]
                return points[slice(start, end, step)]
        return points if node.target in GRID_PRESERVING else None

    def _sum(self, inputs: Sequence[fx.Node]) -> Tensor:
        """Return the points of a sum whose deviations add up: the most that they can be.

        Branches of a residual net are correlated. Taken as independent, as `moments` has them, sums
        are cut off: ResNet-20 at W8A8, W4A8, W4A4 by `gptq` with `hessian=bn` has 19.6, 16.2,
        11.4 dB at its output, and 22.5, 17.4, 13.5 dB like this.
        """
        parts = [self.moments[source.name] for source in inputs]
        deviation = sum((part.var.sqrt() for part in parts), torch.zeros(()))
        return _normal(sum((part.mean for part in parts), torch.zeros(())), deviation.square())


def _activate(target: Any, args: tuple[Any, ...], points: Tensor) -> Tensor:
    """Apply an activation that `is_known_activation`."""
    if target is RELU:
        return points.relu()
    if target is CLIP:
        return points.clamp(0, float(args[1]))
    if target is LEAKY:
        return F.leaky_relu(points, float(args[0]) if args else 0.01)
    return SMOOTH[target](points)


def _normal(mean: Tensor, var: Tensor) -> Tensor:
    """Return points of one normal distribution per channel, with the variance over positions."""
    means = _rows(mean.double())
    total = _rows(var.double()).mean(1) + means.var(1, correction=0)
    return means.mean(1)[:, None] + total.sqrt()[:, None] * _standard_points()


def _rows(value: Tensor) -> Tensor:
    """Return a map of one image as (channels, positions); each value of what has no channels."""
    if value.dim() in (2, 4):
        return value[0].flatten(1) if value.dim() == 4 else value[0][:, None]
    return value.reshape(-1, 1)


def _standard_points() -> Tensor:
    return torch.linspace(-SIGMAS, SIGMAS, POINTS, dtype=torch.float64)


def _count(rows: Tensor) -> Histogram:
    """Return the histogram: every point by its share of a normal distribution."""
    points = _standard_points()
    half = (points[1] - points[0]) / 2
    shares = torch.special.ndtr(points + half) - torch.special.ndtr(points - half)
    low, high = float(rows.min()), float(rows.max())
    width = (high - low) / BINS
    if width == 0:
        return Histogram(low, high, torch.zeros(BINS, dtype=torch.float64))
    bins = ((rows - low) / width).long().clamp_(0, BINS - 1).flatten()
    counts = torch.zeros(BINS, dtype=torch.float64)
    return Histogram(low, high, counts.index_add_(0, bins, shares.expand_as(rows).flatten()))
