"""A teacher, a student and a source of images in; the student trained to answer alike out.

The training goes in segments: each starts from a stored state and ends in one, so that a killed run
goes on and ends in the same bytes. What is returned is the last state, never the best on a test;
only where the training breaks down, the best so far on synthetic held-out images is taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqc.compiler.contracts import Progress, silent
from dfqc.compiler.distill_options import DistillOptions
from dfqc.compiler.graph import Graph
from dfqc.compiler.matching import Hint, with_outputs
from dfqc.compiler.precision import choose_precision
from dfqc.compiler.sources import ImageSource
from dfqc.compiler.steps import MEASURED, Losses, Steps, cosine
from dfqc.compiler.views import augment

_DROPS = (0.4, 0.8)  # of the published schedule: 800 and 1600 of 2000 epochs
_EPS = 1e-6


@dataclass
class TrainState:
    """Everything a training goes on from.

    Attributes:
        done, total: steps; `total` is less than planned where the time is short.
        tensors: of student (`student/`), its optimizer (`momentum/`), the source (`source/`), the
            generator of random numbers (`rng`) and the best student so far (`best/`).
        curve: one point per segment.
        stopped: why the training ended before its time; empty if it did not.
    """

    done: int
    total: int
    tensors: dict[str, Tensor]
    curve: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    shortened: bool = False

    @property
    def finished(self) -> bool:
        """Report whether there is nothing left to do."""
        return bool(self.stopped) or self.done >= self.total

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors under `name/`."""
        cut = len(name) + 1
        return {k[cut:]: v for k, v in self.tensors.items() if k.startswith(f"{name}/")}


def output_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² KL(teacher || student) of logits (n, classes) at temperature T, mean over images.

    Hinton et al. 2015; the factor keeps gradients of one size whatever T is.
    """
    logs = [F.log_softmax(logits.float() / temperature, 1) for logits in (student, teacher)]
    divergence = F.kl_div(logs[0], logs[1], log_target=True, reduction="batchmean")
    return temperature**2 * divergence


def hint_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over pairs of maps (n, c, h, w) the squared error over the teacher's variance.

    The variance is around the channels' means: what a map of means alone would get wrong is 1.
    """
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        wanted = theirs.float()
        spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean()
        terms.append((ours.float() - wanted).square().mean() / (spread + _EPS))
    return torch.stack(terms).sum() if terms else torch.zeros(())


