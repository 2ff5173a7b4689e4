"""A title in, a `Progress` out: a bar on a terminal, sparse lines elsewhere, stdout never.

`done` starting over (the next batch of the same work) starts a new bar and a new estimate; 0, the
estimate alone: what came before is no measure of the steps.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from dfqc.compiler.contracts import Progress, silent
from dfqc.compiler.units import format_duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

INTERVAL = 10.0  # seconds between two lines in a log


def reporter(title: str, *, quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """Return the `Progress` that suits `stream` (stderr).

    The bar vanishes when `done` reaches `total`, or with the process.
    """
    if quiet:
        return silent
    stream = stream or sys.stderr
    return Bar(title, stream) if stream.isatty() else Lines(title, stream)


class Lines:
    """Writes a line at most every `INTERVAL` seconds, and none for work shorter than that."""

    def __init__(
        self, title: str, stream: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title, self.stream, self.clock = title, stream, clock
        self.start = self.written = clock()
        self.first = self.done = 0

    def __call__(self, done: int, total: int, note: str) -> None:
        """Report that `done` of `total` steps are finished."""
        now = self.clock()
        if done < self.done or not done:
            self.start, self.first = now, done
        self.done = done
        if now - self.written < INTERVAL:
            return
        self.written = now
        parts = [f"{done}/{total}"]
        if total > 0:
            parts.insert(0, f"{100 * done // total} %")
        if self.first < done <= total:
            rest = (now - self.start) / (done - self.first) * (total - done)
            parts.append(f"{format_duration(rest)} left")
        if note:
            parts.append(note)
        self.stream.write(f"{self.title}: {', '.join(parts)}\n")
        self.stream.flush()


class Bar:
    """Draws a bar with the time left."""

    def __init__(self, title: str, stream: TextIO) -> None:
        self.title, self.stream = title, stream
        self.bars: Bars | None = None
        self.done = 0

    def __call__(self, done: int, total: int, note: str) -> None:
        """Report that `done` of `total` steps are finished."""
        if done < self.done:
            self.close()
        self.done = done
        if self.bars is None:
            if done >= total:
                return
            self.bars = self._open()
        self.bars.update(self.bars.task_ids[0], completed=done, total=total, note=note)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Erase the bar and give the terminal its cursor back."""
        self.done = 0
        if self.bars is not None:
            self.bars.stop()
            atexit.unregister(self.bars.stop)
            self.bars = None

    def _open(self) -> Bars:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(file=self.stream),
            transient=True,
            redirect_stdout=False,  # carries results only
            redirect_stderr=True,  # messages go above the bar, an error that ends it included
        )
        bars.add_task(self.title, note="")
        bars.start()
        # An error that ends the process must not leave the terminal without its cursor.
        atexit.register(bars.stop)
        return bars
