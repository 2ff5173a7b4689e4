"""What is pruned, and how much, for limits on the model: a context in, the choice and why out.

Limits are the bytes of the file (--size), parameters (--params) and multiply-adds (--macs), alone
or together. Under --size weight bits are part of the trade; without it they are the recipe's.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler import plugins
from dfqc.compiler.batches import make_images
from dfqc.compiler.driver import Context
from dfqc.compiler.errors import UsageError
from dfqc.compiler.job import Job
from dfqc.compiler.options import plugin_options
from dfqc.compiler.storage import load_json, save_json

if TYPE_CHECKING:
    from torch import Tensor

    from dfqc.compiler.graph import Graph
    from dfqc.compiler.joint import Point, Way
    from dfqc.compiler.recipe import Recipe
    from dfqc.compiler.spec import Plan

log = logging.getLogger("dfqc.prune")

_IMAGES = 32  # that fit the batch norms; on noise, strong pruning looks harmless
_PACKED = 4
_RESERVES = 4  # grids of activations, which need images, add nodes and constants to the file
# Where channels cost least depends on what is counted, and which count serves a network best is
# told only by its outputs: at equal work one or the other is far better.
_SHARES = {"bytes": ("channels", "params"), "params": ("params", "channels"),
           "macs": ("macs", "channels")}  # fmt: skip
_HALVINGS = 8  # of the part of one count that just keeps the limit on another
_POINTS = "points.json"
_LIMITS = ("size", "avg-bits", "params", "macs")  # what was measured serves others, too
_DIGITS = 12  # 1 - (1 - part) is part again


def choose_way(context: Context, original: Graph) -> tuple[Way | None, dict[str, Any]]:
    """Return how to prune so that the limits cost least (None: not at all), and the trade-offs.

    Raises:
        UsageError: pruning and few bits together do not keep the limits.
    """
    from dfqc.compiler import joint
    from dfqc.compiler.passes.restore import restore
    from dfqc.compiler.plan import make_plan
    from dfqc.compiler.pruning import decide, rank_once, restoring
    from dfqc.compiler.stages import model_facts
    from dfqc.compiler.stages_allocate import RESERVE, file_bytes, list_free, plan_with

    job: Job = context.settings
    recipe, target = job.recipe, job.backend.TARGET
    facts = model_facts(original) | {"sha256": "0" * 64}
    limits = _limits(recipe, original)
    curves = rank_once(recipe, original)

    def keep(way: Way) -> Mapping[str, Tensor] | None:
        try:
            return decide(with_way(recipe, way), original, curves).keep
        except UsageError as error:
            log.info("prune: not %g of the %s: %s", way.part, way.share, error)
            return None

    def cut(way: Way) -> Graph | None:
        kept = keep(way)
        return restore(original, kept, restoring(recipe)) if kept else None

    def plan_at(folded: Graph, bits: int | None) -> Plan:
        base = make_plan(folded, target, recipe.asked_bits, recipe.rules, ends=recipe.ends_bits)
        if bits is None:
            return base
        return plan_with(job, folded, dict.fromkeys(list_free(job, base), bits))

    def size(folded: Graph, plan: Plan) -> int | None:
        if "bytes" not in limits:  # lowering takes longer than all the rest
            return None
        return file_bytes(job, folded, facts, plan) + _RESERVES * RESERVE * len(plan.quantizers)

    @functools.cache
    def images() -> Tensor:
        return _images(context)

    def measure(way: Way | None) -> list[joint.Point]:
        smaller = cut(way) if way else original
        if smaller is None:
            return []
        functions = (images(), plan_at, size)
        return joint.measure(original, smaller, *functions, widths=widths, way=way)

    widths = _widths(job)
    ways: list[Way | None] = [None, *_list_ways(recipe, original, limits, keep)]
    points, report = [], context.progress()
    for number, way in enumerate(ways):
        report(number, len(ways), f"{way.part:.0%} of the {way.share}" if way else "all of it")
        part = {"way": way, "widths": widths, "file": "bytes" in limits}
        points += context.checkpoint(
            *(part, functools.partial(measure, way), _save_points, _load_points), without=_LIMITS
        )
    chosen = joint.choose(points, limits)
    log.info("prune: %g of the %s go for %s", chosen.part, chosen.share or "network", limits)
    return joint.Way(chosen.share, chosen.part) if chosen.share else None, {
        "limits": limits,
        "chosen": dataclasses.asdict(chosen),
        "points": joint.to_json(points, limits),
    }


def _save_points(points: Sequence[Point], folder: Path) -> None:
    save_json([dataclasses.asdict(point) for point in points], folder / _POINTS)


def _load_points(folder: Path) -> list[Point]:
    from dfqc.compiler.joint import Point

    return [Point(**row) for row in load_json(folder / _POINTS)]


def with_way(recipe: Recipe, way: Way | None) -> Recipe:
    """Return the recipe that prunes in this way, instead of as limits ask for."""
    asked: dict[str, Any] = {"prune": None, "params": None, "macs": None, "prune_by": "error"}
    if way is not None:
        by_channels = way.share == "channels"
        left = round(1 - way.part, _DIGITS)
        asked |= {"prune": way.part} if by_channels else {way.share: left}
    return recipe.model_copy(update=asked)


def _limits(recipe: Recipe, original: Graph) -> dict[str, int]:
    """Return what the file, the parameters and the multiply-adds must not exceed."""
    from dfqc.compiler.graph import count_macs, count_params

    limits = {} if recipe.size_bytes is None else {"bytes": recipe.size_bytes}
    for name, part, count in (
        ("params", recipe.params, count_params),
        ("macs", recipe.macs, count_macs),
    ):
        if part is not None:
            limits[name] = math.floor(part * count(original) + 1e-9)
    return limits


def _list_ways(
    recipe: Recipe,
    original: Graph,
    limits: Mapping[str, int],
    keep: Callable[[Way], Mapping[str, Tensor] | None],
) -> list[Way]:
    """Return the ways to try: a scale of parts of every count, and what just keeps a limit."""
    from dfqc.compiler.joint import PARTS, Way

    shares = dict.fromkeys(share for name in limits for share in _SHARES[name])
    ways = {Way(share, part) for share in shares for part in PARTS}
    for name in limits:
        part = getattr(recipe, name, None)
        if part is None or part == 1:
            continue
        ways.add(Way(name, round(1 - part, _DIGITS)))
        for share in shares:
            if share != name and (fits := _just_fit(original, share, name, limits[name], keep)):
                ways.add(fits)
    return sorted(ways, key=lambda way: (list(shares).index(way.share), way.part))


def _just_fit(
    original: Graph,
    share: str,
    name: str,
    limit: int,
    keep: Callable[[Way], Mapping[str, Tensor] | None],
) -> Way | None:
    """Return the smallest part of one count that keeps the limit on another, by halving."""
    from dfqc.compiler.channels import remove
    from dfqc.compiler.graph import count_macs, count_params
    from dfqc.compiler.joint import Way

    count = {"macs": count_macs, "params": count_params}[name]
    low, high, found = 0.0, 1.0, None
    for _ in range(_HALVINGS):
        way = Way(share, (low + high) / 2)
        kept = keep(way)
        if kept is None:  # so much cannot go
            high = way.part
        elif count(remove(original, kept)) > limit:
            low = way.part
        else:
            high, found = way.part, way
    return found


def _widths(job: Job) -> list[int | None]:
    """Return the weight bits to try: of all that take the same room in the file, the widest.

    Without a limit on the file: the widest within the average asked for, or those of the recipe.
    """
    from dfqc.compiler.allocate import widths

    target, average = job.backend.TARGET, job.recipe.avg_bits
    known = sorted(widths(target))
    if average is not None:
        return [max(bits for bits in known if bits <= average)]
    if job.recipe.size is None:
        return [None]
    room = {8 if bits > _PACKED or not target.packed_int4 else _PACKED: bits for bits in known}
    return list(room.values())


def _images(context: Context) -> Tensor:
    """Make images by which networks are compared: before there is a calibration set."""
    from dfqc.compiler.graph import has_batch_norm
    from dfqc.compiler.stages_calib import MATCHED

    if has_batch_norm(context.value("trace")):
        name, given = "zeroq", MATCHED
    else:
        log.warning(
            "prune: the model has no batch norm to make images for, so the part of the channels is "
            "chosen on noise, on which strong pruning looks better than it is"
        )
        name, given = "noise", {"kind": "pink"}
    options = plugin_options(plugins.load("synthesizer", name), name, "quick", given)
    return make_images(context, name, options, _IMAGES).images
