"""Images in batches: a synthesizer, its options and a count in, one calibration set out.

Each batch has its own seed and survives a kill. Where the run's time is limited, the batches share
what synthesis may take of it: each does less work where all of it does not fit, and no more batches
are begun than leave every one a quarter of the time. One that goes on from the first has as much
less of it as it has less to do.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler import plugins
from dfqc.compiler.contracts import CalibSet, Checkpoint, Progress, Supplies
from dfqc.compiler.driver import Context
from dfqc.compiler.stages import FACTS, device_of
from dfqc.compiler.storage import load_calib, load_json, save_calib
from dfqc.compiler.units import format_duration

if TYPE_CHECKING:
    from torch import Tensor

    from dfqc.compiler.graph import Graph
    from dfqc.compiler.recipe import Recipe

log = logging.getLogger("dfqc.calib")

# Options of a stage that its batches do not depend on, or know from their own options.
_NOT_PARTS = ("samples", "effort", "synth-option", "budget")
_LEAST_SHARE = 0.25  # of the time of all batches that one gets where not all of them fit
_LABEL_SEEDS = 1 << 20  # indices of seeds of labels are counted from here


def synth_overrides(recipe: Recipe) -> dict[str, Any]:
    """Return the synthesizer's options; what reads given images is told where they are."""
    path = {"path": recipe.calib_data} if recipe.calib_data else {}
    return {**recipe.synth_option, **path}


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
    sizes = split_evenly(count, options.batch_size)
    labels = _labels(context, count) if plugin.NEEDS_CLASSES else None
    chosen = options.model_dump(mode="json", exclude={"path"})  # data count by content
    report = context.progress()
    later = plugin.count_carried(options) if plugin.CARRIES else 1.0
    works = [1.0, *([later] * (len(sizes) - 1))]
    clock = _Clock(seconds, works)
    keep = functools.partial(context.checkpoint, without=_NOT_PARTS, cut_short=_is_shortened)
    parts: list[CalibSet] = []
    carry: Mapping[str, Tensor] = {}
    for place, images in enumerate(sizes):
        if parts and clock.is_over():
            break
        index, first = start + place, sum(sizes[:place])
        rng = torch.Generator(device).manual_seed(context.seed(index))
        part = {"synthesizer": name, "index": index, "first": first, "images": images}
        part |= {"options": chosen, "carry": _digest(carry)}
        supplies = Supplies(
            zoo,
            None if labels is None else labels[first : first + images],
            carry,
            clock.grant(),
            count - first - images,
            functools.partial(_keep_inner, keep, part),
        )
        make = functools.partial(
            plugin.synthesize,
            *(graph, images, options),
            rng=rng,
            device=device,
            progress=_share(report, works, place),
            supplies=supplies,
        )
        made: CalibSet = keep(part, make, save_calib, load_calib)
        carry = made.carry if plugin.CARRIES else {}
        parts.append(dataclasses.replace(made, carry={}))  # only the next batch needs it
        _tell_notes(parts)
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


def split_evenly(count: int, most: int) -> list[int]:
    """Return the sizes of batches of at most `most`, equal to within one image.

    A last batch of a few images would have to match the statistics of all data by itself.
    """
    batches = -(-count // most)
    return [count // batches + (place < count % batches) for place in range(batches)]


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
    """Divides the time for a set of images among its batches, by the work that each one is."""

    def __init__(self, seconds: float | None, works: Sequence[float]) -> None:
        self.seconds, self.works = seconds, list(works)  # of the batches to come; the largest is 1
        self.start = time.monotonic()

    def grant(self) -> float | None:
        """Return the seconds of the next batch."""
        work, every = self.works[0], sum(self.works)
        share = work / every if every else 1.0
        del self.works[0]
        if self.seconds is None:
            return None
        left = self._left()
        return max(0.0, min(left, max(left * share, _LEAST_SHARE * work * self.seconds)))

    def is_over(self) -> bool:
        """Report whether what is left is too little for another batch."""
        if self.seconds is None or not self.works[0]:  # the first one left time enough
            return False
        return self._left() <= 0.5 * _LEAST_SHARE * self.works[0] * self.seconds

    def _left(self) -> float:
        assert self.seconds is not None
        return self.seconds - (time.monotonic() - self.start)


def _digest(carry: Mapping[str, Tensor]) -> str | None:
    """Return the SHA-256 of what a batch starts from; None if it starts from nothing."""
    if not carry:
        return None
    total = hashlib.sha256()
    for name, tensor in sorted(carry.items()):
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def _tell_notes(parts: Sequence[CalibSet]) -> None:
    """Say what the last batch notes, unless an earlier one did."""
    *earlier, last = [part.info.get("note") for part in parts]
    if last and last not in earlier:
        log.warning("%s", last)


def _keep_inner(
    keep: Checkpoint,
    batch: Mapping[str, Any],
    part: Mapping[str, Any],
    make: Callable[[], Any],
    save: Callable[[Any, Path], None],
    load: Callable[[Path], Any],
) -> Any:
    """Return a part of a batch's own work: what it depends on is what the batch depends on."""
    return keep({**batch, "part": dict(part)}, make, save, load)


def _is_shortened(value: Any) -> bool:
    """Report whether a batch, or a part of its work, was cut for lack of time."""
    if isinstance(value, CalibSet):
        return bool(value.info.get("shortened"))
    return bool(getattr(value, "shortened", False))


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


def _share(report: Progress, works: Sequence[float], place: int) -> Progress:
    """Report the steps of one batch as a part of all batches' work: one bar, one time left."""
    before, own, every = sum(works[:place]), works[place], sum(works)

    def progress(done: int, total: int, note: str) -> None:
        if own:
            report(round(total * before / own) + done, round(total * every / own), note)
        else:
            report(1, 1, note)

    return progress
