"""Layer by layer, how far the simulation is from float: two graphs and images in, dB out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dfqc.compiler.contracts import Progress, silent
from dfqc.compiler.graph import Graph


def layer_sqnr(
    graph: Graph,
    simulation: Graph,
    layers: Mapping[str, str],
    images: Tensor,
    *,
    batch: int = 8,
    progress: Progress = silent,
) -> dict[str, float | None]:
    """Return the SQNR in dB of every layer's output, both networks run from the image on.

    Args:
        graph: folded float graph.
        simulation: the same graph quantized; node names are equal.
        layers: module path -> node name.
        images: normalized images (n, c, h, w).
        batch: images per call; the layers' outputs of one batch are held in memory.
        progress: called per batch.

    A layer whose outputs are all equal has no noise: None, which is better than any number.
    """
    signal = dict.fromkeys(layers, 0.0)
    noise = dict.fromkeys(layers, 0.0)
    for start in range(0, len(images), batch):
        chunk = images[start : start + batch]
        exact = _outputs(graph, list(layers.values()), chunk)
        rounded = _outputs(simulation, list(layers.values()), chunk)
        for name, node in layers.items():
            signal[name] += float(exact[node].double().square().sum())
            noise[name] += float((exact[node] - rounded[node]).double().square().sum())
        progress(min(start + batch, len(images)), len(images), "images")
    return {name: _decibels(signal[name], noise[name]) for name in layers}


def _outputs(graph: Graph, nodes: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    keeper = _Keeper(graph.module, frozenset(nodes))
    with torch.inference_mode():
        keeper.run(images)
    return keeper.kept


def _decibels(signal: float, noise: float) -> float | None:
    return None if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


class _Keeper(fx.Interpreter):
    """Runs a graph and keeps the outputs of some nodes."""

    def __init__(self, module: fx.GraphModule, nodes: frozenset[str]) -> None:
        super().__init__(module)
        self.nodes = nodes
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.nodes:
            self.kept[n.name] = value
        return value
