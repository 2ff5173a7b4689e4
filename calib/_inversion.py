"""Class-conditional inversion: nets, noise and labels in, images that the nets take for photos out.

DeepInversion (Yin et al. 2020) and MixMix (Li et al. 2021) are this loop: with one net or several,
without and with data mixing.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfqc.calib._inversion_options import InversionOptions, Settings, resolve
from dfqc.calib._objective import TERMS, Method, Objective
from dfqc.calib._pixels import Z_HIGH, Z_LOW, finish, pixel_map
from dfqc.calib.noise import draw
from dfqc.compiler.batches import balance_labels
from dfqc.compiler.contracts import CalibSet, Progress, Supplies
from dfqc.compiler.errors import UnsupportedError
from dfqc.compiler.graph import Graph
from dfqc.compiler.mixing_zoo import count_outputs
from dfqc.compiler.steps import MEASURED, Steps, anneal, cosine

log = logging.getLogger("dfqc.inversion")

_READ_EVERY = 20  # iterations; reading a loss makes the host wait for an accelerator


class Phase(NamedTuple):
    """Iterations on images of which each pixel is the mean of `pool` x `pool`."""

    pool: int
    iterations: int


def invert(
    graph: Graph,
    nets: Sequence[Graph],
    count: int,
    options: InversionOptions,
    method: Method,
    *,
    rng: torch.Generator,
    device: torch.device,
    progress: Progress,
    supplies: Supplies,
) -> CalibSet:
    """Return `count` images, normalized for `graph`, of the classes that are given or drawn.

    Raises:
        UnsupportedError: `graph` gives no class scores, or a net has no batch norm.
    """
    started = time.monotonic()
    settings = resolve(options, graph.image.size)
    labels = _labels(graph, count, rng) if supplies.labels is None else supplies.labels
    z = draw(options.init, count, graph.image.size, rng).to(device)
    z = z.contiguous(memory_format=torch.channels_last)
    objective = Objective(nets, labels.to(device), options, settings, method, rng)
    phases = _plan_phases(nets, settings)
    report = _Report(phases, progress, every=1 if device.type == "cpu" else _READ_EVERY)
    for number, phase in enumerate(phases):
        seconds = None
        if supplies.seconds is not None:
            left = supplies.seconds - (time.monotonic() - started)
            seconds = left * _share_of_work(phases[number:])
        steps = Steps(phase.iterations, seconds)
        report.enter(steps)
        for terms in _optimize(z, phase.pool, objective, steps, options, settings):
            report.add(terms)
    info = report.summary() | {"settings": settings.to_json()}
    if settings.low_res and len(phases) == 1:
        info["note"] = (
            f"{method.name}: a net cannot read images of half the size, so all iterations are at "
            "the full one"
        )
    images = finish(z, pixel_map(graph.image, device), options)
    return CalibSet(images, labels.cpu(), method.name, info)


def _labels(graph: Graph, count: int, rng: torch.Generator) -> Tensor:
    """Draw classes of a model that was not asked for any."""
    classes = count_outputs(graph)
    if classes is None or classes < 2:
        raise UnsupportedError(
            f"{graph.source}: its output is not one row of class scores per image, which images of "
            "classes are made for; use a synthesizer without classes, for example zeroq"
        )
    seeds = torch.randint(1 << 62, (-(-count // classes),), generator=rng, device=rng.device)
    return balance_labels(count, classes, seeds.tolist())


def _plan_phases(nets: Sequence[Graph], settings: Settings) -> list[Phase]:
    """Return the phase at half the resolution, if there is one, and that at the full one."""
    low = min(round(settings.iterations * settings.low_res), settings.iterations - 1)
    full = Phase(1, settings.iterations)
    if not low:
        return [full]
    channels, height, width = nets[0].image.size
    half = (channels, height // 2, width // 2)
    unable = [net.source for net in nets if not _can_read(net, half)]
    if unable:
        log.info("%s: all iterations are at full resolution", ", ".join(unable))
        return [full]
    return [Phase(2, low), Phase(1, settings.iterations - low)]


def _can_read(graph: Graph, size: tuple[int, int, int]) -> bool:
    """Report whether a model has the same outputs for images of `size`.

    It has not where sizes are written into it: by flattening a map, a reshape, a pooling window.
    """
    image = dataclasses.replace(graph.image, size=size)
    try:
        outputs = count_outputs(dataclasses.replace(graph, image=image))
    except (RuntimeError, ValueError) as error:
        log.debug("%s: %s", graph.source, error)
        return False
    return outputs == count_outputs(graph)


def _share_of_work(phases: Sequence[Phase]) -> float:
    """Return the first phase's share: an iteration's work is in proportion to the pixels."""
    work = [phase.iterations / phase.pool**2 for phase in phases]
    return work[0] / sum(work)


def _optimize(
    z: Tensor,
    pool: int,
    objective: Objective,
    steps: Steps,
    options: InversionOptions,
    settings: Settings,
) -> Iterator[Tensor]:
    """Optimize `z` in place with an optimizer of its own; yield the losses before every step."""
    leaf = z.detach().requires_grad_()  # shares the memory of z
    optimizer = torch.optim.Adam([leaf], lr=settings.lr, betas=settings.betas)
    warm_up = min(options.warm_up / steps.planned, 0.5)
    for _ in steps:
        factor = {
            "cosine": cosine(steps.fraction, warm_up=warm_up),
            "constant": 1.0,
            "anneal": anneal(steps.fraction),
        }[settings.schedule]
        optimizer.param_groups[0]["lr"] = settings.lr * factor
        optimizer.zero_grad()
        terms = objective.backward(leaf, pool)
        optimizer.step()
        if options.clip:
            z.clamp_(Z_LOW, Z_HIGH)
        yield terms


class _Report:
    """Counts iterations over the phases, keeps the first and last losses, reports progress."""

    def __init__(self, phases: Sequence[Phase], progress: Progress, *, every: int) -> None:
        self.phases, self.progress, self.every = phases, progress, every
        self.steps: list[Steps] = []
        self.losses: list[Tensor] = []

    def enter(self, steps: Steps) -> None:
        """Begin the next phase."""
        self.steps.append(steps)

    def add(self, terms: Tensor) -> None:
        """Take the losses of one more iteration."""
        self.losses = [*self.losses[:1], terms]
        done = sum(steps.done for steps in self.steps) + 1  # the one under way is not counted yet
        total = sum(steps.total for steps in self.steps)
        total += sum(phase.iterations for phase in self.phases[len(self.steps) :])
        if done % self.every == 0 or done == total or self.steps[-1].done < MEASURED:
            self.progress(min(done, total), total, f"loss {float(terms.sum()):.3g}")

    def summary(self) -> dict[str, Any]:
        """Return what the set's info says of the run, and report its end."""
        done = sum(steps.done for steps in self.steps)
        first, last = self.losses[0].tolist(), self.losses[-1].tolist()
        self.progress(done, done, f"loss {sum(last):.3g}")
        return {
            "iterations": done,
            "low_res_iterations": self.steps[0].done if len(self.steps) > 1 else 0,
            "shortened": any(steps.shortened for steps in self.steps),
            "first_loss": sum(first),
            "loss": sum(last),
            "losses": dict(zip(TERMS, last, strict=True)),
        }
