"""Pruning and weight bits under one limit: a network and judging images in, its trade-offs out.

Every point is a network that was pruned, restored in closed form and rounded to nearest with its
biases corrected, all without data; what it costs is the bytes of its file, what it loses the
divergence of its outputs from the original's. Which layers get which bits is decided later, for the
part of the channels that is chosen here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfqc.compiler import affine
from dfqc.compiler.contracts import Progress, QuantState, silent
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph, copy_graph, count_macs, count_params
from dfqc.compiler.passes import bias
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.quantize._ranges import weight_grid
from dfqc.compiler.spec import Plan
from dfqc.compiler.units import format_size

PARTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)  # of the channels that can go


@dataclass(frozen=True)
class Point:
    """A network that was pruned and rounded.

    Attributes:
        part: of the channels inside of blocks that were removed.
        bits: of the weights that are free to choose.
        bytes: of the file.
        params: of the smaller network.
        macs: for one image.
        distance: mean KL divergence of the outputs from the original network's.
    """

    part: float
    bits: int
    bytes: int
    params: int
    macs: int
    distance: float


def measure(
    original: Graph,
    images: Tensor,
    cut: Callable[[float], Graph | None],
    plan_at: Callable[[Graph, int], Plan],
    file_bytes: Callable[[Graph, Plan], int],
    *,
    widths: Sequence[int],
    parts: Sequence[float] = PARTS,
    progress: Progress = silent,
) -> list[Point]:
    """Return the points of all parts and widths, fewest channels removed first.

    Args:
        original: unfolded network.
        images: (n, c, h, w), normalized, to compare outputs on.
        cut: returns the unfolded network without that part of its channels, restored; None where
            so many cannot go.
        plan_at: returns the plan of a folded network whose free weights have so many bits.
        file_bytes: returns the size of the file of a folded network under a plan.
        widths: weight bits to try.
        parts: to try; 0 is the original network.
        progress: called per network.
    """
    points = []
    for number, part in enumerate(parts):
        smaller = original if part == 0 else cut(part)
        progress(number, len(parts), f"{part:.0%} of the channels")
        if smaller is None:
            continue
        folded = fold(smaller)
        counts = count_params(smaller), count_macs(smaller)
        for bits in widths:
            plan = plan_at(folded, bits)
            rounded = _round(folded, smaller, plan)
            distance = bias.divergence(original, rounded, images, device=torch.device("cpu"))
            points.append(Point(part, bits, file_bytes(folded, plan), *counts, distance))
    return points


def find_front(points: Sequence[Point]) -> list[Point]:
    """Return the points to which no other is at least as small and as near, smallest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, p.distance)):
        if not front or point.distance < front[-1].distance:
            front.append(point)
    return front


def choose(points: Sequence[Point], limit: int) -> Point:
    """Return the nearest point of at most `limit` bytes; of equal ones, the least pruned.

    Raises:
        UsageError: none is so small.
    """
    able = [point for point in points if point.bytes <= limit]
    if not able:
        least = min(points, key=lambda p: p.bytes)
        raise UsageError(
            f"--size: {limit:,} bytes are less than the smallest file that pruning and few bits "
            f"reach together, {least.bytes:,} ({format_size(least.bytes)}, {least.part:.0%} of the "
            f"channels removed, w{least.bits}); ask for more"
        )
    return min(able, key=lambda p: (p.distance, p.part, -p.bits))


def to_json(points: Sequence[Point]) -> list[dict[str, float]]:
    """Return points as plain data, with a mark for those on the front."""
    front = set(find_front(points))
    return [{**dataclasses.asdict(point), "front": point in front} for point in points]


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
