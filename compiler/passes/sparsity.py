"""Masks of weights by magnitude: a graph in, masks by module path and a graph with zeros out.

Shapes stay: unstructured zeros make a package compress, N of M along the input axis is what
sparse tensor cores skip. Later stages that change weights must apply the same masks again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph, copy_graph, layer_nodes, verify
from dfqc.compiler.passes._layers import Layer


@dataclass(frozen=True)
class Masks:
    """Which weights stay.

    Attributes:
        keep: by module path, of the shape of the weight; False is zero.
        left: by module path, why a layer stays dense.
    """

    keep: Mapping[str, Tensor]
    left: Mapping[str, str]


def mask_smallest(
    graph: Graph,
    fraction: float,
    *,
    scope: Literal["layer", "global"] = "layer",
    skip: tuple[str, ...] = (),
) -> Masks:
    """Drop the weights of smallest magnitude.

    Args:
        graph: fold it first: a batch norm behind a layer changes what its weights are worth.
        fraction: part of the weights to drop, rounded down.
        scope: that part of every layer's weights, or of all layers' together.
        skip: module paths that stay dense.

    Raises:
        UsageError: a fraction outside 0 to 1.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"sparsity: got {fraction}, expected a part from 0 to below 1")
    weights = {path: layer.weight.detach().abs() for path, layer in _layers(graph).items()}
    dense = {path: w for path, w in weights.items() if path not in skip}
    if scope == "layer":
        keep = {path: _keep_largest(w.flatten(), fraction).view_as(w) for path, w in dense.items()}
    else:
        every = torch.cat([w.flatten() for w in dense.values()]) if dense else torch.empty(0)
        parts = _keep_largest(every, fraction).split([w.numel() for w in dense.values()])
        keep = {p: k.view_as(w) for (p, w), k in zip(dense.items(), parts, strict=True)}
    return Masks(keep, {path: "left out on request" for path in weights if path in skip})


def mask_n_of_m(graph: Graph, n: int = 2, m: int = 4, *, skip: tuple[str, ...] = ()) -> Masks:
    """Keep the `n` largest of every `m` consecutive input channels.

    They are chosen for each output channel and each position in the kernel by itself, which is
    the layout of sparse tensor cores for a (K, C, R, S) convolution and a (K, C) linear layer.

    Raises:
        UsageError: not 1 <= n < m.
    """
    if not 1 <= n < m:
        raise UsageError(f"sparsity: got {n}:{m}, expected N:M with 1 <= N < M, such as 2:4")
    keep: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for path, layer in _layers(graph).items():
        reason = "left out on request" if path in skip else _why_dense(layer, m)
        if reason:
            left[path] = reason
        else:
            keep[path] = _keep_n_of_m(layer.weight.detach().abs(), n, m)
    return Masks(keep, left)


def apply_masks(graph: Graph, masks: Mapping[str, Tensor]) -> Graph:
    """Return the graph with zeros where a mask is False.

    Raises:
        ValueError: a mask for no layer, or of another shape than the layer's weight.
    """
    graph = copy_graph(graph)
    layers = _layers(graph)
    for path, mask in masks.items():
        if path not in layers:
            raise ValueError(f"{path}: there is no such layer to mask")
        weight: Tensor = layers[path].weight
        if mask.shape != weight.shape:
            raise ValueError(
                f"{path}: got a mask of {tuple(mask.shape)}, expected {tuple(weight.shape)}"
            )
        masked = weight.detach().masked_fill(~mask.to(weight.device), 0)
        layers[path].weight = nn.Parameter(masked, requires_grad=False)
    verify(graph, "sparsity")
    return graph


def _layers(graph: Graph) -> dict[str, Layer]:
    found: dict[str, Layer] = {}
    for path, _ in layer_nodes(graph):
        layer = graph.module.get_submodule(path)
        assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
        found[path] = layer
    return found


def _keep_largest(values: Tensor, fraction: float) -> Tensor:
    """Return a mask without the smallest values; of equal ones the first go."""
    keep = torch.ones(len(values), dtype=torch.bool, device=values.device)
    keep[torch.argsort(values, stable=True)[: int(fraction * len(values) + 1e-9)]] = False
    return keep


def _why_dense(layer: Layer, m: int) -> str:
    """Say why no sparse kernel runs a layer; empty if one does."""
    if isinstance(layer, nn.ConvTranspose2d):
        return "a transposed convolution"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "a depthwise or grouped convolution"
    inputs = layer.weight.shape[1]
    return f"{inputs} input channels are no multiple of {m}" if inputs % m else ""


def _keep_n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """Return the mask for magnitudes with the input channels on axis 1; of equal ones the first."""
    last = weight.movedim(1, -1)
    grouped = last.reshape(*last.shape[:-1], -1, m)
    order = torch.argsort(grouped, dim=-1, descending=True, stable=True)[..., :n]
    keep = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order, value=True)
    return keep.reshape(last.shape).movedim(-1, 1).contiguous()
