"""Quantization-aware training: all weights, steps and biases learned together, without any label.

In: a folded graph, calibration images and a plan. Out: a `QuantState`. LSQ (Esser et al. 2020)
from the state of another quantizer, with distillation from the float network: KL of the outputs at
a temperature and the error of every block's output. Batch norms are folded into the layers, and so
are frozen. What is shipped is the best of start and training, by images that were not trained on.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from dfqc.compiler.contracts import CalibSet, Progress, QuantizerSupplies, QuantState, silent
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph, node_shapes, on_device
from dfqc.compiler.judging import split_judges
from dfqc.compiler.options import plugin_options
from dfqc.compiler.passes.bias import CORRECTED
from dfqc.compiler.precision import Precision, choose_precision
from dfqc.compiler.quantize import gptq, reconstruct, rtn
from dfqc.compiler.quantize._choice import (
    blind_distance,
    correct_biases,
    distance,
    judging_bytes,
    judging_parts,
)
from dfqc.compiler.quantize._kd import Losses, Teacher
from dfqc.compiler.quantize._student import Student, StudentOptions
from dfqc.compiler.quantize._targets import make_targets
from dfqc.compiler.quantize._trainer import Schedule, Trainer, student_tensors
from dfqc.compiler.spec import Plan

log = logging.getLogger(__name__)


class Options(BaseModel):
    """Options of the training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: Literal["reconstruct", "gptq", "rtn"] = Field(
        "reconstruct",
        description="quantizer whose result is trained on; rtn where weight_steps is tensor",
    )
    start_effort: Literal["quick", "standard", "max"] = Field(
        "quick", description="preset of that quantizer"
    )
    iterations: int = Field(1500, ge=1)
    batch_size: int = Field(32, ge=1)
    lr_weights: float = Field(2e-3, ge=0, description="in steps of the weight's grid")
    lr_weight_scale: float = Field(1e-3, ge=0, description="relative")
    lr_act_scale: float = Field(1e-3, ge=0, description="relative")
    lr_bias: float = Field(1e-3, ge=0, description="relative to what the inputs can do")
    decay: float = Field(1e-4, ge=0, description="weight decay (decoupled) of the weights")
    clip: float = Field(0.0, ge=0, description="largest norm of the gradient; 0: any")
    warm_up: float = Field(0.02, ge=0, lt=1, description="share of the iterations")
    temperature: float = Field(3.0, gt=0)
    output_weight: float = Field(1.0, ge=0, description="of the KL, times temperature squared")
    feature_weight: float = Field(1.0, ge=0, description="of the blocks' normalized errors")
    shift: float = Field(0.125, ge=0, lt=1, description="of each side at most, of a copied image")
    weight_steps: Literal["channel", "tensor"] = Field(
        "channel",
        description="one learned step per channel, or a single one per weight, which no start has: "
        "rounding then begins to nearest",
    )
    keep_best: bool = Field(
        True, description="ship the best of start, last state and those on the way; else the last"
    )
    precision: Precision = Field(
        "auto", description="of the student's layers; auto: bfloat16 on accelerators that have it"
    )


PRESETS: dict[str, dict[str, object]] = {
    "quick": {"iterations": 800},
    "standard": {"iterations": 4000, "start_effort": "standard"},
    "max": {"iterations": 44_000, "batch_size": 128, "start_effort": "standard"},
}
# Imported, not loaded by name: a change of their code must not meet old results of this one.
_STARTS = {"reconstruct": reconstruct, "gptq": gptq, "rtn": rtn}
START, TRAINED = "start", "trained"
_START_SHARE = 0.3  # of the time
_TRAINING = 6.0  # teacher, and the student with all that rounds, in forward passes
_JUDGING = 2.0 * 12 / 4  # both networks, once per part, every fourth image
_ADAM = 5  # weight, gradient, both moments and the rounded weight
_SEED = 51_001