class Trainer:
    """Trains `student` in place to answer as `teacher` does; both on `device`.

    `held_out` are images (n, c, h, w) that nothing is trained on; `health(images)` returns what is
    wrong with the images of a source, or an empty text; it is asked after `patience` steps.
    """

    def __init__(
        self,
        teacher: Graph,
        student: Graph,
        hints: Sequence[Hint],
        source: ImageSource,
        options: DistillOptions,
        *,
        rng: torch.Generator,
        held_out: Tensor,
        device: torch.device,
        health: Callable[[Tensor], str] = lambda images: "",
        patience: int = 0,
    ) -> None:
        hints = hints if options.hint else ()
        self.options, self.rng, self.device = options, rng, device
        self.source, self.health, self.patience = source, health, patience
        self.teacher = _laid_out(with_outputs(teacher, tuple(h.teacher for h in hints)), device)
        self.student = _laid_out(with_outputs(student, tuple(h.student for h in hints)), device)
        self.held_out = held_out.to(device)
        self.student.requires_grad_(True)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            options.lr,
            momentum=options.momentum,
            nesterov=options.nesterov and options.momentum > 0,
            weight_decay=options.weight_decay,
        )
        self.wanted = self._answers(self.teacher)
        self.pace = _Pace()

    def begin(self) -> TrainState:
        """Return the state before the first step."""
        state = TrainState(0, self.options.steps, {})
        state.curve.append(self._look(state, math.nan, 0.0))
        return self._keep(state)

    def advance(
        self, state: TrainState, *, seconds: float | None = None, progress: Progress = silent
    ) -> TrainState:
        """Train one segment from `state` on; `seconds` are for all the steps that are left."""
        self._restore(state)
        started = time.monotonic()
        brief = math.ceil(state.total / self.options.points) <= MEASURED  # too short to be timed
        each = self.pace.each if brief else None
        steps = Steps(state.total - state.done, seconds, each=each)
        losses, taken, stopped = Losses(steps, self.device), 0, ""
        self.student.train()
        for _ in steps:
            total = state.done + steps.total
            read = losses.add(self._step((state.done + taken) / total))
            taken += 1
            if read:
                progress(min(state.done + taken, total), total, f"loss {read[-1]:.3g}")
            enough = taken >= math.ceil(total / self.options.points)
            if enough or not all(map(math.isfinite, read)):
                break
        losses.read()
        loss = losses.values[-1]
        if not all(map(math.isfinite, losses.values)):
            stopped = self._explain_no_number()
        self.student.eval()
        if not stopped and state.done + taken >= self.patience:
            stopped = self.health(self.shown)
        after = TrainState(
            state.done + taken,
            state.done + max(steps.total, taken),
            dict(state.tensors),
            list(state.curve),
            stopped,
            state.shortened or steps.shortened,
        )
        elapsed = state.curve[-1]["seconds"] + time.monotonic() - started
        after.curve.append(self._look(after, loss, elapsed))
        self.pace.note(taken)
        return self._keep(after)

    def _explain_no_number(self) -> str:
        """Say what broke down, the student or the images it is shown."""
        if bool(self.shown.isfinite().all()):
            return "the loss is no number any more: lower the rate (--distill-option lr)"
        return "the images are no numbers any more: lower the generator's rate (--synth-option lr)"

    def _step(self, fraction: float) -> Tensor:
        """Take one step at the place `fraction` of the schedule; return the loss before it."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * _rate(options, fraction)
        self.shown = self.source.draw(options.batch_size)
        images = augment(
            self.shown, self.rng, crop=options.crop, flip=options.flip, mix=options.mix
        )
        images = images.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            with torch.no_grad():
                wanted, theirs = self.teacher(images)
            logits, ours = self.student(images)
        loss = options.output * output_loss(logits, wanted, options.temperature)
        loss = loss + options.hint * hint_loss(ours, theirs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _look(self, state: TrainState, loss: float, seconds: float) -> dict[str, Any]:
        """Return a point of the curve: how often the student answers as the teacher."""
        equal = self._answers(self.student) == self.wanted
        return {
            "step": state.done,
            "images": state.done * self.options.batch_size,
            "seconds": round(seconds, 1),
            "agreement": 100 * float(equal.float().mean()),
            "loss": loss if math.isfinite(loss) else None,
        }

    def _answers(self, module: nn.Module) -> Tensor:
        with torch.no_grad():
            parts = [module(part)[0].argmax(1) for part in self.held_out.split(64)]
        return torch.cat(parts)

    def _keep(self, state: TrainState) -> TrainState:
        """Put what is now into the state; what broke down is answered with the best so far."""
        best = [point["agreement"] for point in state.curve]
        if state.stopped:
            state.tensors |= {f"student/{k}": v.clone() for k, v in state.part("best").items()}
            return state
        tensors = {f"student/{k}": v for k, v in self.student.state_dict().items()}
        if best[-1] >= max(best):
            tensors |= {f"best/{k}": v for k, v in self.student.state_dict().items()}
        else:
            tensors |= {f"best/{k}": v for k, v in state.part("best").items()}
        tensors |= {f"source/{k}": v for k, v in self.source.state().items()}
        tensors["rng"] = self.rng.get_state()
        for name, value in self._momenta():
            tensors[f"momentum/{name}"] = value
        state.tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        return state

    def _momenta(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.student.named_parameters():
            value = self.optimizer.state[parameter].get("momentum_buffer")
            if value is not None:
                yield name, value

    def _restore(self, state: TrainState) -> None:
        self.student.load_state_dict(state.part("student"))
        self.source.restore(state.part("source"))
        self.rng.set_state(state.tensors["rng"])
        momenta: Mapping[str, Tensor] = state.part("momentum")
        for name, parameter in self.student.named_parameters():
            if name in momenta:
                value = torch.empty_like(parameter).copy_(momenta[name])
                self.optimizer.state[parameter]["momentum_buffer"] = value

    def _autocast(self) -> AbstractContextManager[Any]:
        wanted = choose_precision(self.options.precision, self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted == "bfloat16")


class _Pace:
    """Seconds of a step, over segments too short to tell, and with what lies between them."""

    def __init__(self) -> None:
        self.each: float | None = None  # not known yet
        self._since, self._steps = math.nan, 0

    def note(self, steps: int) -> None:
        """Count a segment's steps at its end; the first one, slower, only starts the clock."""
        now = time.monotonic()
        if math.isnan(self._since):
            self._since = now
            return
        self._steps += steps
        if self._steps >= MEASURED - 1:
            self.each = (now - self._since) / self._steps


def _rate(options: DistillOptions, fraction: float) -> float:
    """Return the part of the rate that holds at `fraction` of the steps."""
    if options.schedule == "cosine":
        return cosine(fraction, warm_up=options.warm_up)
    drops: int = sum(fraction >= drop for drop in _DROPS)
    return 10.0**-drops


def _laid_out(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module to the device, in the layout in which convolutions run fastest."""
    return module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
