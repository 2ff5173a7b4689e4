"""AdaDFQ's zero-sum game: a student and a generator in, both after each part of the game out.

In every iteration the generator draws images and learns to make them adaptable to the student, and
the student learns what the float network answers to them. The game is cut into parts: after each
one it can be stored, judged, and stopped where the generator has collapsed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfqc.compiler import calib_quality
from dfqc.compiler.contracts import Checkpoint, Progress, forgetful, silent
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph
from dfqc.compiler.opponent import Opponent
from dfqc.compiler.precision import choose_precision
from dfqc.compiler.quantize._entropy import student_loss
from dfqc.compiler.quantize._game_options import GameOptions, Settings, in_beginning
from dfqc.compiler.quantize._optimizer import pack_optimizer, unpack_optimizer
from dfqc.compiler.quantize._student import Student
from dfqc.compiler.steps import Losses, Steps

log = logging.getLogger(__name__)

DRAWN = 64  # images that are looked at after each part
# Where a generator counts as collapsed beside twins: evenness of the classes after it was good.
EVENNESS_LIMIT, EVENNESS_GOOD = 0.5, 0.7
_TENSORS, _NOTES = "game.safetensors", "game.json"


@dataclass(frozen=True)
class Part:
    """What a part of a game left: `tensors` continue it, `collapse` says why it must not go on.

    `shortened`: it, or one before it, has fewer iterations than planned.
    `evenness` is that of the classes the teacher sees in what the generator draws.
    """

    tensors: Mapping[str, Tensor]
    iterations: int
    shortened: bool
    loss: float  # of the generator, last
    student_loss: float
    evenness: float = 0.0
    collapse: str = ""

    def notes(self) -> dict[str, Any]:
        """Return plain data on it, without the tensors; losses that are no numbers are None."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del found["tensors"]
        for name in ("loss", "student_loss"):
            found[name] = found[name] if math.isfinite(found[name]) else None
        return found


