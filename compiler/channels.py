"""A graph in; groups of channels that go together out, and the graph without some of them.

Channels of a residual sum belong to all layers that are summed; depthwise layers, batch norms and
per-channel constants shrink along; concatenation and flattening move them. A group that anything
touches which is not understood cannot be pruned, and says why.

A convolution with groups stays legal because each of its groups loses equally many channels, on the
side that it reads and on the side that it makes, each side by itself. Which ones is free within
each group, so the criteria still choose, the convolution shrinks on both sides as a dense one does,
and what is left of a group makes up for what is gone. Removing whole groups would tie both sides
together, in units of a whole group, and leave nothing that could make up for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from dfqc.compiler._channel_spans import Site, Trail, Use
from dfqc.compiler._channel_walk import Walk, walk
from dfqc.compiler.graph import Graph, copy_graph, verify
from dfqc.compiler.passes._layers import Layer

__all__ = ["Group", "Site", "Use", "find_groups", "remove"]


@dataclass(frozen=True)
class Group:
    """Channels that must be removed together.

    Attributes:
        name: the first producer.
        size: number of channels.
        slices: the channels are so many equal runs, and equally many of each stay: the groups of
            convolutions that make or read them; 1 if there are none.
        producers: dense layers whose output channels these are.
        norms: batch norms on them.
        through: depthwise layers, each channel through by itself, in the order they run.
        users: dense layers that read them.
        restore: the only use of a restorable group.
        prunable: False if channels cannot be removed; `reason` says why.
        reason: empty where prunable.
        residual: the channels are added up over several layers.
        restorable: one producer, then one chain of operators that keep channels apart and belong
            to this group alone, read by all users: a channel may be replaced by a linear
            combination of others at every user.
        chain: the nodes of that chain, in the order they run; empty if not restorable.
        sites: all that shrinks when channels go.
    """

    name: str
    size: int
    slices: int
    producers: tuple[str, ...]
    norms: tuple[str, ...]
    through: tuple[str, ...]
    users: tuple[Use, ...]
    restore: Use | None
    prunable: bool
    reason: str
    residual: bool
    restorable: bool
    chain: tuple[str, ...]
    sites: tuple[Site, ...] = field(repr=False)


def find_groups(graph: Graph) -> list[Group]:
    """List the groups of a graph, folded or not, in the order their first producers run."""
    found = walk(graph)
    atoms = found.atoms
    producers: defaultdict[int, list[str]] = defaultdict(list)
    for atom, path in found.producers:
        producers[atoms.find(atom)].append(path)
    sites: defaultdict[int, list[Site]] = defaultdict(list)
    for atom, site in found.sites:
        sites[atoms.find(atom)].append(site)
    uses: defaultdict[int, list[tuple[Use, Trail]]] = defaultdict(list)
    for atom, use, trail in found.uses:
        uses[atoms.find(atom)].append((use, trail))
    return [_make(found, atom, paths, sites[atom], uses[atom]) for atom, paths in producers.items()]


def remove(graph: Graph, keep: Mapping[str, Tensor]) -> Graph:
    """Return the graph without the channels that `keep` leaves out; it really is smaller.

    The function is that of the same graph with the users' weights for those channels set to
    zero. Module paths and node names stay.

    Args:
        graph: folded or not.
        keep: sorted int64 indices of the channels that stay, by group, equally many of each of its
            slices; other groups stay whole.

    Raises:
        ValueError: a group that is not there or cannot be pruned, or indices that do not fit.
    """
    groups = {group.name: group for group in find_groups(graph)}
    for name, indices in keep.items():
        _check(groups.get(name), name, indices)
    graph = copy_graph(graph)
    lost: defaultdict[tuple[str, str, int], list[Tensor]] = defaultdict(list)
    for name, indices in keep.items():
        size = groups[name].size
        gone = torch.ones(size, dtype=torch.bool).index_fill(0, indices.cpu(), value=False)
        for site in groups[name].sites:
            place = site.offset + gone.nonzero().flatten().unsqueeze(1) * site.spread
            every = (place + torch.arange(site.spread)).flatten()
            lost[site.kind, site.target, site.axis].append(every)
    nodes = {node.name: node for node in graph.module.graph.nodes}
    for (kind, target, axis), parts in lost.items():
        if kind == "size":
            _shrink_size(nodes[target], axis, sum(len(part) for part in parts))
        else:
            _shrink(graph.module, kind, target, axis, torch.cat(parts))
    graph.module.recompile()
    verify(graph, "remove")
    return graph


def _make(
    found: Walk,
    atom: int,
    producers: Sequence[str],
    sites: Sequence[Site],
    uses: Sequence[tuple[Use, Trail]],
) -> Group:
    atoms = found.atoms
    reason = atoms.reasons.get(atom, "")
    if not reason and not uses:
        reason = "no layer reads these channels"
    slices = atoms.slices[atom]
    if not reason and atoms.sizes[atom] == slices:
        each = f" in each of the {slices} groups of a convolution" if slices > 1 else ""
        reason = f"there is only one channel{each}"
    users, trails = tuple(use for use, _ in uses), {trail for _, trail in uses}
    trail = trails.pop() if len(trails) == 1 else None
    alone = len(producers) == 1 and atom not in atoms.partial
    restorable = not reason and alone and trail is not None

    def targets(kind: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site.target for site in sites if site.kind == kind))

    return Group(
        name=producers[0],
        size=atoms.sizes[atom],
        slices=slices,
        producers=tuple(producers),
        norms=targets("norm"),
        through=targets("through"),
        users=users,
        restore=users[0] if restorable and len(users) == 1 else None,
        prunable=not reason,
        reason=reason,
        residual=atom in atoms.residual,
        restorable=restorable,
        chain=trail or () if restorable else (),
        sites=tuple(dict.fromkeys(sites)),
    )


def _check(group: Group | None, name: str, indices: Tensor) -> None:
    if group is None:
        raise ValueError(f"{name}: there is no such group of channels")
    if not group.prunable:
        raise ValueError(f"{name}: cannot be pruned: {group.reason}")
    values = indices.tolist()
    inside = all(0 <= value < group.size for value in values)
    if not values or not inside or values != sorted(set(values)):
        raise ValueError(f"{name}: expected sorted indices of 1 to {group.size} channels to keep")
    counts = torch.bincount(indices.cpu() // (group.size // group.slices), minlength=group.slices)
    if int(counts.min()) != int(counts.max()):
        raise ValueError(
            f"{name}: expected equally many channels to keep of each of {group.slices} slices"
        )


def _shrink_size(node: fx.Node, position: int, count: int) -> None:
    """Lower one number in the list of sizes that a reshape or expand was given."""
    key: Any = (
        None if len(node.args) > 1 else next(k for k in ("shape", "size") if k in node.kwargs)
    )
    sizes: Any = list(cast("Sequence[Any]", node.kwargs[key] if key else node.args[1]))
    sizes[position] -= count
    if key:
        node.kwargs = {**node.kwargs, key: sizes}
    else:
        node.args = (node.args[0], sizes, *node.args[2:])


def _shrink(root: nn.Module, kind: str, target: str, axis: int, lost: Tensor) -> None:
    """Take entries out of a layer, a batch norm or a parameter."""
    if kind == "tensor":
        owner, _, name = target.rpartition(".")
        _take(root.get_submodule(owner), name, axis, lost)
        return
    module: Any = root.get_submodule(target)
    if kind == "norm":
        for name in ("weight", "bias", "running_mean", "running_var"):
            _take(module, name, 0, lost)
        module.num_features -= len(lost)
    elif kind == "input":
        _take_weight(module, 0 if isinstance(module, nn.ConvTranspose2d) else 1, lost)
        _count(module, "in", len(lost))
    elif kind == "output":
        _take_weight(module, 1 if isinstance(module, nn.ConvTranspose2d) else 0, lost)
        _take(module, "bias", 0, lost)
        _count(module, "out", len(lost))
    else:
        _shrink_depthwise(module, lost)


def _shrink_depthwise(module: Any, lost: Tensor) -> None:
    """Take out input channels with all the outputs that they go to."""
    widening = module.out_channels // module.in_channels
    outputs = (lost.unsqueeze(1) * widening + torch.arange(widening)).flatten()
    _take(module, "weight", 0, lost if isinstance(module, nn.ConvTranspose2d) else outputs)
    _take(module, "bias", 0, outputs)
    module.in_channels -= len(lost)
    module.out_channels -= len(outputs)
    module.groups -= len(lost)


def _take_weight(module: Any, axis: int, lost: Tensor) -> None:
    """Drop channels of a weight; axis 1 is that of one group, beside which the others lie."""
    groups = getattr(module, "groups", 1)
    if axis == 0 or groups == 1:
        _take(module, "weight", axis, lost)
        return
    weight: Tensor = module.weight.detach()
    kept = torch.ones(groups * weight.shape[1], dtype=torch.bool)
    kept[lost] = False
    blocks = zip(weight.chunk(groups), kept.to(weight.device).chunk(groups), strict=True)
    left = torch.cat([block[:, own] for block, own in blocks])
    module.weight = nn.Parameter(left, requires_grad=False)


def _count(layer: Layer, side: str, lost: int) -> None:
    name = f"{side}_features" if isinstance(layer, nn.Linear) else f"{side}_channels"
    setattr(layer, name, getattr(layer, name) - lost)


def _take(module: nn.Module, name: str, axis: int, lost: Tensor) -> None:
    """Drop entries of a parameter or buffer; nothing to do where the module has none."""
    value = getattr(module, name)
    if value is None:
        return
    kept = torch.ones(value.shape[axis], dtype=torch.bool, device=value.device)
    kept[lost.to(value.device)] = False
    left = value.detach().index_select(axis, kept.nonzero().flatten()).contiguous()
    is_parameter = isinstance(value, nn.Parameter)
    setattr(module, name, nn.Parameter(left, requires_grad=False) if is_parameter else left)
