"""What rounding each layer's weights alone does to the output: a graph and images in, table out.

Only the tail of the network behind the layer runs again: everything before it, and beside it, is
kept from one float pass of the same few images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from dfqc.compiler import affine
from dfqc.compiler.allocate import CHUNK_BYTES, Effect, images_for
from dfqc.compiler.contracts import Progress, QTensor, silent
from dfqc.compiler.graph import Graph, count_macs, node_shapes
from dfqc.compiler.quantize._ranges import weight_grid
from dfqc.compiler.spec import OFFSET_BITS, Plan, QScheme

_CHUNK_IMAGES = 32  # more at a time are no faster
MEAN_OF = 256  # positions from which the mean change of a channel is not the change itself

Sums = dict[str, dict[str, list[float]]]  # layer -> bits -> noise, KL, agreeing images


def round_weights(
    graph: Graph, plan: Plan, widths: Sequence[int], method: str = "mse"
) -> dict[str, dict[int, QTensor]]:
    """Return the weights of every planned layer, rounded to nearest at every width."""
    rounded: dict[str, dict[int, QTensor]] = {}
    for layer in plan.layers.values():
        if layer.weight is None:
            continue
        weight = graph.module.get_submodule(layer.name).weight
        assert isinstance(weight, Tensor)
        axis = layer.weight.axis
        rounded[layer.name] = {}
        for bits in widths:
            scheme = QScheme(bits, signed=True, symmetric=bits > OFFSET_BITS, axis=axis)
            grid = weight_grid(weight.detach().cpu(), scheme, method)
            rounded[layer.name][bits] = affine.round_to_grid(weight.cpu(), grid, axis or 0)
    return rounded


def choose_chunks(graph: Graph, plan: Plan, images: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Return the images to measure on, in chunks whose activations fit in memory.

    Fewer of a large network, as `images_for` says.
    """
    layers = sum(layer.weight is not None for layer in plan.layers.values())
    count = min(len(images), images_for(count_macs(graph), layers, len(widths)))
    floats = sum(torch.Size(shape).numel() for shape in node_shapes(graph).values())
    most = max(1, min(_CHUNK_IMAGES, CHUNK_BYTES // (4 * floats)))
    return list(images[:count].tensor_split(-(-count // most)))


@torch.inference_mode()
def measure_chunk(
    graph: Graph,
    plan: Plan,
    rounded: Mapping[str, Mapping[int, QTensor]],
    images: Tensor,
    *,
    device: torch.device,
    progress: Progress = silent,
) -> Sums:
    """Return the sums over some images from which `combine` makes the table.

    Args:
        graph: folded graph on `device`.
        plan: which layers there are.
        rounded: what `round_weights` returned.
        images: normalized images (n, c, h, w).
        device: where the graph is.
        progress: called per layer.
    """
    keeper = _Keeper(graph.module)
    exact = keeper.run(images.to(device))
    kept = keeper.kept
    nodes = {n.name: n for n in graph.module.graph.nodes}
    tail = fx.Interpreter(graph.module)
    sums: Sums = {"": {"": [float(exact.double().square().sum()), float(len(images))]}}
    for count, (name, weights) in enumerate(rounded.items()):
        layer = plan.layers[name]
        node, axis = nodes[layer.node], layer.weight.axis if layer.weight else None
        before = {n: v for n, v in kept.items() if n not in _descendants(node)}
        sums[name] = {}
        for bits, weight in weights.items():
            value = affine.dequantize_weight(weight, axis).to(device)
            changed = _changed_output(graph.module, node, kept, value)
            output = tail.run(initial_env={**before, node: changed})
            sums[name][str(bits)] = _compare(exact, output)
        progress(count + 1, len(rounded), "layers")
    return sums


def combine(chunks: Sequence[Sums]) -> dict[str, dict[int, Effect]]:
    """Return the table of all chunks together."""
    power, images = (sum(chunk[""][""][i] for chunk in chunks) for i in (0, 1))
    table: dict[str, dict[int, Effect]] = {}
    for name in chunks[0]:
        if not name:
            continue
        table[name] = {}
        for bits in chunks[0][name]:
            rows = [chunk[name][bits] for chunk in chunks]
            noise = sum(row[0] for row in rows) / max(power, 1e-300)
            kl = agreement = None
            if len(rows[0]) > 1:
                kl = sum(row[1] for row in rows) / images
                agreement = 100 * sum(row[2] for row in rows) / images
            table[name][int(bits)] = Effect(noise, kl, agreement)
    return table


def _changed_output(
    module: fx.GraphModule, node: fx.Node, kept: Mapping[fx.Node, Any], weight: Tensor
) -> Tensor:
    """Return a layer's output with another weight, less the mean change of every channel.

    The mean is what bias correction takes away after rounding, so that it must not count here. The
    mean of a few positions would be the change itself: then all of it counts.
    """
    layer = module.get_submodule(str(node.target))
    source = node.args[0]
    assert isinstance(source, fx.Node)
    output: Tensor = functional_call(layer, {"weight": weight}, (kept[source],))
    axis = output.ndim - 1 if isinstance(layer, nn.Linear) else 1
    others = [d for d in range(output.ndim) if d != axis]
    shift: Tensor = (output - kept[node]).mean(others, keepdim=True)
    averaged = output.numel() // output.shape[axis]
    return output - shift if averaged >= MEAN_OF else output


def _compare(exact: Tensor, output: Tensor) -> list[float]:
    noise = float((output - exact).double().square().sum())
    if exact.ndim != 2 or exact.shape[1] < 2:
        return [noise]
    p, q = exact.double().log_softmax(1), output.double().log_softmax(1)
    kl = float((p.exp() * (p - q)).sum())
    return [noise, kl, float((exact.argmax(1) == output.argmax(1)).sum())]


def _descendants(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        users = [user for user in pending.pop().users if user not in found]
        found.update(users)
        pending.extend(users)
    return found


class _Keeper(fx.Interpreter):
    """Runs a graph and keeps every value but the output."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.kept: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            self.kept[n] = value
        return value