class Game:
    """Both players, the student's optimizer and the schedule.

    Args:
        student: learns with `optimizer`.
        opponent: makes the images.
        teacher: the unfolded float network, to look at what is drawn.
        options: of the game.
        settings: what the options leave to the size of the image.
        optimizer: holds the student's parameters at the rates to begin with.
        seed: of the images that are looked at.
        device: where both play.
    """

    def __init__(
        self,
        student: Student,
        opponent: Opponent,
        teacher: Graph,
        options: GameOptions,
        settings: Settings,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.student, self.opponent, self.teacher = student, opponent, teacher
        self.options, self.settings, self.optimizer = options, settings, optimizer
        self.seed, self.device = seed, device
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.evenness = 0.0  # the best so far

    def play(
        self,
        parts: int,
        *,
        seconds: Callable[[], float | None] = lambda: None,
        progress: Progress = silent,
        checkpoint: Checkpoint = forgetful,
    ) -> Iterator[Part]:
        """Yield after each part, both players as it left them; end where the generator collapsed.

        Args:
            parts: how many; none is shorter than an iteration.
            seconds: returns the time that is left for the rest of the game; None: no limit.
            progress: called per iteration.
            checkpoint: keeps finished parts.
        """
        parts = min(parts, self.options.iterations)
        done, short = 0, False
        for number in range(parts):
            planned = _share(self.options.iterations, number, parts)
            rest = sum(_share(self.options.iterations, n, parts) for n in range(number + 1, parts))
            made = False

            def make(
                number: int = number,
                planned: int = planned,
                rest: int = rest,
                done: int = done,
                short: bool = short,
            ) -> Part:
                nonlocal made
                made = True
                left = seconds()
                steps = Steps(planned, None if left is None else left / (parts - number))

                def report(note: str) -> None:
                    progress(done + steps.done + 1, done + steps.total + rest, note)

                own = self._play_part(steps, number, parts, done, report)
                return dataclasses.replace(own, shortened=own.shortened or short)

            part: Part = checkpoint({"game": number, "of": parts}, make, save_part, load_part)
            if not made:
                self.restore(part.tensors)
            done += part.iterations
            short = part.shortened
            self.evenness = max(self.evenness, part.evenness)
            if part.collapse:
                log.warning("adadfq: %s: the game ends after %d iterations", part.collapse, done)
                progress(done, done, "stopped")
            yield part
            if part.collapse:
                return

    def _play_part(
        self, steps: Steps, number: int, parts: int, before: int, report: Callable[[str], None]
    ) -> Part:
        """Play the iterations of one part, `before` of which there were others."""
        losses, own = Losses(steps, self.device), Losses(steps, self.device)
        learning = False
        for _ in steps:
            fraction, played = (number + steps.fraction) / parts, before + steps.done
            learning = not self._begins("warm_up", fraction, played)
            self.student.observe(self._begins("observe", fraction, played))
            loss, student = self._iterate(fraction, learning)
            read, _ = losses.add(loss), own.add(student)
            if read:
                report(f"generator {read[-1]:.3g}, student {own.values[-1]:.4g}")
            if not all(map(math.isfinite, read + own.values[-len(read) :])):
                break
        self.student.observe(False)  # it may be asked for something else meanwhile
        losses.read()
        own.read()
        last = losses.values[-1], own.values[-1]
        finite = all(map(math.isfinite, losses.values + own.values))
        evenness, collapse = 0.0, "a loss is not a number"
        if finite:
            evenness, collapse = self.look_at_images(number)
        if finite and not learning:
            collapse = ""  # a generator in its warm-up is not yet what it will be
        return Part(self.snapshot(), max(1, steps.done), steps.shortened, *last, evenness, collapse)

    def _begins(self, name: str, fraction: float, played: int) -> bool:
        """Report whether the `warm_up`, or to `observe`, still lasts."""
        share, given = getattr(self.settings, name), getattr(self.options, name)
        return in_beginning(share, given, fraction=fraction, done=played)

    def _iterate(self, fraction: float, learning: bool) -> tuple[Tensor, Tensor]:
        """Let the generator make a step, and the student if it is `learning`; return the losses."""
        factor = self.settings.factor(fraction, self.options.decay)
        move = self.opponent.step(self._answer, factor)
        loss = student_loss(move.teacher, move.student, self.settings.temperature)
        if learning:
            self.optimizer.zero_grad()
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            # The graph of the images goes on into the generator: only the student's part is walked.
            learned = [p for group in self.optimizer.param_groups for p in group["params"]]
            slopes = torch.autograd.grad(loss, learned, allow_unused=True)
            for parameter, slope in zip(learned, slopes, strict=True):
                parameter.grad = slope
            self.optimizer.step()
            self.student.hold()
        return move.loss, loss.detach()

    def _answer(self, images: Tensor) -> Tensor:
        """Return the student's logits in float32."""
        precision = getattr(torch, choose_precision(self.options.precision, self.device))
        enabled = precision != torch.float32
        with torch.autocast(self.device.type, precision) if enabled else contextlib.nullcontext():
            logits: Tensor = self.student(images)
        return logits.float()

    def look_at_images(self, number: int) -> tuple[float, str]:
        """Return the evenness of the classes in what the generator draws, and why it collapsed.

        Half of the images nearly equal to another one, or classes gone that it had. One that never
        had them has learned too little yet, which is no reason to stop.
        """
        labels = torch.arange(DRAWN) % self.opponent.classes
        rng = torch.Generator(self.device).manual_seed(self.seed + number)
        images = self.opponent.draw(labels, rng)
        try:
            found = calib_quality.score(self.teacher, images, labels, device=self.device)
        except UsageError as error:
            return 0.0, f"the generator collapsed: {error}"
        seen = found.predictions
        evenness = 1.0 if seen is None else seen.evenness
        if found.twins.images > calib_quality.TWINS_COLLAPSED * found.images:
            return evenness, (
                f"the generator collapsed: {found.twins.images} of {found.images} images nearly "
                "equal another one"
            )
        if seen is not None and evenness < EVENNESS_LIMIT and self.evenness >= EVENNESS_GOOD:
            return evenness, (
                f"the generator collapsed: the model sees {seen.hit} of {seen.possible} classes in "
                f"its images, evenness {evenness:.2f} (it was {self.evenness:.2f})"
            )
        return evenness, ""

    def snapshot(self) -> dict[str, Tensor]:
        """Return all that the rest of the game depends on, on the CPU."""
        return {
            **{f"student/{k}": v for k, v in self.student.snapshot().items()},
            **{f"opponent/{k}": v for k, v in self.opponent.snapshot().items()},
            **{f"optimizer/{k}": v for k, v in pack_optimizer(self.optimizer).items()},
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a snapshot."""
        self.student.restore(_under("student/", tensors))
        self.opponent.restore(_under("opponent/", tensors))
        unpack_optimizer(self.optimizer, _under("optimizer/", tensors))


def save_part(part: Part, folder: Path) -> None:
    """Write a part: safetensors and JSON."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in part.tensors.items()}, folder / _TENSORS)
    (folder / _NOTES).write_text(json.dumps(part.notes()), encoding="utf-8")


def load_part(folder: Path) -> Part:
    """Read what `save_part` wrote."""
    from safetensors.torch import load_file

    notes = json.loads((folder / _NOTES).read_text(encoding="utf-8"))
    for name in ("loss", "student_loss"):
        notes[name] = math.nan if notes[name] is None else notes[name]
    return Part(tensors=load_file(folder / _TENSORS), **notes)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _share(iterations: int, number: int, parts: int) -> int:
    """Return the iterations of a part: equal to within one."""
    return iterations // parts + (number < iterations % parts)
