"""Iterations of an optimization: how many were planned and the time for them in, a count out.

A run that may take only so long plans fewer iterations and goes through its whole schedule, instead
of breaking off a longer one in the middle: half-annealed images are worse than quickly annealed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Iterations before the rest is planned; the first one also allocates. An accelerator is asked for
# the loss in each of them: else what is timed is the queueing and not the work.
MEASURED = 3
_READ_EVERY = 10  # iterations between two reads of the loss from an accelerator


class Steps:
    """Yields 0, 1, ... for as many iterations as were planned, or as fit into `seconds`.

    `each`: seconds of one, where that is known before: it is planned with from the first on.

    Attributes:
        planned: what was asked for.
        total: what it will be, as far as is known now.
        shortened: whether the time was ever too short for what was planned.
    """

    def __init__(
        self,
        planned: int,
        seconds: float | None = None,
        *,
        each: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.planned = self.total = planned
        self.done = 0
        self.shortened = False  # once planned for fewer, it stays so: rates have been lower
        self._seconds, self._clock = seconds, clock
        if seconds is not None and each is not None:
            self._fit(seconds, each)

    def __iter__(self) -> Iterator[int]:
        """Yield the number of each iteration, at least one."""
        start = second = self._clock()
        while self.done < self.total:
            yield self.done
            self.done += 1
            if self._seconds is None:
                continue
            now = self._clock()
            if self.done == 1:
                second = now
            elif self.done >= min(MEASURED, self.planned) or now - start > self._seconds:
                self._fit(self._seconds - (now - start), (now - second) / (self.done - 1))

    def _fit(self, left: float, each: float) -> None:
        """Plan as many as fit into the seconds left, `each` of which takes so many."""
        fitting = self.done + max(0, math.floor(left / each)) if each > 0 else self.planned
        self.total = max(1, min(self.planned, fitting))
        self.shortened |= fitting < self.planned

    @property
    def fraction(self) -> float:
        """Return the share that is done, 0..1: what schedules depend on."""
        return min(self.done / max(self.total, 1), 1.0)

    @property
    def left(self) -> int:
        """Return how many iterations are still to come."""
        return self.total - self.done

    def end_in(self, count: int) -> None:
        """Plan only `count` more: nothing is gained by the others."""
        self.planned = self.total = self.done + count


class Losses:
    """Loss of every iteration; an accelerator is asked for them seldom, since each time it waits.

    Attributes:
        values: those that were read, in order.
    """

    def __init__(self, steps: Steps, device: torch.device) -> None:
        self.values: list[float] = []
        self._steps, self._unread = steps, list[Tensor]()
        self._every = 1 if device.type == "cpu" else _READ_EVERY

    def add(self, loss: Tensor) -> list[float]:
        """Take the loss of the iteration under way; return what was read now, oldest first."""
        self._unread.append(loss.detach())
        steps = self._steps
        if len(self._unread) < self._every and steps.left > 1 and steps.done >= MEASURED:
            return []
        return self.read()

    def read(self) -> list[float]:
        """Read what is left: the time may be over sooner than expected."""
        found: list[float] = torch.stack(self._unread).tolist() if self._unread else []
        self._unread.clear()
        self.values += found
        return found


def anneal(fraction: float) -> float:
    """Return the factor of a rate that is held for half of the time and then falls to 0."""
    return min(1.0, 2 * (1 - fraction))


def cosine(fraction: float, *, warm_up: float = 0.0) -> float:
    """Return the factor of a rate that rises linearly over `warm_up` and falls as a cosine to 0."""
    if fraction < warm_up:
        return fraction / warm_up
    return 0.5 * (1 + math.cos(math.pi * (fraction - warm_up) / (1 - warm_up)))
