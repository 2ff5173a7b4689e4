"""Which layers run faster in float than quantized: a plan and a stopwatch in, a mixed plan out.

A layer's own kernel does not tell: left in float it may need another conversion on either side, or
spare one. So whole engines are timed, side by side with the best so far: first with all layers of a
kind in float (depthwise ones, those that read few channels), then with the layers of one block, and
what makes the engine clearly faster stays. The codes do not matter for that: the engines that are
timed are rounded to nearest on noise.
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
    start, trials = time.monotonic(), list[Trial]()
    groups = list_groups(graph, plan)
    for number, (what, names) in enumerate(groups):
        if seconds is not None and time.monotonic() - start > seconds:
            log.warning("autotune: %d of %d engines tried in %.0f s", number, len(groups), seconds)
            break
        left = tuple(name for name in names if plan.layers[name].weight is not None)
        if left:
            other = leave_float(graph, target, plan, left, REASON)
            times = stopwatch({"now": plan, "other": other})
            gain = speedup(times["now"], times["other"])
            kept = min(gain["median"], gain["best"]) >= GAIN
            trials.append(Trial(what, left, gain["median"], gain["best"], kept))
            plan = other if kept else plan
        progress(number + 1, len(groups), what)
    return plan, trials


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
