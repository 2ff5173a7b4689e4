"""Original and pruned graph and images in; the pruned graph with weights fitted to the images out.

Layer by layer in the order they run: W* = argmin |Y - X W|^2 + ridge |W - W_0|^2, with Y what the
layer puts out in the original network and X what it reads in the pruned network fitted so far
(He et al. 2017, equation 3, with a ridge towards the weights there are).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from dfqc.compiler.contracts import Progress, silent
from dfqc.compiler.graph import Graph, copy_graph, layer_nodes
from dfqc.compiler.passes._layers import bias_or_zero
from dfqc.compiler.passes._outputs import find_outputs
from dfqc.compiler.quantize._hessian import count_patches, gather_patches, group_shape, pick_patches

_DIRECT = 512  # inputs of a row; wider ones are solved by iterations
_TOLERANCE, _STEPS = 1e-7, 300
_ROWS_AT_ONCE = 1 << 27  # bytes of the systems that are solved at a time, one per masked row


def refit(
    original: Graph,
    pruned: Graph,
    images: Tensor,
    *,
    outputs: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
    ridge: float = 0.01,
    patches: int = 1 << 14,
    batch: int = 64,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> Graph:
    """Return the pruned graph with every Conv2d and Linear fitted; its structure stays.

    Args:
        original: before pruning; folded like `pruned`, or both not.
        pruned: smaller, or with weights set to zero; node names are those of `original`.
        images: (n, c, h, w) in normalized space; all activations that are live are held.
        outputs: per layer, the output channels of the original that are left; all of them where a
            layer is missing.
        masks: per layer, True where a weight may differ from zero, of the weight's shape.
        ridge: in parts of the mean variance of a layer's inputs.
        patches: positions per layer to fit on.
        batch: images that are run at a time.
        device: where it runs; None is the CPU.
        progress: called per layer.
    """
    device = device or torch.device("cpu")
    result = copy_graph(pruned)
    result.module.to(device)
    exact = copy_graph(original)
    exact.module.to(device)
    walk = _PairWalk(exact, result, outputs, masks or {})
    walk.ridge, walk.patches, walk.progress = ridge, patches, progress
    with torch.no_grad():
        walk.run_chunks([chunk.to(device) for chunk in images.split(batch)])
    result.module.cpu()
    return result


class _PairWalk:
    """Runs both networks node by node over all chunks, and fits each layer when it is met."""

    ridge: float
    patches: int
    progress: Progress

    def __init__(
        self,
        original: Graph,
        result: Graph,
        outputs: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> None:
        self.result, self.outputs, self.masks = result, outputs, masks
        self.original = original
        self.graphs = (original.module.graph, result.module.graph)
        self.lanes = (fx.Interpreter(original.module), fx.Interpreter(result.module))
        self.layers = {node.name: path for path, node in layer_nodes(result)}
        self.fitted: set[str] = set()

    def run_chunks(self, chunks: list[Tensor]) -> None:
        """Fit all layers."""
        nodes = {n.name: n for n in self.graphs[0].nodes}
        values: tuple[list[dict[fx.Node, Any]], ...] = ([{} for _ in chunks], [{} for _ in chunks])
        ends = [_last_uses(graph) for graph in self.graphs]
        for node in self.result.module.graph.nodes:
            if node.op == "output":
                return
            pair = (nodes[node.name], node)
            self._run(0, pair[0], values[0], chunks)
            path = self.layers.get(node.name)
            if path is not None and path not in self.fitted:
                source = node.all_input_nodes[0]
                inputs = [env[source] for env in values[1]]
                self._fit(path, inputs, [env[pair[0]] for env in values[0]])
            self._run(1, node, values[1], chunks)
            for lane, own in enumerate(pair):
                for env in values[lane]:
                    for dead in ends[lane].get(own, ()):
                        env.pop(dead, None)

    def _run(
        self, lane: int, node: fx.Node, envs: list[dict[fx.Node, Any]], chunks: list[Tensor]
    ) -> None:
        for env, chunk in zip(envs, chunks, strict=True):
            if node.op == "placeholder":
                env[node] = chunk
                continue
            args = fx.node.map_arg(node.args, env.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
            env[node] = getattr(self.lanes[lane], node.op)(node.target, args, kwargs)

    def _fit(self, path: str, inputs: list[Tensor], wanted: list[Tensor]) -> None:
        """Give one layer the weight and the mean output that are nearest to the original's."""
        self.fitted.add(path)
        layer = self.result.module.get_submodule(path)
        self.progress(len(self.fitted), len(self.layers), "least squares")
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            return
        rows = self.outputs.get(path)
        groups, dim = group_shape(layer)
        stats = _gather(layer, inputs, wanted, rows, self.patches)
        start = layer.weight.detach().double().reshape(groups, -1, dim)
        missing = stats.cross - start @ stats.inner
        mask = self.masks.get(path)
        chosen = None if mask is None else mask.to(start.device).reshape(start.shape)
        weight = start + _solve(stats.inner, missing, self.ridge, chosen)
        layer.weight = nn.Parameter(
            weight.view(layer.weight.shape).to(layer.weight), requires_grad=False
        )
        bias = bias_or_zero(layer, weight.shape[0] * weight.shape[1])
        found = (weight @ stats.mean_in[:, :, None]).flatten() + bias
        self._reset_norm(path, rows)
        find_outputs(self.result, path).shift_mean((found - stats.mean_out).cpu())

    def _reset_norm(self, path: str, rows: Tensor | None) -> None:
        """Give a batch norm the original's statistics: the outputs are the original's again."""
        norm, exact = (find_outputs(g, path).norm for g in (self.result, self.original))
        if norm is None or exact is None:
            return
        for name in ("running_mean", "running_var"):
            values: Tensor = getattr(exact, name)
            kept = values if rows is None else values[rows.to(values.device)]
            getattr(norm, name).copy_(kept)


