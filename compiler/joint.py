"""Pruning and weight bits under limits: networks and judging images in, their trade-offs out.

Every point is a network that was pruned, restored in closed form and rounded to nearest with its
biases corrected, all without data; what it costs is the bytes of its file, its parameters and its
multiply-adds, what it loses the divergence of its outputs from the original's. Which layers get
which bits is decided later, for the channels that are chosen here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dfqc.compiler import affine
from dfqc.compiler.contracts import QuantState
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph, copy_graph, count_macs, count_params
from dfqc.compiler.passes import bias
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.quantize._ranges import weight_grid
from dfqc.compiler.spec import Plan
from dfqc.compiler.units import format_size

PARTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.85)  # that are tried, of what is shared out
_NAMES = {"bytes": "--size", "params": "--params", "macs": "--macs"}
_UNITS = {"bytes": "bytes", "params": "parameters", "macs": "multiply-adds"}


class Way(NamedTuple):
    """How a network is pruned: a part of its `channels`, `params` or `macs` goes."""

    share: str
    part: float


@dataclass(frozen=True)
class Point:
    """A network that was pruned and rounded.

    Attributes:
        share: what was shared out over the layers by error: see `Way`; None: nothing was removed.
        part: of it that was removed.
        bits: of the weights that are free to choose; None: those of the recipe.
        bytes: of the file; None: not measured, because nothing limits it.
        params: of the smaller network.
        macs: for one image.
        distance: mean KL divergence of the outputs from the original network's.
    """

    share: str | None
    part: float
    bits: int | None
    bytes: int | None
    params: int
    macs: int
    distance: float


def measure(
    original: Graph,
    smaller: Graph,
    images: Tensor,
    plan_at: Callable[[Graph, int | None], Plan],
    file_bytes: Callable[[Graph, Plan], int | None],
    *,
    widths: Sequence[int | None],
    way: Way | None,
) -> list[Point]:
    """Return the points of one network, at all widths.

    Args:
        original: unfolded network.
        smaller: the same pruned and restored; or itself.
        images: (n, c, h, w), normalized, to compare outputs on.
        plan_at: returns the plan of a folded network whose free weights have so many bits.
        file_bytes: returns the size of the file of a folded network under a plan, or None.
        widths: weight bits to try.
        way: in which it was pruned.
    """
    share, part = way or (None, 0.0)
    folded, points = fold(smaller), []
    counts = count_params(smaller), count_macs(smaller)
    for bits in widths:
        plan = plan_at(folded, bits)
        rounded = _round(folded, smaller, plan)
        distance = bias.divergence(original, rounded, images, device=torch.device("cpu"))
        points.append(Point(share, part, bits, file_bytes(folded, plan), *counts, distance))
    return points


def find_front(points: Sequence[Point], costs: Sequence[str]) -> list[Point]:
    """Return the points that no other one beats, cheapest first.

    One beats another that is at most as cheap by all of `costs` (`bytes`, `params`, `macs`) and at
    most as near. Of equal points the first is kept.
    """

    def rank(point: Point) -> tuple[float, ...]:
        return (*(getattr(point, cost) for cost in costs), point.distance)

    front: list[Point] = []
    for point in sorted(points, key=rank):  # whatever beats a point comes before it
        if not any(
            all(a <= b for a, b in zip(rank(other), rank(point), strict=True)) for other in front
        ):
            front.append(point)
    return front


def choose(points: Sequence[Point], limits: Mapping[str, int]) -> Point:
    """Return the nearest point within all limits; of equal ones, the least pruned.

    Args:
        points: to choose from.
        limits: largest `bytes`, `params` and `macs`, of what is limited.

    Raises:
        UsageError: none is so small.
    """
    able = [point for point in points if _keeps(point, limits)]
    if not able:
        raise UsageError(_explain(points, limits))
    return min(able, key=lambda p: (p.distance, -p.params, -(p.bits or 0)))


def to_json(points: Sequence[Point], limits: Mapping[str, int]) -> list[dict[str, object]]:
    """Return points as plain data, marked: on the front of what is limited, within the limits."""
    front = set(find_front(points, tuple(limits)))
    return [
        {**dataclasses.asdict(point), "front": point in front, "within": _keeps(point, limits)}
        for point in points
    ]


def _keeps(point: Point, limits: Mapping[str, int]) -> bool:
    return all(getattr(point, cost) <= limit for cost, limit in limits.items())


def _explain(points: Sequence[Point], limits: Mapping[str, int]) -> str:
    """Say which limit no point keeps, or what comes nearest to all of them together."""
    for cost, limit in limits.items():
        least = min(points, key=lambda p: getattr(p, cost))
        reached = getattr(least, cost)
        if reached > limit:
            read = f"{reached:,} ({_describe(least)}"
            read += f", {format_size(reached)})" if cost == "bytes" else ")"
            return (
                f"{_NAMES[cost]}: {limit:,} {_UNITS[cost]} are less than the least of what was "
                f"tried, {read}; ask for more, or allow --prune-residual"
            )
    least = min(points, key=lambda p: max(getattr(p, c) / limits[c] for c in limits))
    asked = " and ".join(f"{_NAMES[cost]} ({limit:,})" for cost, limit in limits.items())
    found = ", ".join(f"{getattr(least, cost):,} {_UNITS[cost]}" for cost in limits)
    return (
        f"{asked}: no network keeps all of them; the nearest has {found} ({_describe(least)}); "
        "ask for more of one"
    )


def _describe(point: Point) -> str:
    removed = f"{point.part:.0%} of the {point.share} removed" if point.share else "nothing removed"
    return removed if point.bits is None else f"{removed}, w{point.bits}"


def _round(folded: Graph, unfolded: Graph, plan: Plan) -> Graph:
    """Return the folded network with rounded weights and corrected biases, in float."""
    weights = {}
    for name, layer in plan.layers.items():
        if layer.weight is not None:
            exact = folded.module.get_submodule(name).weight
            assert isinstance(exact, Tensor)
            grid = weight_grid(exact.detach().cpu(), layer.weight, "mse")
            weights[name] = affine.round_to_grid(exact.cpu(), grid, layer.weight.axis or 0)
    state = QuantState(plan, weights, {}, {})
    biases, _ = bias.analytic_biases(folded, unfolded, state)
    rounded = copy_graph(folded)
    for name, weight in weights.items():
        scheme, module = plan.layers[name].weight, rounded.module.get_submodule(name)
        assert scheme is not None
        values = affine.dequantize_weight(weight, scheme.axis)
        module.weight = torch.nn.Parameter(values, requires_grad=False)
        if name in biases:
            module.bias = torch.nn.Parameter(biases[name], requires_grad=False)
    return rounded
