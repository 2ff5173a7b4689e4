"""Swing convolution (Genie, Jeon et al. 2023): a graph in, a copy out whose strides start anywhere.

A strided convolution reads some pixels less often than others, and images optimized through it get
a checkerboard. Shifting its input by up to a pixel, anew at every call, makes all pixels count
alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfqc.compiler.graph import Graph, copy_graph

_MARGIN = 1  # pixels by which the input is padded, and so the largest shift


def swing_convolutions(graph: Graph, rng: torch.Generator) -> Graph:
    """Return a copy in which every strided Conv2d reads a randomly shifted input.

    The input is padded by reflection with one pixel on every side and cropped back to its size at
    (dy, dx), uniform in {0, 1, 2}²; (1, 1) is the input itself. All images of a call share a shift,
    every convolution draws its own. A side of one pixel cannot be reflected and is not shifted.

    `rng` is a generator on the CPU, whatever the device of the graph: a shift is a decision of the
    host, and reading it from a device would stall that. It is copied whenever the graph is.
    """
    swung = copy_graph(graph)
    module, nodes = swung.module, swung.module.graph
    strided = [
        node
        for node in nodes.find_nodes(op="call_module")
        if _is_strided(module.get_submodule(str(node.target)))
    ]
    if strided:
        module.add_submodule("_swing", _Swing(rng))
    for node in strided:
        source = node.all_input_nodes[0]
        with nodes.inserting_before(node):
            shifted = nodes.call_module("_swing", (source,))
        node.replace_input_with(source, shifted)
    module.recompile()
    return swung


def shift(x: Tensor, dy: int, dx: int) -> Tensor:
    """Return what stays of (n, c, h, w), padded by reflection, when cropped at (dy, dx)."""
    return _shift_side(_shift_side(x, 2, dy), 3, dx)


def _is_strided(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and max(module.stride) > 1


class _Swing(nn.Module):
    """Shifts what it is called on; one instance serves a whole graph, with one draw per call."""

    def __init__(self, rng: torch.Generator) -> None:
        super().__init__()
        self.rng = rng

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` at a random shift."""
        dy, dx = torch.randint(2 * _MARGIN + 1, (2,), generator=self.rng).tolist()
        return shift(x, dy, dx)


def _shift_side(x: Tensor, dim: int, place: int) -> Tensor:
    """Shift along one side: only the row that the reflection brings in is new."""
    size = x.shape[dim]
    if place == _MARGIN or size <= _MARGIN:
        return x
    if place < _MARGIN:
        return torch.cat([x.narrow(dim, 1, 1), x.narrow(dim, 0, size - 1)], dim)
    return torch.cat([x.narrow(dim, 1, size - 1), x.narrow(dim, size - 2, 1)], dim)