class _Stats:
    """Central second moments of a layer's patches and outputs, per group, float64."""

    def __init__(self, groups: int, dim: int, channels: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.inner = zeros(groups, dim, dim)
        self.cross = zeros(groups, channels // groups, dim)
        self.mean_in = zeros(groups, dim)
        self.mean_out = zeros(channels)


def _gather(
    layer: nn.Conv2d | nn.Linear,
    inputs: list[Tensor],
    wanted: list[Tensor],
    rows: Tensor | None,
    limit: int,
) -> _Stats:
    """Measure over chosen positions of all chunks."""
    groups, dim = group_shape(layer)
    stats = _Stats(groups, dim, layer.weight.shape[0], layer.weight.device)
    count = 0
    share = limit / sum(count_patches(layer, value) for value in inputs)
    for value, output in zip(inputs, wanted, strict=True):
        outs = output if isinstance(layer, nn.Linear) else output.movedim(1, -1)
        outs = outs.reshape(-1, outs.shape[-1])
        outs = outs if rows is None else outs[:, rows.to(outs.device)]
        total = count_patches(layer, value)
        for part in pick_patches(total, max(1, int(total * share)), groups * dim):
            x = gather_patches(value, layer, part).double()  # (groups, positions, dim)
            y = outs[part.to(outs.device)].double()
            count += len(y)
            stats.inner += x.mT @ x
            stats.cross += y.mT.reshape(groups, -1, len(y)) @ x
            stats.mean_in += x.sum(1)
            stats.mean_out += y.sum(0)
    stats.mean_in /= count
    stats.mean_out /= count
    stats.inner = stats.inner / count - stats.mean_in[:, :, None] * stats.mean_in[:, None]
    means = stats.mean_out.view(groups, -1, 1) * stats.mean_in[:, None]
    stats.cross = stats.cross / count - means
    return stats


def _solve(inner: Tensor, missing: Tensor, ridge: float, mask: Tensor | None) -> Tensor:
    """Return the change (groups, outputs, dim) of the weights; zero outside the mask."""
    sizes = inner.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    damped = inner + max(ridge, 1e-10) * sizes[:, None, None] * eye
    if mask is None:
        solved: Tensor = torch.linalg.solve(damped, missing.mT).mT
        return solved
    changes = torch.zeros_like(missing)
    free = mask.to(inner.dtype)
    if inner.shape[-1] > _DIRECT:
        for group in range(len(inner)):
            changes[group] = _descend(damped[group], missing[group], free[group])
        return changes
    step = max(1, _ROWS_AT_ONCE // (8 * inner.shape[-1] ** 2))
    for group in range(len(inner)):
        for first in range(0, missing.shape[1], step):
            part = slice(first, first + step)
            open_ = free[group, part]
            # A weight that must stay zero gets an equation of its own: change = 0.
            systems = damped[group] * open_[:, :, None] * open_[:, None]
            systems += torch.diag_embed(1 - open_)
            changes[group, part] = torch.linalg.solve(systems, missing[group, part] * open_)
    return changes


def _descend(matrix: Tensor, missing: Tensor, free: Tensor) -> Tensor:
    """Return rows x with (matrix x) = missing where `free`, 0 elsewhere: conjugate gradients.

    All rows at once: with a factorization per row, the masks of a wide layer take hours.
    """
    scale = matrix.diagonal().rsqrt()  # preconditioned by the diagonal
    scaled = matrix * scale[:, None] * scale
    wanted = missing * free * scale
    found = torch.zeros_like(wanted)
    rest, way = wanted.clone(), wanted.clone()
    energy = rest.square().sum(1, keepdim=True)
    enough = _TOLERANCE**2 * energy
    for _ in range(_STEPS):
        if bool((energy <= enough).all()):
            break
        bent = (way @ scaled) * free
        length = energy / (way * bent).sum(1, keepdim=True).clamp_min(1e-300)
        found += length * way
        rest -= length * bent
        before, energy = energy, rest.square().sum(1, keepdim=True)
        way = rest + energy / before.clamp_min(1e-300) * way
    return found * scale


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return, per node, the values that nothing needs after it has run."""
    last = {n: n for n in graph.nodes}
    for node in graph.nodes:
        last.update(dict.fromkeys(node.all_input_nodes, node))
    ends: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        ends.setdefault(node, []).append(value)
    return ends