def check_given(options: Options, given: Sequence[str]) -> None:
    """Refuse an effort for a start that has only one, and a start that could not be used.

    Raises:
        UsageError: names the starts that have more, or what goes with single steps.
    """
    single = options.weight_steps == "tensor"
    unread = [f"{n}={getattr(options, n)}" for n in ("start", "start_effort") if n in given]
    if single and unread and unread != ["start=rtn"]:
        raise UsageError(
            f"qat: {', '.join(unread)}: codes of the other quantizers have a step per channel, and "
            "weight_steps=tensor begins with rounding to nearest: leave it out"
        )
    if "start_effort" in given and not any(_STARTS[options.start].PRESETS.values()):
        others = ", ".join(name for name, plugin in _STARTS.items() if any(plugin.PRESETS.values()))
        raise UsageError(
            f"qat: start_effort is read by start={others} only, got start={options.start}: leave "
            f"it out, or give start={others}"
        )


def count_passes(options: Options, samples: int, narrow: float = 1.0) -> float:
    """Return the images that go through the network, those of the start among them."""
    plugin, chosen = _start_of(options)
    ready: float = plugin.count_passes(chosen, samples, narrow)
    trained = options.iterations * min(options.batch_size, samples)
    return ready + _JUDGING * samples + _TRAINING * trained


def count_bytes(
    options: Options,
    graph: Graph,
    samples: int,
    memory_bytes: int | None = None,
    unpruned: Graph | None = None,
) -> int:
    """Return what is kept: the optimizer's numbers, and a batch's activations for the gradient."""
    plugin, chosen = _start_of(options)
    ready: int = plugin.count_bytes(chosen, graph, samples, memory_bytes, unpruned)
    weights = sum(p.numel() for p in graph.module.parameters())
    values = sum(math.prod(shape[1:]) for shape in node_shapes(graph).values())
    batch = min(options.batch_size, samples)
    training = 4 * (_ADAM * weights + 3 * values * batch)
    return max(ready, training + judging_bytes(graph, samples))


def quantize(
    graph: Graph,
    calib: CalibSet,
    plan: Plan,
    options: Options,
    *,
    rng: torch.Generator,
    device: torch.device,
    progress: Progress = silent,
    supplies: QuantizerSupplies = QuantizerSupplies(),
) -> QuantState:
    """Train the network on its grids.

    Args:
        graph: folded graph.
        calib: images (n, c, h, w) in normalized space; their labels are not read.
        plan: what each layer and tensor gets.
        options: the method.
        rng: its seed is that of the start, the batches and the copies.
        device: where everything runs.
        progress: called per iteration.
        supplies: held-out images, time, memory; tenths of the training are kept as checkpoints.
            With `unpruned`, what the original network computes is learned.
    """
    clock = time.monotonic()
    report = _Report(progress, options.iterations)
    start = _start(graph, calib, plan, options, rng, device, report.start, supplies)
    graph = on_device(graph, device)
    images, own = split_judges(calib.images)
    judges = judging_parts(own, supplies) or [images]
    targets = make_targets(graph, supplies.unpruned, device)

    def judge(state: QuantState) -> float:
        return distance(graph, state, judges, targets, device)

    teacher = Teacher(graph, targets)
    single = options.weight_steps == "tensor"

    def make_student() -> Student:
        chosen = StudentOptions.model_validate({"relative": True, "per_tensor": single})
        return Student(graph, start, chosen, device=device, exits=teacher.exits)

    if single:  # the grids are the student's own, and so are the errors that biases make up for
        start = correct_biases(graph, make_student().state(), calib, supplies, device)
    student = make_student()
    left = None if supplies.seconds is None else supplies.seconds - (time.monotonic() - clock)
    distance_of_start = judge(start)
    trainer = Trainer(
        *(student, teacher),
        Losses(options.temperature, options.output_weight, options.feature_weight),
        _schedule(options, device),
        images,
        judge,
        distance_of_start,
        blind_distance(judges, targets, device),
        rng.initial_seed() + _SEED,
        supplies.checkpoint,
        left,
        report.training,
    )
    trainer.run()
    return _choose(start, distance_of_start, trainer, options)


