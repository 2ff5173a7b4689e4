"""Plain structured pruning: a graph and a ratio or a budget in, a smaller graph out.

Channels go in the order of a criterion; how many of each group is a uniform ratio, a ratio per
layer, or what a budget over the whole network needs at the least error. Nothing is restored here.
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from dfqc.compiler.channels import Group, find_groups, remove
from dfqc.compiler.errors import UnsupportedError, UsageError
from dfqc.compiler.graph import Graph, count_macs, count_params
from dfqc.compiler.passes._budget import Costs, Unit, allocate
from dfqc.compiler.passes._criteria import Criterion as RankCriterion
from dfqc.compiler.passes._criteria import Curve, gather_context, rank_channels
from dfqc.compiler.passes.curve import error_curves
from dfqc.compiler.passes.restore import Options as RestoreOptions

__all__ = ["Criterion", "Curve", "Decision", "Options", "choose", "prune", "rank"]

Criterion: TypeAlias = RankCriterion | Literal["moments"]

log = logging.getLogger(__name__)

_SHOWN = 12  # reasons in one message
_RESIDUAL = "channels of a residual sum"


@dataclass(frozen=True)
class Options:
    """How many channels go and which; at most one of `ratio` and the three budgets is given.

    Attributes:
        ratio: part of the channels that every group loses, rounded down.
        channels: part of all prunable channels to remove, where it costs least.
        params: part of the parameters to keep, at most.
        macs: part of the multiply-accumulates to keep, at most.
        layers: (glob, ratio) on paths of producers and depthwise layers; the last match wins,
            before ratio or budget.
        criterion: which channels of a group go first; see `rank_channels`. `restored` and `moments`
            are for what restores them afterwards: `moments` takes the error behind the readers
            (`error_curves`), and groups that it does not understand go by `restored`.
        multiple: kept channels are a multiple of this where a group is pruned at all; where a
            convolution has groups, of the number of these too, and equally many of each stay.
        minimum: channels that every group keeps.
        most: part that a group may lose to a budget.
        residual: prune channels of residual sums too.
        shift: weight of a difference in bias against one in filters (`restored`).
        ridge: pull towards small coefficients, as a part of the mean filter energy (`restored`).
    """

    ratio: float | None = None
    channels: float | None = None
    params: float | None = None
    macs: float | None = None
    layers: tuple[tuple[str, float], ...] = ()
    criterion: Criterion = "output"
    multiple: int = 1
    minimum: int = 1
    most: float = 0.9
    residual: bool = False
    shift: float = 0.01
    ridge: float = 0.01


@dataclass(frozen=True)
class Decision:
    """What goes, before anything is touched; all by group name.

    Attributes:
        keep: indices of the channels that stay, of the groups that lose some: for `remove`.
        curves: order, error and scores of every group that was looked at.
        ratios: part of the channels that goes, of those groups.
        left: why the other groups are left alone.
    """

    keep: Mapping[str, Tensor]
    curves: Mapping[str, Curve]
    ratios: Mapping[str, float]
    left: Mapping[str, str]


def prune(graph: Graph, options: Options) -> tuple[Graph, Decision]:
    """Return the graph without the channels that `choose` picks, and the decision."""
    decision = choose(graph, options)
    smaller = remove(graph, decision.keep)
    log.info(
        "prune: %d groups smaller, %d left alone; parameters %d -> %d, MACs %d -> %d",
        *(len(decision.keep), len(decision.left)),
        *(count_params(graph), count_params(smaller)),
        *(count_macs(graph), count_macs(smaller)),
    )
    return smaller, decision


def choose(graph: Graph, options: Options, curves: Mapping[str, Curve] | None = None) -> Decision:
    """Decide which channels go.

    Args:
        graph: folded or not; batch norms that are still there scale the filters.
        options: how many, and by which criterion.
        curves: orders and errors from elsewhere; groups that are not in it are ranked here.

    Raises:
        UsageError: options that contradict each other or cannot be met, a glob without a layer
            or only with layers whose channels stay.
        UnsupportedError: no group of channels can be pruned.
    """
    _check_options(options)
    every = find_groups(graph)
    left = {g.name: reason for g in every if (reason := _why_not(g, options))}
    groups = [group for group in every if group.name not in left]
    if not groups:
        some = [f"{name}: {reason}" for name, reason in left.items()] or ["it has no layers"]
        raise UnsupportedError(
            f"prune: no group of channels can be pruned, expected at least one; {_list_some(some)}"
            f"{_hint(some)}"
        )
    fixed = _match_layers(every, left, options)
    given = dict(curves or {})
    given |= rank(graph, [group for group in groups if group.name not in given], options)
    removed = _count_removed(graph, groups, given, options, fixed)
    keep = {
        group.name: given[group.name].order[removed[group.name] :].sort().values
        for group in groups
        if removed.get(group.name, 0)
    }
    ratios = {group.name: removed.get(group.name, 0) / group.size for group in groups}
    return Decision(keep, {g.name: given[g.name] for g in groups}, ratios, left)


def rank(graph: Graph, groups: Sequence[Group], options: Options) -> dict[str, Curve]:
    """Return the channels of groups in the order to remove them, by the criterion of `options`."""
    found: dict[str, Curve] = {}
    if not groups:
        return found
    criterion: RankCriterion
    if options.criterion == "moments":
        found, criterion = (
            error_curves(graph, groups, RestoreOptions.model_validate({})),
            "restored",
        )
    else:
        criterion = options.criterion
    context = gather_context(graph)
    for group in groups:
        if group.name not in found:
            found[group.name] = rank_channels(
                graph, group, context, criterion, shift=options.shift, ridge=options.ridge
            )
    return found


def _check_options(options: Options) -> None:
    amounts = ("ratio", "channels", "params", "macs")
    given = [name for name in amounts if getattr(options, name) is not None]
    if len(given) > 1:
        raise UsageError(f"prune: got {' and '.join(given)}; give one of {', '.join(amounts)}")
    if not given and not options.layers:
        raise UsageError(f"prune: got no amount; give one of {', '.join(amounts)}, or layers")
    for name in (*given, "most"):
        value = getattr(options, name)
        if not 0 <= value <= 1:
            raise UsageError(f"prune: {name}: got {value}, expected a part from 0 to 1")
    for pattern, ratio in options.layers:
        if not 0 <= ratio < 1:
            raise UsageError(f"prune: {pattern}: got {ratio}, expected a part from 0 to below 1")
    if options.ridge <= 0:
        raise UsageError(f"prune: ridge: got {options.ridge}, expected more than 0")
    for name in ("multiple", "minimum"):
        if getattr(options, name) < 1:
            raise UsageError(f"prune: {name}: got {getattr(options, name)}, expected 1 or more")


def _why_not(group: Group, options: Options) -> str:
    """Say why a group is left alone; empty if it is not."""
    if not group.prunable:
        return group.reason
    if group.residual and not options.residual:
        return _RESIDUAL
    return ""


def _count_removed(
    graph: Graph,
    groups: Sequence[Group],
    curves: Mapping[str, Curve],
    options: Options,
    fixed: Mapping[str, float],
) -> dict[str, int]:
    """Return the number of channels that each group loses; `fixed` has the ratios by layer."""
    removed = {g.name: _round(g, fixed[g.name], options) for g in groups if g.name in fixed}
    free = [group for group in groups if group.name not in fixed]
    if options.ratio is not None:
        return removed | {g.name: _round(g, options.ratio, options) for g in free}
    budgets: tuple[tuple[Unit, float | None], ...] = (
        ("channels", None if options.channels is None else 1 - options.channels),
        ("params", options.params),
        ("macs", options.macs),
    )
    for unit, part in budgets:
        if part is not None:
            return _meet_budget(graph, (groups, free), curves, options, (unit, part, removed))
    return removed


def _match_layers(
    every: Sequence[Group], left: Mapping[str, str], options: Options
) -> dict[str, float]:
    """Return the ratios given by layer, per group; a layer whose group is left alone has none."""
    known = [(path, group.name) for group in every for path in group.producers + group.through]
    fixed: dict[str, float] = {}
    for pattern, ratio in options.layers:
        hits = [(path, name) for path, name in known if fnmatch.fnmatchcase(path, pattern)]
        if not hits:
            near = difflib.get_close_matches(pattern, [path for path, _ in known], 3, 0.3)
            raise UsageError(
                f"prune: {pattern!r} matches no layer; nearest: {', '.join(near) or 'none'}"
            )
        fixed |= {name: ratio for _, name in hits if name not in left}
        whole = [f"{path}: {left[name]}" for path, name in hits if name in left]
        if len(whole) == len(hits):
            raise UsageError(
                f"prune: {pattern!r} matches only layers whose channels stay; "
                f"{_list_some(whole)}{_hint(whole)}"
            )
        if whole:
            log.warning(
                "prune: %r does not count for %d of the %d layers that it matches; %s",
                *(pattern, len(whole), len(hits), _list_some(whole)),
            )
    return fixed


def _list_some(reasons: Sequence[str]) -> str:
    more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    return "; ".join(reasons[:_SHOWN]) + more


def _hint(reasons: Sequence[str]) -> str:
    """Say what opens the channels of residual sums, where that is what stands in the way."""
    return "; allow residual channels" if any(r.endswith(_RESIDUAL) for r in reasons) else ""


def _round(group: Group, ratio: float, options: Options) -> int:
    """Return how many channels go: at most `ratio` of them, in whole multiples that stay."""
    wanted = math.floor(ratio * group.size + 1e-9)  # 0.29 * 100 is 28.999999999999996
    return max((n for n in _allowed(group, options) if n <= wanted), default=0)


def _allowed(group: Group, options: Options) -> list[int]:
    """List the numbers of channels that a group may lose."""
    step = math.lcm(options.multiple, group.slices)
    return [
        group.size - kept
        for kept in range(group.size - 1, 0, -1)
        if kept >= options.minimum and kept % step == 0
    ]


def _meet_budget(
    graph: Graph,
    groups: tuple[Sequence[Group], Sequence[Group]],  # all that are pruned, those to decide on
    curves: Mapping[str, Curve],
    options: Options,
    budget: tuple[Unit, float, Mapping[str, int]],
) -> dict[str, int]:
    every, free = groups
    unit, part, fixed = budget
    costs = Costs(graph, every, unit)
    counts = {g.name: [n for n in _allowed(g, options) if n <= options.most * g.size] for g in free}
    target = math.floor(part * costs.full + 1e-9)
    found = allocate({g.name: curves[g.name] for g in free}, counts, costs, target, fixed)
    if found is None:
        most = {name: allowed[-1] for name, allowed in counts.items() if allowed}
        least = costs.left({**fixed, **most}) / costs.full
        part, least = (1 - part, 1 - least) if unit == "channels" else (part, least)
        reach = "at most" if unit == "channels" else "at least"
        raise UsageError(
            f"prune: {unit}: got {part:.3g}, expected {reach} {least:.3g}, which is all that can "
            f"go here; {'lower' if unit == 'channels' else 'raise'} it, or allow residual channels"
        )
    return found
