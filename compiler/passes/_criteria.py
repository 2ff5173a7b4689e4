"""A graph and a group of its channels in; the order to remove them in and what each step costs.

No images: rows are the filters that make a channel, scaled by the batch norm behind them; a
removed channel's error reaches the next layers through the columns that read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn

from dfqc.compiler.channels import Group, Use
from dfqc.compiler.graph import Graph, Norm, batch_norms, has_batch_norm, layer_nodes
from dfqc.compiler.moments import Moments, node_moments
from dfqc.compiler.operators import ADD
from dfqc.compiler.passes._layers import (
    Layer,
    bias_or_zero,
    input_taps,
    norm_affine,
    output_rows,
    readers,
    scale_outputs,
)

Criterion: TypeAlias = Literal["l1", "l2", "bn", "output", "restored"]

_STEPS = 512  # greedy decisions per group; wider groups lose several channels in one
_ROWS = 64  # of a table at a time, so that their squares stay in the cache


@dataclass(frozen=True)
class Curve:
    """Channels of a group in the order to remove them.

    Attributes:
        order: all channels (int64), the first to go first.
        error: what the readers' outputs lose when the first 1, 2, .. size channels of `order` are
            gone, as a part of their energy, or of that of the residual sum that they go to; over
            all readers; grows.
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
    layers: Mapping[str, fx.Node]  # by path
    moments: Mapping[str, Moments]  # of nodes by name, where batch norms tell them


def gather_context(graph: Graph) -> Context:
    """Collect batch norms and expected activations."""
    moments = node_moments(graph) if has_batch_norm(graph) else {}
    return Context(find_norms(graph), dict(layer_nodes(graph)), moments)


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
    done go by `output`. Several producers count together. Slices of a group go by turns.
    """
    gram, bias = _gram(graph, group, context.norms)
    reads = [_read(graph, group, use, context, gram.diagonal()) for use in group.users]
    energy = torch.stack([read.energy for read in reads]).sum(0)
    if criterion == "restored" and group.restorable:
        rows = gram + shift * torch.outer(bias, bias)
        if group.slices > 1:  # the groups of a convolution share no inputs, or no outputs
            owner = torch.arange(group.size) // (group.size // group.slices)
            rows = rows * (owner == owner[:, None])
        weight = torch.zeros_like(bias)
        for read in reads:  # what is lost when all channels are gone does not depend on how
            weight += read.columns * read.energy.sum() / _sum(read.columns * rows.diagonal())
        order, error = eliminate(rows, weight, ridge)
        if group.slices > 1:  # slices are apart: each step costs what it did
            turn = take_turns(order, group.slices)
            order, error = order[turn], error.diff(prepend=error.new_zeros(1))[turn].cumsum(0)
        return Curve(order, error, torch.empty_like(error).scatter_(0, order, error))
    scores = energy
    if criterion in ("l1", "l2"):
        scores = _norm_scores(graph, group, criterion)
    elif criterion == "bn":
        scores = gram.diagonal().sqrt()
    order = torch.argsort(scores, stable=True)
    order = order[take_turns(order, group.slices)]
    return Curve(order, energy[order].cumsum(0), scores)


def take_turns(order: Tensor, slices: int) -> Tensor:
    """Return the places of `order` so that all slices lose their first, then their second, ..."""
    if slices == 1:
        return torch.arange(len(order))
    owner = order // (len(order) // slices)
    turns = nn.functional.one_hot(owner, slices).cumsum(0)
    return torch.argsort(turns.gather(1, owner.unsqueeze(1)).flatten(), stable=True)


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
        lifted = torch.cat([part.square() @ gone for part in table.split(_ROWS)])
        cost = weight * (1 / pivot - level) + lifted / pivot
        cost = cost.masked_fill(~left, torch.inf)
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
        table.addmm_(columns, rows, alpha=-1)
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
    for path in group.through:
        layer = _layer(graph, path)
        if isinstance(layer, nn.Linear) or layer.out_channels != group.size:
            continue  # widens, or filters a concatenation
        rows, shift = _scaled(graph, path, norms)
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
    return output_rows(layer, layer.weight.detach().double())


class _Read(NamedTuple):
    """What one reader gets from each channel of a group, batch norms of the reader folded in."""

    columns: Tensor  # squared norms of its weights
    energy: Tensor  # part of the energy of the sum that its output goes to


def _read(graph: Graph, group: Group, use: Use, context: Context, rows: Tensor) -> _Read:
    """Weigh a group's channels as one reader does; `rows` is the energy of their filters.

    By the moments of the reader's input where they are known, else by the filters. A mean is the
    same all over a kernel's window: its taps add up before they are squared.
    """
    layer, node = _layer(graph, use.layer), context.layers[use.layer]
    weight = layer.weight.detach().double()
    norm = context.norms.get(use.layer)
    if norm is not None:
        weight = scale_outputs(layer, weight, norm_affine(norm.module)[0])
    taps = input_taps(layer, weight)
    columns = taps.square().sum((1, 2))
    own = slice(use.offset, use.offset + group.size * use.spread)
    read = columns[own].reshape(group.size, use.spread).sum(1)
    known = context.moments.get(node.all_input_nodes[0].name)
    if known is None:
        energy = read * rows
        part = read.sum() / _sum(columns)
    else:
        channel_axis = -1 if isinstance(layer, nn.Linear) else 1
        maps = [m.transpose(0, channel_axis) for m in (known.var, known.mean.square())]
        var, mean = (one.flatten(1).mean(1) for one in maps)
        every = columns * var + taps.sum(2).square().sum(1) * mean
        energy = every[own].reshape(group.size, use.spread).sum(1)
        part = energy.sum() / _sum(every)
    return _Read(read, energy / _sum(energy) * part * _share(node, context))


def _share(node: fx.Node, context: Context) -> float:
    """Return which part of a residual sum's variance comes from a layer; 1 if it goes to none.

    An error in a branch is small beside a stream that carries much more.
    """
    branch, moments = node, context.moments
    while len(users := readers(branch)) == 1:
        (user,) = users
        if user.target is ADD:
            if branch.name not in moments or user.name not in moments:
                return 1.0
            total = float(moments[user.name].var.mean())
            return min(1.0, float(moments[branch.name].var.mean()) / total) if total else 1.0
        if user.op == "output" or str(user.target) in context.layers:
            return 1.0
        branch = user
    return 1.0


def _sum(values: Tensor) -> Tensor:
    """Return the sum, or something that can be divided by."""
    return values.sum().clamp_min(torch.finfo(torch.double).tiny)


def _layer(graph: Graph, path: str) -> Layer:
    layer = graph.module.get_submodule(path)
    assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    return layer
