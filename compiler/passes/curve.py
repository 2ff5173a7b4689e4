"""One group of channels in; the order to remove them in and the error after each removal out.

The error is what is left after the users were fitted to the channels that stay (`restore`), so
that a channel which others can stand in for costs nothing, however large its weights are. Slices of
a group lose their channels by turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from dfqc.compiler.channels import Group, Use
from dfqc.compiler.graph import Graph, layer_nodes
from dfqc.compiler.moments import Moments, node_moments
from dfqc.compiler.operators import ADD
from dfqc.compiler.passes._criteria import Curve
from dfqc.compiler.passes._layers import readers
from dfqc.compiler.passes._outputs import find_outputs
from dfqc.compiler.passes._patches import PatchMoments
from dfqc.compiler.passes._reads import Read, split_reads
from dfqc.compiler.passes.restore import Options, Restorer

LARGEST = 1200  # side of the largest matrix that is taken down tap by tap


def error_curves(graph: Graph, groups: Sequence[Group], options: Options) -> dict[str, Curve]:
    """Return `error_curve` of several groups by name, as `prune.choose` takes them.

    A channel's score is the error when it goes. Groups whose users' inputs are not understood are
    left out.
    """
    restorer, moments = Restorer(graph, {}, options), node_moments(graph)
    found: dict[str, Curve] = {}
    for group in groups:
        curve = _trace_curve(restorer, moments, group)
        if curve is not None:
            order, errors = curve
            scores = torch.empty_like(errors).scatter(0, order, errors)
            found[group.name] = Curve(order, errors, scores)
    return found


def error_curve(graph: Graph, group: Group, options: Options) -> tuple[Tensor, Tensor]:
    """Return the channels in the order of greedy removal, and the restored error after each.

    The error is the expected squared change of the users' outputs behind their batch norms, in
    parts of the variance of the tensor that they end up in: the residual sum, where there is one.
    Removing one block of rows from a least-squares problem costs V_j (C^-1_jj)^-1 V_j^T (Hassibi
    and Stork 1993), and both V and C^-1 are updated in place: O(channels^3) in all.

    Returns:
        Both of (channels,); errors grow.

    Raises:
        ValueError: no user of the group has an input that is understood.
    """
    curve = _trace_curve(Restorer(graph, {}, options), node_moments(graph), group)
    if curve is None:
        raise ValueError(f"{group.name}: nothing is known about the inputs of its users")
    return curve


@dataclass
class _Problem:
    """One part's least squares: scaled weights (outputs, channels, taps) and C^-1, both live."""

    read: Read
    weight: Tensor
    inverse: Tensor  # (channels, taps, channels, taps)

    def costs(self) -> Tensor:
        """Return what removing each channel of the part costs now, (channels,)."""
        index = torch.arange(self.weight.shape[1])
        blocks = self.inverse[index, :, index]  # (channels, taps, taps)
        if self.weight.shape[2] == 1:
            return self.weight.square().sum((0, 2)) / blocks[:, 0, 0]
        own = self.weight.permute(1, 2, 0)  # (channels, taps, outputs)
        solved: Tensor = torch.linalg.solve(blocks, own)
        return (own * solved).sum((1, 2))

    def remove(self, channel: int) -> None:
        """Fit the others to what one channel did, and take it out."""
        count, taps = self.weight.shape[1:]
        columns = self.inverse[:, :, channel].reshape(count * taps, taps)
        gain = torch.linalg.solve(self.inverse[channel, :, channel], columns.mT).mT
        own = self.weight[:, channel].clone()
        self.weight -= (own @ gain.mT).view_as(self.weight)
        self.inverse -= (gain @ columns.mT).view_as(self.inverse)
        self.weight[:, channel] = 0
        # Out of the problem: a unit block that costs nothing and touches nothing.
        self.inverse[channel], self.inverse[:, :, channel] = 0, 0
        self.inverse[channel, :, channel] = torch.eye(taps, dtype=self.inverse.dtype)


