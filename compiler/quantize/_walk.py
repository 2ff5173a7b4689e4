"""A walk through a network while its layers are rounded: graph and images in, every layer shown.

Layers are met in the order they run, each with its inputs in the network quantized so far and,
on the same images, in the float network. A value is held until its last reader has run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dfqc.compiler.contracts import QParams
from dfqc.compiler.graph import Graph, copy_graph, node_shapes
from dfqc.compiler.simulate import FakeQuantize, insert_quantizers
from dfqc.compiler.spec import LayerPlan, Plan

# decide(layer, module, quantized inputs, float inputs): the weight and bias that the quantized
# network goes on with.
Decide = Callable[
    [LayerPlan, nn.Module, Sequence[Tensor], Sequence[Tensor] | None], tuple[Tensor, Tensor | None]
]


class Walk:
    """A prepared walk; `bytes_per_image` says what one image costs at the fullest point."""

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        acts: Mapping[str, QParams],
        *,
        paired: bool,
        device: torch.device,
    ) -> None:
        """Copy the graph and put quantizers into the copy.

        Args:
            graph: folded graph, left as it is.
            plan: what each layer and tensor gets.
            acts: grid of every quantizer.
            paired: run the float network beside the quantized one.
            device: where it runs.
        """
        copied = copy_graph(graph)
        insert_quantizers(copied.module, plan, lambda q: FakeQuantize(acts[q.name], q.scheme))
        self.bytes_per_image = live_bytes(copied) * (2 if paired else 1)
        self.module = copied.module.to(device)
        self.layers = {p.node: p for p in plan.layers.values() if p.weight is not None}
        self.paired, self.device = paired, device

    def run(self, images: Tensor, decide: Decide, *, batch: int, deadline: float | None) -> None:
        """Show every planned layer to `decide` until `deadline` (of `time.monotonic`)."""
        chunks = [chunk.to(self.device) for chunk in images.split(batch)]
        walker = _Walker(self.module, self.layers, len(chunks), decide, deadline)
        with torch.inference_mode():
            walker.run(chunks * 2 if self.paired else chunks)


class _Walker(fx.Interpreter):
    """Runs a graph node by node over all chunks: first the quantized network's, then the float's.

    Every value that depends on the images is a list with one entry per chunk.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        layers: Mapping[str, LayerPlan],
        chunks: int,
        decide: Decide,
        deadline: float | None,
    ) -> None:
        super().__init__(module)
        self.layers, self.chunks, self.decide = layers, chunks, decide
        self.deadline = deadline
        self.left = len(layers)

    def run_node(self, n: fx.Node) -> Any:
        late = self.deadline is not None and time.monotonic() > self.deadline
        if n.op == "output" or late or not self.left:
            return None
        if n.op == "placeholder":
            return next(self.args_iter)
        values = (self.env[source] for source in n.all_input_nodes)
        count = max((len(value) for value in values if _chunked(value)), default=0)
        if count == 0:
            return super().run_node(n)
        if n.name in self.layers:
            return self._layer(n, count)
        return [self._run_chunk(n, i) for i in range(count)]

    def _layer(self, node: fx.Node, count: int) -> list[Any]:
        """Run the float layer, have its weight decided, run the quantized layer."""
        module = self.fetch_attr(str(node.target))
        floats = [self._run_chunk(node, i) for i in range(self.chunks, count)]
        inputs = self.env[node.all_input_nodes[0]]
        quantized, beside = inputs[: self.chunks], inputs[self.chunks :] or None
        weight, bias = self.decide(self.layers[node.name], module, quantized, beside)
        device = module.weight.device
        module.weight = nn.Parameter(weight.to(device), requires_grad=False)
        module.bias = None if bias is None else nn.Parameter(bias.to(device), requires_grad=False)
        self.left -= 1
        return [self._run_chunk(node, i) for i in range(self.chunks)] + floats

    def _run_chunk(self, node: fx.Node, index: int) -> Any:
        def pick(arg: fx.Node) -> Any:
            value = self.env[arg]
            return value[index] if _chunked(value) else value

        args = fx.node.map_arg(node.args, pick)
        if index >= self.chunks and self._is_quantizer(node):
            return args[0]
        return getattr(self, node.op)(node.target, args, fx.node.map_arg(node.kwargs, pick))

    def _is_quantizer(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        return isinstance(self.fetch_attr(str(node.target)), FakeQuantize)


def _chunked(value: Any) -> bool:
    return isinstance(value, list)


def live_bytes(graph: Graph) -> int:
    """Return the most bytes that one image's activations take at any node, float32."""
    sizes = {name: 4 * torch.Size(shape).numel() for name, shape in node_shapes(graph).items()}
    nodes = list(graph.module.graph.nodes)
    last = {node: index for index, node in enumerate(nodes)}
    for index, node in enumerate(nodes):
        last.update(dict.fromkeys(node.all_input_nodes, index))
    live, most = 0, 0
    ends: dict[int, int] = {}
    for index, node in enumerate(nodes):
        if node.op == "get_attr":
            continue
        live += sizes.get(node.name, 0)
        most = max(most, live)
        ends[last[node]] = ends.get(last[node], 0) + sizes.get(node.name, 0)
        live -= ends.pop(index, 0)
    return most
