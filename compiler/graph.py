"""The graph every later stage sees: an fx.GraphModule in the canonical dialect, and views of it.

Layers and batch norms are `call_module` nodes named by the user's module paths; everything else
is a `call_function` of an ATen overload. No stage keeps decisions in `node.meta`.
"""

from __future__ import annotations

import copy
import math
import operator
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dfqc.compiler._aten import data_nodes, is_pointwise
from dfqc.compiler.contracts import ImageSpec

LAYER_TYPES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
NORM_TYPES = (nn.BatchNorm2d, nn.BatchNorm1d)

# Bytes of one activation on a CPU. The allocator maps what is larger anew for every operator, and
# its pages are cleared first: 32 images at 224 px took Tiny Darknet half as long again, and with
# the backward pass 1.4 times as long and twice the memory.
TENSOR_BYTES = 16 << 20
_LARGEST: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Graph:
    """A model in the canonical dialect with its preprocessing. `module` is in eval mode.

    A stage that edits the module works on a copy (`copy_graph`) and returns a new `Graph`.
    Parameters do not require gradients; a stage that trains some turns them on in its copy.
    """

    module: fx.GraphModule
    image: ImageSpec
    source: str


class GraphError(AssertionError):
    """A stage broke the canonical dialect: a fault of the compiler, never of the user."""


@dataclass(frozen=True)
class Block:
    """A region with one tensor in and one tensor out; everything by name.

    `entry` and `exit` are the nodes whose outputs enter and leave; `nodes` are the inner ones in
    the order they run (constants and size arithmetic left out), `exit` among them.
    """

    name: str
    entry: str
    exit: str
    nodes: tuple[str, ...]
    layers: tuple[str, ...]


class Norm(NamedTuple):
    """A batch norm call: its node, its module and path, and the node that feeds it."""

    node: fx.Node
    module: nn.BatchNorm1d | nn.BatchNorm2d
    path: str
    input: fx.Node


def copy_graph(graph: Graph) -> Graph:
    """Return a graph that shares no tensor and no node with `graph`."""
    module = copy.deepcopy(graph.module)
    return Graph(module.eval(), graph.image, graph.source)


def on_device(graph: Graph, device: torch.device) -> Graph:
    """Return the graph itself on the CPU, where it lives, and a copy on any other device."""
    if device.type == "cpu":
        return graph
    copied = copy_graph(graph)
    return Graph(copied.module.to(device), copied.image, copied.source)


def layer_nodes(graph: Graph) -> list[tuple[str, fx.Node]]:
    """List (module path, node) of Conv2d, ConvTranspose2d and Linear in the order they run."""
    return [
        (str(node.target), node)
        for node in graph.module.graph.nodes
        if node.op == "call_module"
        and isinstance(graph.module.get_submodule(str(node.target)), LAYER_TYPES)
    ]


def batch_norms(graph: Graph) -> list[Norm]:
    """List the batch norm calls in the order they run."""
    found = []
    for node in graph.module.graph.nodes:
        if node.op == "call_module":
            module = graph.module.get_submodule(str(node.target))
            if isinstance(module, NORM_TYPES):
                found.append(Norm(node, module, str(node.target), node.args[0]))
    return found


def has_batch_norm(graph: Graph) -> bool:
    """Report whether there are batch norm statistics to synthesize from."""
    return bool(batch_norms(graph))


