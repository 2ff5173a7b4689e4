"""What the stages of `dfqc distill` do: a context in, a student and what it is worth out."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler import plugins
from dfqc.compiler._identity import is_zoo
from dfqc.compiler.distill_options import SOURCE, DistillOptions
from dfqc.compiler.driver import Context
from dfqc.compiler.errors import LoadError, UnsupportedError
from dfqc.compiler.job import Job
from dfqc.compiler.options import plugin_options
from dfqc.compiler.stages import FACTS, device_of, model_facts
from dfqc.compiler.storage import load_json, save_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dfqc.compiler.distill_train import Trainer, TrainState
    from dfqc.compiler.graph import Graph
    from dfqc.compiler.sources import ImageSource

log = logging.getLogger("dfqc.distill")

STUDENT, TENSORS, METRICS = "student.json", "state.safetensors", "metrics.json"
_SHARE = 0.9  # of the time left that the training may take; the rest is for judging and writing
_PATIENCE = 100  # steps that a generator is given to show more than one class


@dataclass(frozen=True, kw_only=True)
class DistillJob(Job):
    """A distillation: the teacher is the job's model, and its preprocessing is the student's."""

    student: str
    student_digest: str
    method: str
    options: DistillOptions

    @property
    def generates(self) -> bool:
        """Report whether a generator is trained beside the student."""
        return self.method != "images"


def check_student(context: Context) -> dict[str, Any]:
    """Build the student and compare it with the teacher, before anything long begins."""
    from dfqc.compiler.matching import copy_blocks, find_hints

    job: DistillJob = context.settings
    teacher = context.value("trace")
    classes = load_json(context.path("trace", FACTS))["classes"]
    if (classes or 0) < 2:
        raise UnsupportedError(
            f"{job.recipe.model}: its output is not one row of class scores per image, and those "
            "are what a student learns; a teacher must classify"
        )
    student = build_student(job, teacher, classes)
    facts = model_facts(student)
    if facts["classes"] != classes:
        raise LoadError(
            f"--student {job.student}: gives {facts['classes'] or 'no'} class scores and the "
            f"teacher {classes}; use a factory with {classes} classes"
        )
    copied = copy_blocks(teacher, student)
    hints = [hint._asdict() for hint in find_hints(teacher, student)]
    return {**facts, "alike": copied, "hints": hints}


def save_student(facts: Mapping[str, Any], folder: Path) -> None:
    """Write what is known of the student."""
    save_json(dict(facts), folder / STUDENT)


def load_student(folder: Path) -> Any:
    """Read it."""
    return load_json(folder / STUDENT)


def build_student(job: DistillJob, teacher: Graph, classes: int) -> Graph:
    """Return the student with random weights, traced at the teacher's input size.

    Raises:
        LoadError: an unknown architecture, or one that does not read images of this size.
        UnsupportedError: one that cannot be captured.
    """
    from dfqc.compiler import frontend
    from dfqc.compiler._zoo import build_arch
    from dfqc.compiler.loading import LoadedModel

    asked = classes if is_zoo(job.student) else None
    try:
        module, _ = build_arch(
            job.student, seed=job.recipe.seed, size=teacher.image.size, num_classes=asked
        )
        loaded = LoadedModel(module.float(), teacher.image, job.student, job.student_digest)
        return frontend.trace(loaded)
    except LoadError as error:
        text = str(error).replace("--arch", "--student", 1)
        raise LoadError(text if "--student" in text else f"--student: {text}") from error


def distill(context: Context) -> TrainState:
    """Train the student segment by segment; each survives a kill."""
    job: DistillJob = context.settings
    trainer = _open_trainer(context)
    progress = context.progress()
    # What was trained under one budget is gone on with under another.
    keep = functools.partial(context.checkpoint, without=("budget",))
    state: TrainState = keep({"segment": 0}, trainer.begin, save_state, load_state)
    number = 0
    while not state.finished:
        number += 1
        advance = functools.partial(
            trainer.advance, state, seconds=context.share_of_time(_SHARE), progress=progress
        )
        state = keep({"segment": number}, advance, save_state, load_state, cut_short=_is_shortened)
        log.info("%s", describe_point(state.curve[-1]))
    if state.stopped:
        log.warning("the training was stopped: %s; the best student so far is kept", state.stopped)
    elif state.shortened:
        log.warning(
            "--budget leaves time for %d of %d steps; the schedule was shortened to them",
            state.done,
            job.options.steps,
        )
    return state


def describe_point(point: Mapping[str, Any]) -> str:
    """Return a point of the curve in words."""
    return (
        f"step {point['step']}, {point['seconds']:.0f} s: answers as the teacher on "
        f"{point['agreement']:.1f} % of the held-out images"
    )


def save_state(state: TrainState, folder: Path) -> None:
    """Write a state of the training."""
    from safetensors.torch import save_file

    save_file(state.tensors, folder / TENSORS)
    about = {k: v for k, v in vars(state).items() if k != "tensors"}
    save_json(about, folder / METRICS)


def load_state(folder: Path) -> TrainState:
    """Read it."""
    from safetensors.torch import load_file

    from dfqc.compiler.distill_train import TrainState

    return TrainState(tensors=load_file(folder / TENSORS), **load_json(folder / METRICS))


def trained_student(context: Context) -> Graph:
    """Return the student with the weights that were learned."""
    job: DistillJob = context.settings
    student = build_student(job, context.value("trace"), context.value("student")["classes"])
    student.module.load_state_dict(context.value("distill").part("student"))
    return student


def judge(context: Context) -> dict[str, Any]:
    """Compare student and teacher on held-out synthetic images, and on the user's, if given."""
    from dfqc.compiler.dataset import open_dataset
    from dfqc.compiler.evaluate import compare, score
    from dfqc.compiler.simulate import TorchRunner

    recipe, device = context.settings.recipe, device_of(context)
    teacher, student = context.value("trace"), trained_student(context)
    runners = {name: TorchRunner(g, device) for name, g in _named(teacher, student)}
    images = context.value("holdout").images.numpy()
    found = compare(runners["teacher"], runners["student"], [images])
    result: dict[str, Any] = {
        "agreement": {"held_out": found.agreement, "images": found.images, "evaluation": None},
        "top1": None,
    }
    if recipe.eval_data:
        dataset = open_dataset(Path(recipe.eval_data), teacher.image)
        scores = score(runners, dataset, progress=context.progress("evaluate"))
        top1 = {name: scores.top1(name).percent for name in runners}
        result["agreement"]["evaluation"] = scores.agreement("teacher", "student")
        result["top1"] = {
            **top1,
            "images": len(scores.labels),
            "share": 100 * top1["student"] / top1["teacher"] if top1["teacher"] else None,
            "drop": top1["teacher"] - top1["student"],
            "drop_standard_error": scores.paired_error("teacher", "student"),
        }
    return result


