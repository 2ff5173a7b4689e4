"""Train a student on images, in parts that survive a kill: student and teacher in, a trail out.

Every part begins with its own random numbers, so that a run that is taken up behind a part goes on
as the one that was not interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dfqc.compiler.contracts import Checkpoint, Progress, QuantState
from dfqc.compiler.judging import move
from dfqc.compiler.quantize._kd import Losses, Teacher
from dfqc.compiler.quantize._optimizer import pack_optimizer, unpack_optimizer
from dfqc.compiler.quantize._student import Student
from dfqc.compiler.steps import Losses as Trail
from dfqc.compiler.steps import Steps, cosine

log = logging.getLogger(__name__)

PARTS = 10
_FILE, _OWN, _OPTIMIZER = "student.safetensors", "student/", "optimizer/"
_SEED_STEP = 7_919  # between the seeds of two parts
_WORSE = 2.0  # times the distance of the start, which may be blind itself


@dataclass(frozen=True)
class Schedule:
    """How long, and at which rates, a student is trained."""

    iterations: int
    batch_size: int
    rates: dict[str, float]  # of `Student.parameter_groups`
    decay: float
    clip: float  # largest norm of the gradient; 0: any
    shift: float  # of each side at most, of an image that is copied
    half: bool  # bfloat16 where it does no harm
    warm_up: float


@dataclass
class Part:
    """What a run is at the end of a part."""

    tensors: dict[str, Tensor]  # of student and optimizer
    done: int
    total: int
    loss: float
    distance: float
    fault: str = ""  # why it cannot go on
    shortened: bool = False

    def save(self, folder: Path) -> None:
        """Write it."""
        notes = {n: getattr(self, n) for n in ("done", "total", "loss", "distance", "shortened")}
        notes = {name: repr(value) for name, value in notes.items()} | {"fault": self.fault}
        save_file({n: v.contiguous() for n, v in self.tensors.items()}, folder / _FILE, notes)

    @staticmethod
    def load(folder: Path) -> Part:
        """Read what `save` wrote."""
        with safe_open(folder / _FILE, "pt") as file:
            notes = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return Part(
            tensors,
            int(notes["done"]),
            int(notes["total"]),
            float(notes["loss"]),
            float(notes["distance"]),
            notes["fault"],
            notes["shortened"] == "True",
        )


@dataclass
class Trainer:
    """One training of one student."""

    student: Student
    teacher: Teacher
    losses: Losses
    schedule: Schedule
    images: Tensor
    judge: Callable[[QuantState], float]
    start_distance: float
    blind_distance: float  # of a network that does not look at its images
    seed: int
    checkpoint: Checkpoint
    seconds: float | None
    progress: Progress
    trail: list[dict[str, Any]] = field(default_factory=list, init=False)  # a row per part
    best: Part | None = field(default=None, init=False)  # the nearest one, of those that were sound
    last: Part | None = field(default=None, init=False)

    def run(self) -> None:
        """Train to the end, or until it cannot go on."""
        groups = self.student.parameter_groups(**self.schedule.rates, decay=self.schedule.decay)
        if not groups:
            return
        self.optimizer = torch.optim.AdamW(groups, foreach=True)
        self.rates = [group["lr"] for group in groups]
        self.walk: Iterator[int] | None = None
        for number in range(PARTS):
            part: Part = self.checkpoint(
                self._key(number), functools.partial(self._train, number), Part.save, Part.load
            )
            self._take(part)
            if part.fault:
                log.warning("training stopped after %d iterations: %s", part.done, part.fault)
                break

    def _key(self, number: int) -> dict[str, Any]:
        # Without the time that is left, which is never twice the same: what is still to do is
        # planned anew behind the parts that are found.
        return {"pass": "qat", "part": number}

    def _take(self, part: Part) -> None:
        """Note a finished part; only the last and the best one keep their tensors."""
        row = {name: getattr(part, name) for name in ("done", "loss", "distance", "fault")}
        self.trail.append({k: v for k, v in row.items() if v not in ("", math.inf) and v == v})
        self.last = part
        if not part.fault and (self.best is None or part.distance < self.best.distance):
            self.best = dataclasses.replace(part, tensors=student_tensors(part, prefix=True))

    def _train(self, number: int) -> Part:
        """Go through one part of the schedule."""
        if self.walk is None:
            self._begin()
        schedule, trail = self.schedule, Trail(self.steps, self.student.device)
        rng = torch.Generator().manual_seed(self.seed + _SEED_STEP * (number + 1))
        batches = self._batches(rng)
        finite = True
        while finite and self.done * PARTS < self.total * (number + 1):
            assert self.walk is not None
            if next(self.walk, None) is None:  # the time is over
                break
            factor = cosine((self.done + 0.5) / self.total, warm_up=schedule.warm_up)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            read = trail.add(self._step(next(batches)))
            self.done += 1
            finite = all(map(math.isfinite, read))
            self.progress(self.done, self.total, "training")
        finite = all(map(math.isfinite, trail.read())) and finite
        few = trail.values[-max(1, len(trail.values) // 2) :]
        loss = math.fsum(few) / len(few) if few and finite else math.nan
        shortened = self.steps.shortened or (self.last is not None and self.last.shortened)
        part = Part(self._tensors(), self.done, self.total, loss, math.inf, "", shortened)
        part.fault = "" if finite else "the loss is not a finite number"
        if finite:
            part.distance = self.judge(self.student.state())
            part.fault = self._find_fault(part.distance)
        return part

    def _begin(self) -> None:
        """Start, or go on behind the last part that was found."""
        self.done = 0
        if self.last is not None:
            self._restore(self.last)
            self.done = self.last.done
        self.before = self.done
        self.steps = Steps(max(1, self.schedule.iterations - self.done), self.seconds)
        self.walk = iter(self.steps)

    @property
    def total(self) -> int:
        """Return the iterations that there will be in all, as far as is known now."""
        return self.before + self.steps.total

    def _step(self, images: Tensor) -> Tensor:
        """Take one step on a batch; return its loss."""
        device = self.student.device
        images = images.to(device, non_blocking=True)
        wanted = self.teacher(images)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.schedule.half):
            found = self.student.features(images)
        loss = self.losses.of(wanted, found)
        loss.backward()
        if self.schedule.clip:
            own = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(own, self.schedule.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.student.hold()
        return loss

    def _find_fault(self, distance: float) -> str:
        """Say why a network at this distance is not to be trained on; empty if it is.

        It is given one part's time to come back: rates are high in the beginning.
        """
        if not math.isfinite(distance):
            return "the outputs are not finite numbers"
        limit = max(self.blind_distance, _WORSE * self.start_distance)
        if distance > limit and self.last is not None and self.last.distance > limit:
            return (
                f"the network has collapsed: its distance from the float one is {distance:.3g}, "
                f"it was {self.start_distance:.3g}, and {self.blind_distance:.3g} is that of a "
                "network that gives all images the same answer"
            )
        return ""

    def _batches(self, rng: torch.Generator) -> Iterator[Tensor]:
        """Yield a part's batches, moved at random; no image comes again before all were in."""
        size = min(self.schedule.batch_size, len(self.images))
        order = torch.empty(0, dtype=torch.long)
        while True:
            if len(order) < size:
                order = torch.cat((order, torch.randperm(len(self.images), generator=rng)))
            yield moved(self.images[order[:size]], self.schedule.shift, rng)
            order = order[size:]

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"{_OWN}{n}": value for n, value in self.student.snapshot().items()}
        packed = pack_optimizer(self.optimizer)
        found |= {f"{_OPTIMIZER}{name}": value for name, value in packed.items()}
        return found

    def _restore(self, part: Part) -> None:
        self.student.restore(student_tensors(part))
        own = {k: v for k, v in part.tensors.items() if k.startswith(_OPTIMIZER)}
        unpack_optimizer(self.optimizer, {k.removeprefix(_OPTIMIZER): v for k, v in own.items()})


def student_tensors(part: Part, *, prefix: bool = False) -> dict[str, Tensor]:
    """Return the student's own among the tensors of a part, with or without their prefix."""
    own = {name: value for name, value in part.tensors.items() if name.startswith(_OWN)}
    return own if prefix else {n.removeprefix(_OWN): value for n, value in own.items()}


def moved(images: Tensor, shift: float, rng: torch.Generator) -> Tensor:
    """Return the images, some mirrored, all shifted at random around their edges.

    What is learned is what the float network answers, to any image: each is its own label.
    """
    mirrored = torch.rand(len(images), generator=rng) < 0.5
    limits = [round(shift * side) for side in images.shape[2:]]
    ways = [torch.randint(-n, n + 1, (len(images),), generator=rng).tolist() for n in limits]
    return move(images, mirrored, zip(*ways, strict=True))