def node_shapes(graph: Graph, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Return the output shape of every node with one tensor output, by node name.

    Nothing is computed: the graph runs on tensors without data.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and n.op != "output":
                shapes[n.name] = tuple(int(s) for s in value.shape)
            return value

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        Recorder(graph.module).run(_empty_images(graph, batch))
    return shapes


def images_at_once(graph: Graph, most: int, device: torch.device) -> int:
    """Return how many images a pass without gradients takes at once: `most`, fewer on a CPU.

    There they are so many that no activation takes more than `TENSOR_BYTES`; one at least.
    """
    if device.type != "cpu":
        return most
    if graph.module not in _LARGEST:
        shapes = node_shapes(graph).values()
        _LARGEST[graph.module] = max((4 * math.prod(shape) for shape in shapes), default=1)
    return max(1, min(most, TENSOR_BYTES // max(1, _LARGEST[graph.module])))


def _empty_images(graph: Graph, batch: int) -> torch.Tensor:
    """Return images in the precision and on the device of the parameters."""
    like = next((p for p in graph.module.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.empty(batch, *graph.image.size, dtype=like.dtype, device=like.device)


def count_params(graph: Graph) -> int:
    """Return the number of parameter values, each shared tensor once."""
    return sum(p.numel() for p in graph.module.parameters())


def count_macs(graph: Graph) -> int:
    """Return the multiply-accumulates of layers and matrix products for one image."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        image = _empty_images(graph, 1)
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS) as counter:
            graph.module(image)
    return int(counter.get_total_flops()) // 2


def _count_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Count attention on CPU, which torch's counter leaves out: query x key, then x value."""
    heads, length, width = math.prod(query[:-2]), query[-2], query[-1]
    return int(2 * heads * length * key[-2] * (width + value[-1]))


_ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    torch.ops.aten._scaled_dot_product_attention_math: _count_attention,
}


def blocks(graph: Graph) -> tuple[Block, ...]:
    """Cut the graph wherever one tensor carries everything, and keep layers apart.

    In a plain chain every layer is a block with the batch norm and the activations behind it; a
    residual block, from its input to its join, is one block. Pooling and reshaping go with the
    layer behind them. Every layer is in exactly one block, in the order the layers run; a module
    called several times counts where it runs first.
    """
    layers = {node for _, node in layer_nodes(graph)}
    groups: list[list[fx.Node]] = []
    head: list[fx.Node] = []  # without a layer: belongs to the next block
    for region in _single_tensor_regions(graph):
        if any(node in layers for node in region):
            groups.append(head + region)
            head = []
        elif groups and not head and all(_is_pointwise(graph, node) for node in region):
            groups[-1].extend(region)
        else:
            head.extend(region)
    if groups:
        groups[-1].extend(head)
    return _name_blocks(graph, groups, layers)


def verify(graph: Graph, stage: str) -> None:
    """Raise `GraphError`, naming `stage`, unless `graph` keeps the canonical dialect."""
    nodes = graph.module.graph.nodes
    try:
        graph.module.graph.lint()
    except Exception as error:
        raise GraphError(f"{stage}: the graph is inconsistent: {error}") from error
    faults = [fault for node in nodes if (fault := _find_fault(graph.module, node))]
    faults += [f"{n} is in training mode" for n, m in graph.module.named_modules() if m.training]
    if len([n for n in nodes if n.op == "placeholder"]) != 1:
        faults.append("the graph has not exactly one input")
    if len({n.name for n in nodes}) != len(nodes):
        faults.append("two nodes have the same name")
    called = {str(n.target) for n in nodes if n.op == "call_module"}
    faults += [
        f"{path} is called by no node"
        for path, module in graph.module.named_modules()
        if isinstance(module, LAYER_TYPES + NORM_TYPES) and path not in called
    ]
    if faults:
        raise GraphError(f"{stage}: broke the graph: {'; '.join(faults[:3])}")


def _find_fault(module: fx.GraphModule, node: fx.Node) -> str | None:
    """Say what is wrong with one node."""
    if node.op == "output":
        return None if isinstance(node.args[0], fx.Node) else "the output is not one tensor"
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        if not isinstance(called, LAYER_TYPES + NORM_TYPES):
            return f"{node.name} calls a {type(called).__name__}"
    elif node.op == "call_method":
        return f"{node.name} calls a method"
    elif isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
        return f"{node.name} works in place"
    return None


def _single_tensor_regions(graph: Graph) -> list[list[fx.Node]]:
    """Split the nodes that carry image data after every node whose output alone is still needed."""
    flow = data_nodes(graph.module.graph)
    order = {node: i for i, node in enumerate(flow)}
    last_use = {n: max((order[u] for u in n.users if u in order), default=0) for n in flow}
    regions: list[list[fx.Node]] = []
    region: list[fx.Node] = []
    live: set[fx.Node] = set()
    for i, node in enumerate(flow[:-1]):  # the last one is the output
        live = {n for n in live if last_use[n] > i} | {node}
        if node.op != "placeholder":
            region.append(node)
        # A list of tensors (chunk) is not one tensor.
        if live == {node} and region and not any(_is_getitem(u) for u in node.users):
            regions.append(region)
            region = []
    return regions


def _is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def _is_pointwise(graph: Graph, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.module.get_submodule(str(node.target)), NORM_TYPES)
    return is_pointwise(node)


def _name_blocks(
    graph: Graph, groups: list[list[fx.Node]], layers: set[fx.Node]
) -> tuple[Block, ...]:
    """Name each block by the path its layers share, or by its first layer."""
    entry = next(n for n in graph.module.graph.nodes if n.op == "placeholder").name
    named: dict[str, Block] = {}
    seen: set[str] = set()
    for group in groups:
        paths = list(dict.fromkeys(str(n.target) for n in group if n in layers))
        fresh = tuple(p for p in paths if p not in seen)
        seen.update(fresh)
        name = _shared_path(paths) or paths[0]
        while name in named:
            name += "'"
        nodes = tuple(n.name for n in group)
        named[name] = Block(name, entry, nodes[-1], nodes, fresh)
        entry = nodes[-1]
    return tuple(named.values())


def _shared_path(paths: list[str]) -> str:
    """Return the module path that all paths start with."""
    shared = []
    for parts in zip(*(p.split(".") for p in paths), strict=False):
        if len(set(parts)) != 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
