"""How well a calibration set fits a model's batch norms: images and a graph in, a score out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dfqc.compiler.graph import Graph, batch_norms


def bn_divergence(graph: Graph, images: Tensor, *, batch: int = 32) -> float | None:
    """Return how far the images drive the model from its batch-norm statistics; 0 is a match.

    Per channel, the Kullback-Leibler divergence (nats) of the normal distribution of the inputs
    of a batch norm, over all images and positions, from the one it has stored; averaged over
    channels, then over batch norms. None for a model without batch norms.
    """
    norms = batch_norms(graph)
    if not norms:
        return None
    moments = _Moments(graph.module, {norm.input.name for norm in norms})
    with torch.inference_mode():
        for chunk in images.split(batch):
            moments.run(chunk)
    scores = []
    for norm in norms:
        mean, var = moments.moments(norm.input.name)
        stored_mean, stored_var = norm.module.running_mean, norm.module.running_var
        assert stored_mean is not None
        assert stored_var is not None
        wanted = stored_var.double().cpu() + norm.module.eps
        ratio = (var + norm.module.eps) / wanted
        distance = (mean - stored_mean.double().cpu()).square() / wanted
        scores.append(float((0.5 * (ratio + distance - 1 - ratio.log())).mean()))
    return sum(scores) / len(scores)


class _Moments(fx.Interpreter):
    """Runs a graph and accumulates per-channel moments of some nodes' outputs in float64."""

    def __init__(self, module: fx.GraphModule, nodes: set[str]) -> None:
        super().__init__(module)
        self.nodes = nodes
        self.sums: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.nodes:
            x = value.double().transpose(0, 1).flatten(1)  # channels first, all else behind
            count = torch.full((len(x),), float(x.shape[1]), dtype=torch.float64)
            sums = torch.stack([x.sum(1).cpu(), x.square().sum(1).cpu(), count])
            self.sums[n.name] = self.sums.get(n.name, torch.zeros_like(sums)) + sums
        return value

    def moments(self, node: str) -> tuple[Tensor, Tensor]:
        """Return mean and variance per channel."""
        total, squares, count = self.sums[node]
        mean = total / count
        return mean, (squares / count - mean.square()).clamp_min(0)