def _choose(
    start: QuantState, distance_of_start: float, trainer: Trainer, options: Options
) -> QuantState:
    """Return the nearest of start, last and best state, and say what all of them are."""
    states, scores = {START: start}, {START: distance_of_start}
    for name, part in ((TRAINED, trainer.last), ("best", trainer.best)):
        if part is None or part.fault or part.distance in scores.values():
            continue
        trainer.student.restore(student_tensors(part))
        states[name], scores[name] = trainer.student.state(), part.distance
    kept = min(scores, key=lambda name: scores[name])
    if not options.keep_best and TRAINED in states:
        kept = TRAINED
    log.info("kept %s of %s", kept, scores)
    last = trainer.last
    info: dict[str, Any] = {
        **{k: v for k, v in start.info.items() if k not in ("kept", "heldout_distance")},
        "quantizer": "qat",
        "start": _start_name(options),
        "start_kept": start.info.get("kept", ""),
        "kept": kept,
        "heldout_distance": scores,
        "blind_distance": trainer.blind_distance,
        "last": trainer.trail[-1] if trainer.trail else {},
        "trail": trainer.trail,
        "collapsed": last.fault if last is not None else "",
        "iterations": last.done if last is not None else 0,
        "shortened": bool(start.info.get("shortened")) or (last is not None and last.shortened),
    }
    info[CORRECTED] = kept == START and bool(start.info.get(CORRECTED))
    if kept != START:
        before = bool(start.info.get("learned_biases"))  # and the weights were trained with those
        info["learned_biases"] = before or options.lr_bias > 0
    return dataclasses.replace(states[kept], info=info)


def _start_name(options: Options) -> str:
    return "rtn" if options.weight_steps == "tensor" else options.start


def _start_of(options: Options) -> tuple[Any, Any]:
    name = _start_name(options)
    return _STARTS[name], plugin_options(_STARTS[name], name, options.start_effort, {})


def _start(
    graph: Graph,
    calib: CalibSet,
    plan: Plan,
    options: Options,
    rng: torch.Generator,
    device: torch.device,
    progress: Progress,
    supplies: QuantizerSupplies,
) -> QuantState:
    """Return what training begins with, biases corrected unless weights get other grids."""
    plugin, chosen = _start_of(options)
    share = None if supplies.seconds is None else _START_SHARE * supplies.seconds
    state: QuantState = plugin.quantize(
        *(graph, calib, plan, chosen),
        rng=rng,
        device=device,
        progress=progress,
        supplies=dataclasses.replace(supplies, seconds=share),
    )
    if state.info.get("learned_biases") or options.weight_steps == "tensor":
        return state
    return correct_biases(graph, state, calib, supplies, device)


def _schedule(options: Options, device: torch.device) -> Schedule:
    half = choose_precision(options.precision, device) == "bfloat16"
    return Schedule(
        options.iterations,
        options.batch_size,
        {
            "weights": options.lr_weights,
            "weight_scales": options.lr_weight_scale,
            "act_scales": options.lr_act_scale,
            "biases": options.lr_bias,
        },
        options.decay,
        options.clip,
        options.shift,
        half,
        options.warm_up,
    )


class _Report:
    """Makes one count of the start and the training, which takes a quarter as much again."""

    def __init__(self, progress: Progress, iterations: int) -> None:
        self._progress, self._start = progress, max(1, iterations // 4)
        self._total = self._start + iterations

    def start(self, done: int, total: int, note: str) -> None:
        share = min(1.0, done / max(1, total))
        self._progress(int(share * self._start), self._total, f"start: {note}")

    @property
    def training(self) -> Callable[[int, int, str], None]:
        def report(done: int, total: int, note: str) -> None:
            self._progress(self._start + done, self._start + total, note)

        return report
