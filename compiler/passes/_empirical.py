"""Biases fitted to images: a state and images in, biases that restore channel means out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dfqc.compiler.contracts import Progress, QuantState, silent
from dfqc.compiler.graph import Graph
from dfqc.compiler.simulate import simulated, snapped_bias
from dfqc.compiler.spec import LayerPlan


def empirical_biases(
    graph: Graph,
    state: QuantState,
    images: Tensor,
    *,
    batch: int,
    device: torch.device,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Return biases that give every output channel of the simulation its float mean.

    Layers are corrected in graph order, each on inputs that already carry the corrections of
    the layers before it; only live activations of the images (n, c, h, w) are held.
    """
    chunks = [c.to(device) for c in images.split(batch)]
    names = {p.node: p for p in state.plan.layers.values() if p.weight is not None}
    graph.module.to(device)
    floats = _MeanCollector(graph.module, names)
    with torch.inference_mode():
        for chunk in chunks:
            floats.run(chunk)
        quantized = simulated(graph, state, integer=False)
        walker = _Corrector(quantized.module.to(device), names, state, floats.means(), progress)
        walker.run(chunks)
    return walker.biases


def channel_mean(value: Tensor, layer: LayerPlan) -> Tensor:
    """Return the mean of a layer's output per channel, float64 (channels,)."""
    if layer.op == "Linear":
        return value.flatten(0, -2).mean(0).double()
    return value.mean((0, 2, 3)).double()


class _MeanCollector(fx.Interpreter):
    """Accumulates the per-channel mean output of every planned layer of the float graph."""

    def __init__(self, module: fx.GraphModule, layers: Mapping[str, LayerPlan]) -> None:
        super().__init__(module)
        self.layers = layers
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.layers:
            mean = channel_mean(value, self.layers[n.name]) * len(value)
            self.sums[n.name] = self.sums.get(n.name, 0) + mean
            self.counts[n.name] = self.counts.get(n.name, 0) + len(value)
        return value

    def means(self) -> dict[str, Tensor]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}


class _Corrector(fx.Interpreter):
    """Runs the simulation node by node over all chunks, correcting each layer as it is reached.

    Every value is a list with one tensor per chunk.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        layers: Mapping[str, LayerPlan],
        state: QuantState,
        means: Mapping[str, Tensor],
        progress: Progress,
    ) -> None:
        super().__init__(module)
        self.layers, self.state, self.means, self.progress = layers, state, means, progress
        self.biases: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return self.args_iter.__next__()
        if n.op in ("get_attr",):
            return super().run_node(n)
        chunks = max((len(v) for v in self._lists(n)), default=0)
        if n.op == "output":
            return None
        if chunks == 0:
            return super().run_node(n)
        values = [self._run_chunk(n, i) for i in range(chunks)]
        if n.name in self.layers:
            values = self._correct(self.layers[n.name], values)
        return values

    def _lists(self, node: fx.Node) -> list[list[Any]]:
        values = [self.env[a] for a in node.all_input_nodes]
        return [v for v in values if isinstance(v, list)]

    def _run_chunk(self, node: fx.Node, index: int) -> Any:
        def pick(arg: fx.Node) -> Any:
            value = self.env[arg]
            return value[index] if isinstance(value, list) else value

        args = fx.node.map_arg(node.args, pick)
        kwargs = fx.node.map_arg(node.kwargs, pick)
        return getattr(self, node.op)(node.target, args, kwargs)

    def _correct(self, layer: LayerPlan, values: list[Any]) -> list[Any]:
        """Shift the layer's bias so that its mean output is the float one; apply it at once."""
        total = sum(len(v) for v in values)
        mean = sum(channel_mean(v, layer) * len(v) for v in values) / total
        module = self.fetch_attr(layer.name)
        shift = (mean - self.means[layer.node]).cpu().float()
        # The mean was measured with the snapped bias: that is the one to shift.
        old = module.bias.detach().cpu() if module.bias is not None else torch.zeros_like(shift)
        bias = old - shift
        self.biases[layer.name] = bias
        weight = self.state.weights[layer.name]
        delta = (snapped_bias(bias, layer, weight, self.state.acts) - old).to(values[0].device)
        if layer.op != "Linear":
            delta = delta.view(1, -1, 1, 1)
        self.progress(len(self.biases), len(self.layers), "bias correction")
        return [v + delta for v in values]
