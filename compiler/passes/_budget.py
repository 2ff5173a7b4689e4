"""Error curves of groups and a budget in; how many channels each group loses out.

Error per saved unit decides: every curve is taken along its lower convex hull, steps of all
groups are sorted by what they cost per unit that they save, and as many are made as the budget
needs, the last one only as far as needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import nn

from dfqc.compiler.channels import Group
from dfqc.compiler.graph import Graph, count_macs, count_params, layer_nodes, node_shapes
from dfqc.compiler.passes._criteria import Curve

Unit: TypeAlias = Literal["channels", "params", "macs"]


class Step(NamedTuple):
    """Remove channels of a group until `gone` are gone; `price` is the error per unit saved."""

    price: float
    name: str
    gone: int


@dataclass
class _Item:
    """Something of `amount` at full width that shrinks with the groups on its axes."""

    amount: int
    axes: list[list[tuple[str, float]]]  # per axis: groups, and the part of it one channel is


class Costs:
    """What is left of one unit when channels go, in closed form; measured once at full width."""

    def __init__(self, graph: Graph, groups: Sequence[Group], unit: Unit) -> None:
        self._items: list[_Item] = []
        if unit == "channels":
            self._items = [_Item(g.size, [[(g.name, 1 / g.size)]]) for g in groups]
            self.full = sum(group.size for group in groups)
        else:
            self.full = count_params(graph) if unit == "params" else count_macs(graph)
            self._collect(graph, groups, unit)
        self._fixed = self.full - sum(item.amount for item in self._items)

    def left(self, removed: Mapping[str, int]) -> int:
        """Return what is left when groups lose these numbers of channels."""
        total = float(self._fixed)
        for item in self._items:
            amount = float(item.amount)
            for axis in item.axes:
                amount *= 1 - sum(removed.get(name, 0) * part for name, part in axis)
            total += amount
        return round(total)

    def _collect(self, graph: Graph, groups: Sequence[Group], unit: Unit) -> None:
        runs = _count_runs(graph)
        axes: dict[tuple[str, str], list[tuple[str, float]]] = {}
        for group in groups:
            for site in group.sites:
                size = _length(graph, site.kind, site.target, site.axis)
                if size:
                    key = (site.target, "in" if site.kind == "input" else "out")
                    axes.setdefault(key, []).append((group.name, site.spread / size))
        for target in dict.fromkeys(target for target, _ in axes):
            out, into = axes.get((target, "out"), []), axes.get((target, "in"), [])
            module = _find(graph, target)
            if isinstance(module, nn.Parameter):
                weight, rest = 0, module.numel()
            else:
                assert isinstance(module, nn.Module)
                own = {name: p.numel() for name, p in module.named_parameters(recurse=False)}
                layer = target in runs
                weight = own.get("weight", 0) if layer else 0
                rest = sum(own.values()) - weight
            times = runs.get(target, 0) if unit == "macs" else 1
            self._items.append(_Item(weight * times, [out, into]))
            if unit == "params":
                self._items.append(_Item(rest, [out]))


def hull(curve: Curve, counts: Sequence[int]) -> list[tuple[int, float]]:
    """Return the (count, error) on the lower convex hull over the allowed counts, from (0, 0)."""
    points: list[tuple[int, float]] = [(0, 0.0)]
    for count in counts:
        point = (count, float(curve.error[count - 1]))
        while len(points) > 1 and _turns_down(points[-2], points[-1], point):
            points.pop()
        points.append(point)
    return points


def allocate(
    curves: Mapping[str, Curve],
    counts: Mapping[str, Sequence[int]],
    costs: Costs,
    target: int,
    removed: Mapping[str, int],
) -> dict[str, int] | None:
    """Return the channels that each group loses so that at most `target` is left.

    Args:
        curves: by group.
        counts: the numbers of channels that a group may lose, growing.
        costs: what is left.
        target: in the unit of `costs`.
        removed: what groups that are not to be decided on lose.

    Returns:
        None if all that may go is not enough.
    """
    start = costs.left(removed)
    steps: list[Step] = []
    for name, curve in curves.items():
        unit = (start - costs.left({**removed, name: counts[name][-1]})) if counts[name] else 0
        points = hull(curve, counts[name]) if unit > 0 else []
        for (before, low), (after, high) in itertools.pairwise(points):
            saved = unit * (after - before) / counts[name][-1]
            steps.append(Step((high - low) / saved, name, after))
    steps.sort(key=lambda step: step.price)  # stable: the hull's own order stays
    low, high = 0, len(steps)
    if costs.left({**removed, **_apply(steps)}) > target:
        return None
    while low < high:
        middle = (low + high) // 2
        if costs.left({**removed, **_apply(steps[:middle])}) <= target:
            high = middle
        else:
            low = middle + 1
    made = {**removed, **_apply(steps[:low])}
    if low:  # the last step, only as far as needed
        name, before = steps[low - 1].name, _apply(steps[: low - 1]).get(steps[low - 1].name, 0)
        for count in counts[name]:
            if before < count <= made[name] and costs.left({**made, name: count}) <= target:
                made[name] = count
                break
    return made


def _apply(steps: Sequence[Step]) -> dict[str, int]:
    return {step.name: step.gone for step in steps}


def _turns_down(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Report whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _count_runs(graph: Graph) -> dict[str, int]:
    """Count how often each weight of a layer is multiplied for one image."""
    shapes = node_shapes(graph, 1)
    runs: dict[str, int] = {}
    for path, node in layer_nodes(graph):
        layer = graph.module.get_submodule(path)
        shape = torch.Size(shapes[node.name])
        if isinstance(layer, nn.ConvTranspose2d):
            shape = torch.Size(shapes[node.all_input_nodes[0].name])
        features = shape[-1] if isinstance(layer, nn.Linear) else shape[1]
        runs[path] = runs.get(path, 0) + shape.numel() // features
    return runs


def _length(graph: Graph, kind: str, target: str, axis: int) -> int:
    """Return the length of the axis that a site is on; 0 for what has no parameters."""
    if kind == "size":
        return 0
    found = _find(graph, target)
    if isinstance(found, torch.Tensor):
        return found.shape[axis] if isinstance(found, nn.Parameter) else 0
    if isinstance(found, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return found.num_features
    assert isinstance(found, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    if isinstance(found, nn.Linear):
        return found.in_features if kind == "input" else found.out_features
    return found.out_channels if kind == "output" else found.in_channels


def _find(graph: Graph, target: str) -> nn.Module | torch.Tensor:
    owner, _, name = target.rpartition(".")
    found = getattr(graph.module.get_submodule(owner), name)
    assert isinstance(found, (nn.Module, torch.Tensor))
    return found
