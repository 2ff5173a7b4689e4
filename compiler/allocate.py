"""Choose weight bits per layer under a budget: measured errors and costs in, bits by layer out.

The choice is a multiple-choice knapsack, solved exactly by dynamic programming over the budget; no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfqc.compiler.errors import UsageError
from dfqc.compiler.spec import Bits, Plan, Rule, TargetSpec

WIDTHS = (2, 3, 4, 6, 8)  # candidates; 5 and 7 are stored as 8 and differ little from 6 and 8
# Steps that the costs' range is divided into where they have no common divisor as large: more
# would find nothing that measured errors can tell apart.
_STEPS = 1 << 18


@dataclass(frozen=True)
class Effect:
    """What rounding the weights of one layer alone does to the network's output.

    `noise` is the power of the change over the power of the output; `kl` (nats, float to rounded)
    and `agreement` (percent of equal arg-max) are None where the output is not (n, classes).
    """

    noise: float
    kl: float | None
    agreement: float | None

    @property
    def sqnr_db(self) -> float | None:
        """Signal over noise of the output; None without any noise."""
        return -10 * math.log10(self.noise) if self.noise > 0 else None


IMAGES, FEWEST = 64, 8  # calibration images that layers are measured on
CHUNK_BYTES = 256 << 20  # float activations of the images measured at a time, all of them kept
_MAX_MACS = 4e12  # minutes of one core; larger networks are measured on fewer images

Table = Mapping[str, Mapping[int, Effect]]  # layer -> weight bits -> effect


@dataclass(frozen=True)
class Option:
    """One width of one layer: what it takes of the budget, and what it adds to the error."""

    bits: int
    cost: int
    error: float


def widths(target: TargetSpec) -> tuple[int, ...]:
    """Return the candidate weight bits that the target accepts, ascending."""
    return tuple(sorted(set(WIDTHS) & set(target.weight_bits)))


def images_for(macs: int, layers: int, count: int) -> int:
    """Return how many images to measure `count` widths of `layers` layers on.

    Fewer of a large network: a tail is half a pass on average.
    """
    return min(IMAGES, max(FEWEST, int(_MAX_MACS / max(1, macs * layers * count / 2))))


def free_layers(plan: Plan, rules: Sequence[Rule], *, ends: Bits | None) -> tuple[str, ...]:
    """Return the layers whose bits a budget may choose, in the order they run.

    Those that are quantized, without the first and the last one (where the ends have bits of their
    own) and without those that a rule speaks about.
    """
    names = list(plan.layers)
    fixed = {names[0], names[-1]} if names and ends is not None else set()
    fixed |= {name for name in names if any(rule.matches(name) for rule in rules)}
    return tuple(n for n in names if plan.layers[n].weight is not None and n not in fixed)


def choose(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, int]:
    """Return the bits of every layer with the least sum of errors whose costs fit the budget.

    Exact where the costs' common divisor divides their range into at most 2^18 steps; otherwise
    costs are rounded up to that many steps, so that the budget holds and at most one step per
    layer of it is left unused. Errors are made monotone first: measured on few images, more bits
    may seem worse, and a larger budget must never end with a larger error.

    Args:
        options: the widths of every layer, in any order.
        budget: largest sum of costs.

    Raises:
        UsageError: not even the cheapest options fit.
    """
    ladders = [_ladder(found) for found in options.values()]
    least = sum(ladder[0].cost for ladder in ladders)
    most = sum(ladder[-1].cost for ladder in ladders)
    if budget < least:
        raise UsageError(f"budget {budget} is below the smallest reachable sum of costs, {least}")
    if budget >= most:
        return {name: ladder[-1].bits for name, ladder in zip(options, ladders, strict=True)}
    # The unit must not depend on the budget: rounding that changes with it is not monotone.
    unit = _unit(ladders, most - least)
    room = (budget - least) // unit
    weights = [[-(-(o.cost - ladder[0].cost) // unit) for o in ladder] for ladder in ladders]
    room = min(room, sum(row[-1] for row in weights))
    picks = _solve(weights, [[o.error for o in ladder] for ladder in ladders], room)
    return {n: ladder[p].bits for n, ladder, p in zip(options, ladders, picks, strict=True)}


def total(options: Mapping[str, Sequence[Option]], chosen: Mapping[str, int]) -> tuple[int, float]:
    """Return cost and error of a choice."""
    taken = [o for name, found in options.items() for o in found if o.bits == chosen[name]]
    return sum(o.cost for o in taken), sum(o.error for o in taken)


def table_to_json(table: Table) -> dict[str, Any]:
    """Return plain data; `table_from_json` reads it back."""
    return {
        name: {
            str(bits): {"noise": e.noise, "kl": e.kl, "agreement": e.agreement}
            for bits, e in row.items()
        }
        for name, row in table.items()
    }


def table_from_json(data: Mapping[str, Any]) -> dict[str, dict[int, Effect]]:
    """Rebuild a table from `table_to_json`."""
    return {
        name: {int(bits): Effect(**raw) for bits, raw in row.items()} for name, row in data.items()
    }


def _ladder(found: Sequence[Option]) -> list[Option]:
    """Return options with rising costs and falling errors; the widest is always the last.

    Of equal costs the better one counts. An option that costs more and errs as much is left out,
    but for the last: a budget for everything buys the widest grids, as its user expects.
    """
    ordered = sorted(found, key=lambda o: (o.cost, o.bits))
    ladder: list[Option] = []
    for option in ordered:
        if ladder and option.cost == ladder[-1].cost:
            if option.error <= ladder[-1].error:
                ladder[-1] = option
        elif not ladder or option.error < ladder[-1].error:
            ladder.append(option)
    widest = ordered[-1]
    if ladder[-1].bits != widest.bits:
        error = min(widest.error, ladder[-1].error)
        if ladder[-1].cost == widest.cost:
            ladder.pop()
        ladder.append(Option(widest.bits, widest.cost, error))
    return ladder


def _unit(ladders: Sequence[Sequence[Option]], span: int) -> int:
    steps = [o.cost - ladder[0].cost for ladder in ladders for o in ladder]
    return max(1, math.gcd(*steps), -(-span // _STEPS))


def _solve(
    weights: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], room: int
) -> list[int]:
    """Return the option of every layer: dynamic programming over layers and room.

    best[r] is the least error of the layers so far within room r; every layer's decision for
    every r is kept, one byte each, and read backwards.
    """
    best = np.zeros(room + 1)
    decisions = []
    for row, values in zip(weights, errors, strict=True):
        found = np.full(room + 1, np.inf)
        decision = np.zeros(room + 1, np.uint8)
        for index, (weight, value) in enumerate(zip(row, values, strict=True)):
            if weight > room:
                break
            candidate = best[: room + 1 - weight] + value
            # At equal errors the wider grid: a budget is there to be spent.
            better = candidate <= found[weight:]
            found[weight:][better] = candidate[better]
            decision[weight:][better] = index
        best = found
        decisions.append(decision)
    picks = []
    for row, decision in zip(reversed(weights), reversed(decisions), strict=True):
        picks.append(int(decision[room]))
        room -= row[picks[-1]]
    return picks[::-1]
