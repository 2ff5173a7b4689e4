"""Images through a graph once: moments at its batch norms, extremes of its channels, outputs.

A graph in, an interpreter out that is given the images batch by batch and holds what it saw.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dfqc.compiler._aten import argument, data_nodes, op_name
from dfqc.compiler.graph import Graph, Norm, batch_norms

# Above 0 exactly where their input is; below, they are 0 or nearly so.
_RECTIFIERS = (
    *("relu", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu"),
    *("gelu", "silu", "mish", "hardswish"),
)
_OTHERS = ("sigmoid", "hardsigmoid", "log_sigmoid", "tanh", "hardtanh", "softplus")


@dataclass
class Moments:
    """Sums per channel of the differences from `center`, in float64."""

    center: Tensor
    total: Tensor
    squares: Tensor
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Take in (n, c, ...)."""
        dims = (0, *range(2, x.dim()))
        # Around what the batch norm has stored, float32 keeps the digits of the difference.
        x = x - self.center.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))
        self.total += x.sum(dims).double()
        self.squares += x.square().sum(dims).double()
        self.count += x[:, 0].numel()

    def mean_and_var(self) -> tuple[Tensor, Tensor]:
        """Return both per channel; the divisor of the variance is the count."""
        shift = self.total / self.count
        return self.center + shift, (self.squares / self.count - shift.square()).clamp_min(0)


@dataclass
class Channels:
    """Which channels of an activation have fired.

    `expected` marks those that fire on the images the model was trained with, as far as the batch
    norm that is read tells; None where none is read.
    """

    axis: int
    rectifies: bool
    expected: Tensor | None = None
    highest: Tensor | None = None
    lowest: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in the output of an activation."""
        x = x.unsqueeze(1) if x.dim() < 2 else x
        dims = [d for d in range(x.dim()) if d != self.axis % x.dim()]
        highest, lowest = x.amax(dims), x.amin(dims)
        if self.highest is not None and self.lowest is not None:
            highest = torch.maximum(highest, self.highest)
            lowest = torch.minimum(lowest, self.lowest)
        self.highest, self.lowest = highest, lowest

    def fired(self) -> Tensor:
        """Return, per channel, whether it was above 0 or, where that says nothing, has varied."""
        assert self.highest is not None
        assert self.lowest is not None
        return (self.highest > (0 if self.rectifies else self.lowest)).cpu()


class Observer(fx.Interpreter):
    """Runs a graph; call it with normalized images (n, c, h, w), once per batch.

    Attributes:
        moments: by batch norm; one called again has its call's number behind `#`.
        channels: by activation, named by the module it reads or else by its node; none of them
            without `activations`.
    """

    def __init__(self, graph: Graph, device: torch.device, *, activations: bool = True) -> None:
        super().__init__(graph.module)
        norms = [n for n in batch_norms(graph) if n.module.running_mean is not None]
        self.moments: dict[str, Moments] = {}
        self.channels: dict[str, Channels] = {}
        self._moments_at: dict[fx.Node, Moments] = {}
        self._channels_at: dict[fx.Node, Channels] = {}
        for number, norm in enumerate(norms):
            name = norm.path if norm.path not in self.moments else f"{norm.path}#{number}"
            self._moments_at[norm.node] = self.moments[name] = _empty(norm, device)
        for node in _activations(graph) if activations else ():
            rectifies = _rectifies(node)
            seen = Channels(_channel_axis(graph, node), rectifies)
            source = next((n for n in norms if n.node is node.all_input_nodes[0]), None)
            if rectifies and source is not None:
                seen.expected = _expect(source)
            self._channels_at[node] = self.channels[_name(node, self.channels)] = seen

    def __call__(self, images: Tensor) -> Tensor:
        """Return the output."""
        # The layout that is faster on every net measured (see `dfqc.calib._bns`).
        output: Tensor = self.run(images.contiguous(memory_format=torch.channels_last))
        return output

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and take note."""
        if n in self._moments_at:
            (source,) = n.all_input_nodes
            self._moments_at[n].add(self.env[source])
        value = super().run_node(n)
        if n in self._channels_at:
            self._channels_at[n].add(value)
        return value


def _empty(norm: Norm, device: torch.device) -> Moments:
    assert norm.module.running_mean is not None
    center = norm.module.running_mean.detach().double().to(device)
    return Moments(center, torch.zeros_like(center), torch.zeros_like(center))


def _expect(norm: Norm) -> Tensor:
    """Return the channels whose normal distribution reaches 0 within three standard deviations.

    That is once in 740 values: on real images, every such channel of the nets measured was above 0
    somewhere in 16 images, and nearly all other channels nowhere in 256.
    """
    module = norm.module
    assert module.running_var is not None
    std = (module.running_var / (module.running_var + module.eps)).sqrt()
    if module.weight is None or module.bias is None:
        return (3 * std > 0).cpu()
    return (module.bias + 3 * module.weight.abs() * std > 0).cpu()


def _activations(graph: Graph) -> Iterable[fx.Node]:
    """List the activation functions, and the batch norms that none of them reads."""
    norms = {norm.node for norm in batch_norms(graph)}
    for node in data_nodes(graph.module.graph):
        if _is_activation(node) or (
            node in norms and not any(_is_activation(user) for user in node.users)
        ):
            yield node


def _is_activation(node: fx.Node) -> bool:
    return op_name(node) in _RECTIFIERS + _OTHERS


def _rectifies(node: fx.Node) -> bool:
    name = op_name(node)
    return name in _RECTIFIERS or (name == "hardtanh" and argument(node, 1) == 0)


def _channel_axis(graph: Graph, node: fx.Node) -> int:
    """Return where channels are: last behind a linear layer, else behind the batch."""
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    is_module = node.op == "call_module"
    linear = is_module and isinstance(graph.module.get_submodule(str(node.target)), nn.Linear)
    return -1 if linear else 1


def _name(node: fx.Node, taken: Iterable[str]) -> str:
    """Return the module path of the layer an activation reads, unless it is taken."""
    source = node if node.op == "call_module" else node.all_input_nodes[0]
    path = str(source.target) if source.op == "call_module" else node.name
    return node.name if path in taken else path