def _named(teacher: Graph, student: Graph) -> tuple[tuple[str, Graph], ...]:
    return ("teacher", teacher), ("student", student)


def save_verdict(metrics: Mapping[str, Any], folder: Path) -> None:
    """Write what `judge` found."""
    (folder / METRICS).write_text(json.dumps(metrics) + "\n", encoding="utf-8")


def load_verdict(folder: Path) -> Any:
    """Read it."""
    return load_json(folder / METRICS)


def _open_trainer(context: Context) -> Trainer:
    import torch

    from dfqc.compiler.distill_train import Trainer
    from dfqc.compiler.graph import copy_graph
    from dfqc.compiler.matching import Hint, copy_blocks

    job: DistillJob = context.settings
    facts, device = context.value("student"), device_of(context)
    teacher = copy_graph(context.value("trace"))  # laid out otherwise in memory
    student = build_student(job, teacher, facts["classes"])
    if job.options.init == "teacher":
        copy_blocks(teacher, student)
    rng = torch.Generator().manual_seed(context.seed())
    return Trainer(
        teacher,
        student,
        [Hint(h["teacher"], h["student"], tuple(h["shape"])) for h in facts["hints"]],
        _open_source(context, rng, device),
        job.options,
        rng=rng,
        held_out=context.value("holdout").images,
        device=device,
        health=functools.partial(_find_collapse, teacher) if job.generates else lambda images: "",
        patience=_PATIENCE,
    )


def _open_source(context: Context, rng: torch.Generator, device: torch.device) -> ImageSource:
    """Return the fixed set of images, or the generator."""
    from dfqc.compiler.sources import Pool

    job: DistillJob = context.settings
    recipe = job.recipe
    if not job.generates:
        return Pool(context.value("synthesize").images.to(device), rng)
    plugin = plugins.load("synthesizer", recipe.synth)
    options = source_options(job)
    zoo = context.value("zoo")
    source: ImageSource = plugin.open_source(
        context.value("trace"), zoo, options, rng=rng, device=device
    )
    return source


def source_options(job: DistillJob) -> Any:
    """Return the generator's options."""
    recipe = job.recipe
    plugin = plugins.load("synthesizer", recipe.synth)
    told = SOURCE.get((job.method, recipe.effort), {})
    return plugin_options(plugin, recipe.synth, recipe.effort, {**told, **recipe.synth_option})


def _find_collapse(teacher: Graph, images: Tensor) -> str:
    """Say what is wrong with a generator's images; empty if they differ and have classes."""
    from dfqc.compiler.calib_quality import TWINS_COLLAPSED, score

    found = score(teacher, images.cpu(), device=images.device)
    if found.twins.images > TWINS_COLLAPSED * found.images:
        return (
            f"the generator collapsed: {found.twins.images} of {found.images} of its images are "
            "nearly the same as another one; lower its rate (--synth-option lr=…)"
        )
    if found.predictions is not None and found.predictions.hit == 1 < found.predictions.possible:
        return (
            "the generator collapsed: the teacher sees one class in all of its images; raise "
            "--synth-option information=…"
        )
    return ""


def _is_shortened(state: TrainState) -> bool:
    return state.shortened
