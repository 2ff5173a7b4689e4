"""Images in batches: a synthesizer, its options and a count in, one calibration set out.

Each batch has its own seed and survives a kill. Where the run's time is limited, the batches share
what synthesis may take of it: each does less work where all of it does not fit, and rather fewer
images are made than worse and worse ones.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dfqc.compiler import plugins
from dfqc.compiler.contracts import CalibSet, Progress, Supplies
from dfqc.compiler.driver import Context
from dfqc.compiler.stages import FACTS, device_of
from dfqc.compiler.storage import load_calib, load_json, save_calib
from dfqc.compiler.units import format_duration

if TYPE_CHECKING:
    from torch import Tensor

    from dfqc.compiler.graph import Graph

log = logging.getLogger("dfqc.calib")

# Options of a stage that its batches do not depend on, or know from their own options.
_NOT_PARTS = ("samples", "effort", "synth-option", "budget")
_LEAST_SHARE = 0.25  # of the time of all batches that one gets where not all of them fit
_LABEL_SEEDS = 1 << 20  # indices of seeds of labels are counted from here


def make_images(
    context: Context,
    name: str,
    options: Any,
    count: int,
    *,
    start: int = 0,
    zoo: Sequence[Graph] = (),
    seconds: float | None = None,
) -> CalibSet:
    """Return `count` images, or fewer where `seconds` do not allow more; at least one batch."""
    import torch

    plugin = plugins.load("synthesizer", name)
    graph, device = context.value("trace"), device_of(context)
    size = min(options.batch_size, count)
    sizes = [min(size, count - done) for done in range(0, count, size)]
    labels = _labels(context, count) if plugin.NEEDS_CLASSES else None
    chosen = options.model_dump(mode="json", exclude={"path"})  # data count by content
    report = context.progress()
    clock = _Clock(seconds)
    parts: list[CalibSet] = []
    for place, images in enumerate(sizes):
        if parts and clock.is_over():
            break
        index = start + place
        rng = torch.Generator(device).manual_seed(context.seed(index))
        supplies = Supplies(
            zoo,
            None if labels is None else labels[place * size : place * size + images],
            parts[-1].carry if parts and plugin.CARRIES else {},
            clock.grant(len(sizes) - place),
        )

        make = functools.partial(
            plugin.synthesize,
            *(graph, images, options),
            rng=rng,
            device=device,
            progress=_share(report, place, len(sizes)),
            supplies=supplies,
        )
        part = {"synthesizer": name, "index": index, "images": images, "options": chosen}
        parts.append(
            context.checkpoint(
                part, make, save_calib, load_calib, without=_NOT_PARTS, cut_short=_is_shortened
            )
        )
    _warn_of_limits(parts, count, seconds)
    return join(parts, asked=count)


def join(parts: Sequence[CalibSet], *, asked: int) -> CalibSet:
    """Return one set of all parts."""
    import torch

    labels = [part.labels for part in parts if part.labels is not None]
    return CalibSet(
        torch.cat([part.images for part in parts]),
        torch.cat(labels) if len(labels) == len(parts) else None,
        parts[0].source,
        {"asked": asked, "batches": [dict(part.info) for part in parts]},
    )


def balance_labels(count: int, classes: int, seeds: Sequence[int]) -> Tensor:
    """Return class numbers (count,) int64 in which no class is more than one ahead of another.

    Every `classes` of them are all classes in random order, one seed for each such round.
    """
    import torch

    rounds = [
        torch.randperm(classes, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    return torch.cat(rounds)[:count]


def _labels(context: Context, count: int) -> Tensor | None:
    """Draw labels so that those of an image do not depend on how many follow."""
    classes = load_json(context.path("trace", FACTS))["classes"]
    if classes is None:
        return None
    rounds = range(-(-count // classes))
    return balance_labels(count, classes, [context.seed(_LABEL_SEEDS + i) for i in rounds])


class _Clock:
    """Divides the time for a set of images among its batches."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.start = time.monotonic()

    def grant(self, remaining: int) -> float | None:
        """Return the seconds of the next of `remaining` batches."""
        if self.seconds is None:
            return None
        left = self._left()
        return max(0.0, min(left, max(left / remaining, _LEAST_SHARE * self.seconds)))

    def is_over(self) -> bool:
        """Report whether what is left is too little for another batch."""
        return self.seconds is not None and self._left() <= 0.5 * _LEAST_SHARE * self.seconds

    def _left(self) -> float:
        assert self.seconds is not None
        return self.seconds - (time.monotonic() - self.start)


def _is_shortened(calib: CalibSet) -> bool:
    return bool(calib.info.get("shortened"))


def _warn_of_limits(parts: Sequence[CalibSet], asked: int, seconds: float | None) -> None:
    if seconds is None:
        return
    made = sum(len(part.images) for part in parts)
    short = sum(map(_is_shortened, parts))
    if made < asked or short:
        log.warning(
            "--budget leaves %s for these images: %d of %d were made, %d of %d batches with fewer "
            "iterations than planned; give more time, or lower --samples or --effort",
            *(format_duration(seconds), made, asked, short, len(parts)),
        )


def _share(report: Progress, place: int, batches: int) -> Progress:
    """Report the steps of one batch as a part of all batches: one bar, one time left."""

    def progress(done: int, total: int, note: str) -> None:
        report(place * total + done, batches * total, note)

    return progress


def share_of(context: Context, fraction: float) -> float | None:
    """Return that part of the time that the run has left; None without a limit."""
    left = context.seconds_left()
    return None if left is None else max(0.0, fraction * left)
