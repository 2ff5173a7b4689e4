"""A graph and a group of its channels in; the order to remove them in and what each step costs.

No images: rows are the filters that make a channel, scaled by the batch norm behind them; a
removed channel's error reaches the next layers through the columns that read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from dfqc.compiler.channels import Group
from dfqc.compiler.graph import Graph, Norm, batch_norms, has_batch_norm
from dfqc.compiler.moments import Moments, input_moments
from dfqc.compiler.passes._layers import Layer, bias_or_zero, norm_affine, readers, scale_outputs

Criterion: TypeAlias = Literal["l1", "l2", "bn", "output", "restored"]

_STEPS = 512  # greedy decisions per group; wider groups lose several channels in one


@dataclass(frozen=True)
class Curve:
    """Channels of a group in the order to remove them.

    Attributes:
        order: all channels (int64), the first to go first.
        error: what the outputs that read the group lose when the first 1, 2, .. size channels of
            `order` are gone, as a part of their energy; grows.
        scores: per channel; what is low goes first.
    """

    order: Tensor
    error: Tensor
    scores: Tensor


Norms: TypeAlias = Mapping[str, Norm]


def find_norms(graph: Graph) -> Norms:
    """Return the batch norms that alone read a layer, by the path of that layer."""
    norms = [norm for norm in batch_norms(graph) if norm.input.op == "call_module"]
    return {str(n.input.target): n for n in norms if len(readers(n.input)) == 1}


@dataclass(frozen=True)
class Context:
    """What the ranking of every group needs of the whole graph."""

    norms: Norms
    moments: Mapping[str, Moments]  # of the layers' inputs, where batch norms tell them


def gather_context(graph: Graph) -> Context:
    """Collect batch norms and expected activations."""
    return Context(find_norms(graph), input_moments(graph) if has_batch_norm(graph) else {})


def rank_channels(
    graph: Graph,
    group: Group,
    context: Context,
    criterion: Criterion,
    *,
    shift: float = 0.01,
    ridge: float = 0.01,
) -> Curve:
    """Return the order in which a group's channels go, and the error on the way.

    `l1` and `l2` are norms of the filters; `bn` is the L2 norm of filters that carry the scale of
    their batch norm; `output` is the energy that a channel adds to what the next layers put out,
    by the moments of its activation. The error of these is that energy, lost. `restored` takes
    away, step by step, the channel whose removal adds least to the error that is left after
    replacing all removed ones by linear combinations of the others; groups where that cannot be
    done go by `output`. Several producers count together.
    """
    gram, bias = _gram(graph, group, context.norms)
    if criterion == "restored" and group.restorable:
        rows = gram + shift * torch.outer(bias, bias)
        weight = _read_energy(graph, group, context, moments=False)[:, 0]
        scale = (weight * rows.diagonal()).sum().clamp_min(torch.finfo(torch.double).tiny)
        order, error = eliminate(rows, weight, ridge)
        error = error / scale
        return Curve(order, error, torch.empty_like(error).scatter_(0, order, error))
    energy = _lost_energy(graph, group, context, gram)
    scores = energy
    if criterion in ("l1", "l2"):
        scores = _norm_scores(graph, group, criterion)
    elif criterion == "bn":
        scores = gram.diagonal().sqrt()
    order = torch.argsort(scores, stable=True)
    return Curve(order, energy[order].cumsum(0), scores)


def eliminate(gram: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Remove row after row, each time the one that adds least to the weighted restored error.

    The error of a removed row j is `g_jj - g_jK (G_KK + r I)^-1 g_Kj`, its least squares (ridge)
    distance from the rows K that are left; errors are summed with `weight`. One matrix holds the
    inverse of the kept block and, in the other columns, the coefficients of the removed rows;
    removing a row is a rank-one downdate of both, so that all takes O(n^3).

    Args:
        gram: n x n products of rows, double precision.
        weight: n factors of the squared errors.
        ridge: as a part of the mean of the diagonal; above 0.

    Returns:
        The n rows in the order they went, and the sum of errors after each.
    """
    size = len(gram)
    level = float(gram.diagonal().mean()) * ridge or 1.0  # all rows are zero: any ridge will do
    table = torch.linalg.inv(gram + level * torch.eye(size, dtype=gram.dtype))
    left = torch.ones(size, dtype=torch.bool)
    order: list[Tensor] = []
    errors: list[Tensor] = []
    total = torch.zeros((), dtype=gram.dtype)
    while left.any():
        gone = torch.where(left, 0.0, weight)
        pivot = torch.where(left, table.diagonal(), 1.0)
        cost = (weight * (1 / pivot - level) + (table**2) @ gone / pivot).masked_fill(
            ~left, torch.inf
        )
        count = min(-(-size // _STEPS), int(left.sum()))
        block = torch.argsort(cost, stable=True)[:count]
        inner = torch.linalg.inv(table[block][:, block])
        rows = table[block]
        fresh = (weight[block] * (inner.diagonal() - level)).sum()
        old = (gone * (rows * (inner @ rows)).sum(0)).sum()
        steps = torch.arange(1, count + 1, dtype=gram.dtype) / count
        errors.append(total + (fresh + old).clamp_min(0) * steps)
        total = errors[-1][-1]
        columns = table[:, block] @ inner
        table -= columns @ rows
        table[:, block] = -columns
        table[block] = 0
        left[block] = False
        order.append(block)
    return torch.cat(order), torch.cat(errors)


def _norm_scores(graph: Graph, group: Group, criterion: Criterion) -> Tensor:
    """Sum the norms of the filters over the producers."""
    power = 1 if criterion == "l1" else 2
    total = torch.zeros(group.size, dtype=torch.double)
    for path in group.producers:
        total += _filters(_layer(graph, path)).norm(power, dim=1)
    return total


def _gram(graph: Graph, group: Group, norms: Norms) -> tuple[Tensor, Tensor]:
    """Return products of the scaled rows, and the shift per channel behind the last layer.

    Rows of several producers stand side by side. A depthwise layer multiplies every weight of a
    row with each of its own: the product of two such rows is the product of both products.
    """
    gram = torch.zeros(group.size, group.size, dtype=torch.double)
    bias = torch.zeros(group.size, dtype=torch.double)
    for path in group.producers:
        rows, shift = _scaled(graph, path, norms)
        gram += rows @ rows.T
        bias += shift
    whole = {site.target for site in group.sites if site.kind == "through" and site.spread == 1}
    for path in group.through:
        rows, shift = _scaled(graph, path, norms)
        if path in whole and len(rows) == group.size:
            gram, bias = gram * (rows @ rows.T), shift
    return gram, bias


def _scaled(graph: Graph, path: str, norms: Norms) -> tuple[Tensor, Tensor]:
    """Return filters and bias with the batch norm right behind the layer folded in."""
    layer = _layer(graph, path)
    rows = _filters(layer)
    shift = bias_or_zero(layer, len(rows))
    norm = norms.get(path)
    if norm is None:
        return rows, shift
    scale, offset = norm_affine(norm.module)
    return rows * scale.unsqueeze(1), shift * scale + offset


def _filters(layer: Layer) -> Tensor:
    """Return the weights of every output channel as a row, in double precision."""
    weight: Tensor = layer.weight.detach().double()
    if isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1:
        weight = weight.transpose(0, 1)
    return weight.flatten(1)


def _lost_energy(graph: Graph, group: Group, context: Context, gram: Tensor) -> Tensor:
    """Return each channel's part in the energy that the readers get from the group.

    Where the moments of a reader's input are not known, a channel has the energy of its filters.
    """
    if all(use.layer in context.moments for use in group.users):
        energy = _read_energy(graph, group, context, moments=True).sum(1)
    else:
        energy = _read_energy(graph, group, context, moments=False)[:, 0] * gram.diagonal()
    return energy / energy.sum().clamp_min(torch.finfo(torch.double).tiny)


def _read_energy(graph: Graph, group: Group, context: Context, *, moments: bool) -> Tensor:
    """Return per channel the energy of the readers' outputs by its variance and by its mean.

    Batch norms of the readers are folded in. Without moments, variances are 1 and means 0. A mean
    is the same all over a kernel's window: its taps add up before they are squared.
    """
    total = torch.zeros(group.size, 2, dtype=torch.double)
    for use in group.users:
        layer = _layer(graph, use.layer)
        weight = layer.weight.detach().double()
        norm = context.norms.get(use.layer)
        if norm is not None:
            weight = scale_outputs(layer, weight, norm_affine(norm.module)[0])
        axis = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
        taps = weight.transpose(0, axis).flatten(2) if weight.dim() == 4 else weight.T.unsqueeze(2)
        energy = torch.stack([taps.square().sum((1, 2)), taps.sum(2).square().sum(1)], 1)
        if moments:
            known = context.moments[use.layer]
            channel_axis = -1 if isinstance(layer, nn.Linear) else 1
            flat = [m.double().transpose(0, channel_axis) for m in (known.var, known.mean.square())]
            energy = energy * torch.stack([one.flatten(1).mean(1) for one in flat], 1)
        read = energy[use.offset : use.offset + group.size * use.spread]
        total += read.reshape(group.size, use.spread, 2).sum(1)
    return total


def _layer(graph: Graph, path: str) -> Layer:
    layer = graph.module.get_submodule(path)
    assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    return layer