@torch.no_grad()
def _trace_curve(
    restorer: Restorer, known: Mapping[str, Moments], group: Group
) -> tuple[Tensor, Tensor] | None:
    problems = [p for use in group.users for p in _pose(restorer, known, group, use)]
    if not problems:
        return None
    slices = torch.arange(group.size) // (group.size // group.slices)
    gone = torch.zeros(group.size, dtype=torch.bool)
    ahead = torch.zeros(group.slices, dtype=torch.bool)  # slices that lost one more than others
    costs = torch.zeros(len(problems), group.size, dtype=torch.float64)
    order, errors, total = [], [], 0.0
    stale = list(range(len(problems)))
    for _ in range(group.size):
        for i in stale:
            costs[i, problems[i].read.channels] = problems[i].costs()
        now = costs.sum(0)
        cheapest = int(now.masked_fill(gone | ahead[slices], torch.inf).argmin())
        total += max(0.0, float(now[cheapest]))
        stale = [i for i, problem in enumerate(problems) if problem.read.holds(cheapest)]
        for i in stale:
            problems[i].remove(cheapest - int(problems[i].read.channels[0]))
        gone[cheapest] = True
        ahead[slices[cheapest]] = True
        if ahead.all():
            ahead.zero_()
        order.append(cheapest)
        errors.append(total)
    return torch.tensor(order), torch.tensor(errors, dtype=torch.float64)


def _pose(
    restorer: Restorer, known: Mapping[str, Moments], group: Group, use: Use
) -> list[_Problem]:
    """Return the problem of each part of a user, none if its input is not understood."""
    layer = restorer.original.module.get_submodule(use.layer)
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return []
    whole = layer.weight.detach().cpu().double()
    parts: list[tuple[Read, Tensor, PatchMoments]] = []
    for read in split_reads(layer, group, use):
        every = torch.arange(len(read.channels))
        moments = restorer.patch_moments(layer, group, use, read, every)
        if moments is None:
            return []
        parts.append((read, read.take(whole), moments))
    found = torch.cat([m.predict(weight, m.target_rows()) for _, weight, m in parts])
    scale = _importance(restorer.original, use.layer, known, found)
    return [
        _pose_part(read, weight * scale[read.rows].sqrt().view(-1, 1, 1), moments, restorer)
        for read, weight, moments in parts
    ]


def _pose_part(read: Read, weight: Tensor, moments: PatchMoments, restorer: Restorer) -> _Problem:
    """Return the problem of one part, its weight scaled."""
    size, taps = weight.shape[1:]
    covariance = moments.near
    if covariance is None or len(covariance) > LARGEST:
        # One problem for all taps, as if they were further outputs.
        covariance = moments.channels
        weight = weight.movedim(2, 1).flatten(0, 1)[:, :, None]
        taps = 1
    damped = covariance.clone()
    damped.diagonal().add_(restorer.options.ridge * damped.diagonal().mean().clamp_min(1e-30))
    values, vectors = torch.linalg.eigh(damped)
    inverse = (vectors / values.clamp_min(1e-6 * values[-1])) @ vectors.mT
    # Only products of columns count, which a triangle keeps: fewer rows to bring up to date.
    flat = weight.flatten(1)
    if len(flat) > flat.shape[1]:
        flat = torch.linalg.qr(flat, mode="r").R
    fewer = flat.reshape(-1, size, taps).clone()
    return _Problem(read, fewer, inverse.view(size, taps, size, taps))


def _importance(graph: Graph, path: str, known: Mapping[str, Moments], found: Tensor) -> Tensor:
    """Return what one unit of error in every output counts, (outputs,).

    Outputs are scaled as their batch norm does, then compared with the whole tensor they join.
    """
    norm = find_outputs(graph, path).norm
    scale = torch.ones_like(found)
    if norm is not None and norm.weight is not None:
        scale = norm.weight.detach().cpu().double().square() / found.clamp_min(1e-30)
    node = dict(layer_nodes(graph))[path]
    landing = _landing(node)
    whole = (scale * found).sum()
    if landing.name in known:
        var = known[landing.name].var
        whole = var.mean([0, *range(2, var.dim())]).sum()
    return scale / whole.clamp_min(1e-30)


def _landing(node: fx.Node) -> fx.Node:
    """Return the residual sum that a layer's output joins, else what its batch norm puts out."""
    behind = node
    for _ in range(2):
        users = readers(behind)
        if len(users) != 1:
            return behind
        if users[0].target is ADD:
            return users[0]
        if users[0].op != "call_module":
            return behind
        behind = users[0]
    return behind
