"""Which layers run faster in float than quantized: a plan and a stopwatch in, a mixed plan out.

A layer's own kernel does not tell: left in float it may need another conversion on either side, or
spare one. So whole engines are timed, side by side with the best so far: first with all layers of
a kind in float (depthwise ones, those that read few channels), then with the layers of one block,
and what makes the engine clearly faster stays. Of what went together every layer is then tried
quantized again, alone: it is four times as small, so it comes back where that costs no time. The
codes do not matter for that: the engines that are timed are rounded to nearest on noise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from dfqc.compiler.bench import speedup
from dfqc.compiler.contracts import Progress, silent
from dfqc.compiler.graph import Graph, blocks
from dfqc.compiler.plan import leave_float
from dfqc.compiler.spec import Plan, TargetSpec

log = logging.getLogger("dfqc.autotune")

GAIN = 1.02  # how many times faster by medians and by best calls; less is noise
_FEW_CHANNELS = 8  # per group: too few for the blocks in which integer kernels work
REASON = "faster in float here (--autotune)"

Stopwatch = Callable[[Mapping[str, Plan]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Trial:
    """One engine that was tried: what it left in float, and how much faster that made it."""

    what: str
    layers: tuple[str, ...]
    median: float
    best: float
    kept: bool


def autotune(
    graph: Graph,
    plan: Plan,
    target: TargetSpec,
    stopwatch: Stopwatch,
    *,
    seconds: float | None = None,
    progress: Progress = silent,
) -> tuple[Plan, list[Trial]]:
    """Return the plan with the layers in float that are faster so, and all that was tried.

    Args:
        graph: the folded graph.
        plan: what every layer gets; layers that it leaves in float stay there.
        target: of the plan.
        stopwatch: plans by name -> milliseconds of their engines' calls, timed in turns.
        seconds: after which no further engine is tried.
        progress: called per engine.
    """
    tuner = _Tuner(graph, plan, target, stopwatch, seconds)
    groups = list_groups(graph, plan)
    for number, (what, names) in enumerate(groups):
        if tuner.is_late(number, len(groups)):
            break
        tuner.try_float(what, names)
        progress(number + 1, len(groups), what)
    together = [name for t in tuner.trials if t.kept and len(t.layers) > 1 for name in t.layers]
    for number, name in enumerate(together):
        if tuner.is_late(number, len(together)):
            break
        tuner.try_back(name)
        progress(number + 1, len(together), name)
    return tuner.plan(), tuner.trials


class _Tuner:
    """Layers that are in float so far, and the engines that were timed to find them."""

    def __init__(
        self,
        graph: Graph,
        whole: Plan,
        target: TargetSpec,
        stopwatch: Stopwatch,
        seconds: float | None,
    ) -> None:
        self.graph, self.whole, self.target = graph, whole, target
        self.stopwatch = stopwatch
        self.seconds, self.start = seconds, time.monotonic()
        self.left: tuple[str, ...] = ()
        self.fastest = whole
        self.trials: list[Trial] = []

    def plan(self, left: Sequence[str] | None = None) -> Plan:
        """Return the plan with these layers in float, by default those found so far."""
        names = self.left if left is None else left
        if not names:
            return self.whole
        return leave_float(self.graph, self.target, self.whole, names, REASON)

    def is_late(self, number: int, count: int) -> bool:
        """Report whether the time is over, and say what that leaves out."""
        late = self.seconds is not None and time.monotonic() - self.start > self.seconds
        if late:
            log.warning("autotune: %d of %d engines tried in %.0f s", number, count, self.seconds)
        return late

    def try_float(self, what: str, names: Sequence[str]) -> None:
        """Leave layers in float if that is clearly faster than the fastest engine so far."""
        more = tuple(n for n in names if n not in self.left and self.whole.layers[n].weight)
        if not more:
            return
        other = self.plan((*self.left, *more))
        gain = self._time(other)
        kept = min(gain.values()) >= GAIN
        self.trials.append(Trial(what, more, gain["median"], gain["best"], kept))
        if kept:
            self.left, self.fastest = (*self.left, *more), other

    def try_back(self, name: str) -> None:
        """Quantize a layer again unless that is clearly slower than the fastest engine.

        Not than the last one: what several layers cost adds up.
        """
        fewer = tuple(n for n in self.left if n != name)
        gain = self._time(self.plan(fewer))
        kept = max(gain.values()) > 1 / GAIN
        what = f"{name}, quantized again"
        self.trials.append(Trial(what, (name,), gain["median"], gain["best"], kept))
        self.left = fewer if kept else self.left

    def _time(self, other: Plan) -> Mapping[str, float]:
        times = self.stopwatch({"now": self.fastest, "other": other})
        return speedup(times["now"], times["other"])


def list_groups(graph: Graph, plan: Plan) -> list[tuple[str, tuple[str, ...]]]:
    """Return what is tried together: layers of a kind, then layers of a block, named."""
    quantized = [name for name, layer in plan.layers.items() if layer.weight is not None]
    kinds: dict[str, list[str]] = {}
    for name in quantized:
        kind = _kind(graph.module.get_submodule(name))
        if kind is not None:
            kinds.setdefault(kind, []).append(name)
    groups = [(kind, tuple(names)) for kind, names in kinds.items()]
    for block in blocks(graph):
        names = tuple(name for name in block.layers if name in quantized)
        if names:
            groups.append((block.name, names))
    return _different(groups)


def _kind(module: nn.Module) -> str | None:
    """Name what integer kernels are often slow at; None: nothing of that."""
    if isinstance(module, nn.Linear):
        return "linear layers"
    if not isinstance(module, nn.Conv2d):
        return None
    inputs = module.in_channels // module.groups
    if module.groups > 1 and inputs == 1:
        return "depthwise convolutions"
    if module.groups > 1:
        return "grouped convolutions"
    return "convolutions of few channels" if inputs <= _FEW_CHANNELS else None


def _different(
    groups: Sequence[tuple[str, tuple[str, ...]]],
) -> list[tuple[str, tuple[str, ...]]]:
    """Return the groups without those that hold the same layers as an earlier one."""
    seen: dict[tuple[str, ...], str] = {}
    for what, names in groups:
        seen.setdefault(names, what)
    return [(what, names) for names, what in seen.items()]
