"""Time and progress of a reconstruction: units and passes in, seconds and one count out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dfqc.compiler.contracts import Progress
from dfqc.compiler.graph import Graph, node_shapes
from dfqc.compiler.quantize._units import Unit
from dfqc.compiler.spec import Plan


@dataclass
class Clock:
    """Shares the time among the units by their work."""

    work: dict[str, list[float]]  # unit -> what is still to come in each pass, in order
    last: float  # and after all of them
    end: float | None  # of `time.monotonic`

    @staticmethod
    def of(
        graph: Graph,
        plan: Plan,
        units: Sequence[Unit],
        iterations: Sequence[int],
        *,
        last: int,
        seconds: float | None,
    ) -> Clock:
        """Weigh units by their multiplications and the iterations of each pass.

        `last` counts the iterations of the whole network that come after all units.
        """
        shapes = node_shapes(graph)
        macs = {unit.name: _count_macs(graph, plan, unit, shapes) for unit in units}
        work = {name: [size * count for count in iterations] for name, size in macs.items()}
        end = None if seconds is None else time.monotonic() + seconds
        return Clock(work, last * sum(macs.values()), end)

    def left(self) -> float | None:
        """Return the seconds that are left; None without a limit."""
        return None if self.end is None else max(0.0, self.end - time.monotonic())

    def skip(self, unit: Unit) -> float:
        """Return the next work of a unit, and strike it off."""
        return self.work[unit.name].pop(0)

    def grant(self, unit: Unit) -> float | None:
        """Return the seconds that a unit may take; None without a limit."""
        total = self.last + sum(sum(parts) for parts in self.work.values())
        own, left = self.skip(unit), self.left()
        return None if left is None else left * own / max(total, 1e-9)


def _count_macs(
    graph: Graph, plan: Plan, unit: Unit, shapes: Mapping[str, tuple[int, ...]]
) -> float:
    """Return the multiplications of a unit for one image."""
    total = 0.0
    for name in unit.layers:
        weight = graph.module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        out = shapes[plan.layers[name].node]
        positions = math.prod(out) / weight.shape[0]
        total += positions * weight.numel()
    return max(total, 1.0)


@dataclass
class Report:
    """Counts the iterations of all units as one long work."""

    progress: Progress
    total: int
    done: int = 0

    def begin(self) -> None:
        """Say that the first iteration comes now."""
        self.progress(0, self.total, "")

    def of(self, unit: str) -> Callable[[int, int, str], None]:
        """Return the progress of one unit."""

        def report(done: int, total: int, note: str) -> None:
            self.progress(min(self.done + done, self.total), self.total, f"{unit} {note}".strip())

        return report

    def finish(self, planned: int) -> None:
        """Count a unit as done, also if it took fewer iterations."""
        self.done += planned
