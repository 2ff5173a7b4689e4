"""A teacher and the name of a student in; a trained student in a file that `build` takes out.

The stages that load the teacher and make images are the build's own, and share its store.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfqc.compiler import pipeline, stages_distill
from dfqc.compiler import stage_keys as depend
from dfqc.compiler._identity import arch_digest, file_sha256, is_zoo, split_factory
from dfqc.compiler._imagefiles import find_images
from dfqc.compiler.artifact import Store
from dfqc.compiler.build import Listener
from dfqc.compiler.distill_options import IMAGES, METHODS, PRESETS, DistillOptions
from dfqc.compiler.driver import Driver, Limits, Stage, StageRecord
from dfqc.compiler.errors import AccuracyGateError, EnvironmentFault, UsageError
from dfqc.compiler.job import make_job
from dfqc.compiler.recipe import Recipe, make_recipe, parse_options
from dfqc.compiler.stages import FACTS, assumed_note
from dfqc.compiler.stages_distill import DistillJob
from dfqc.compiler.storage import load_json

log = logging.getLogger("dfqc.distill")

_SHARED = {stage.name: stage for stage in pipeline.STAGES}
_GENERATOR = "dafl"  # the synthesizer that follows a training


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is asked of a distillation beside the recipe."""

    student: str
    method: str = "images"
    init: str | None = None
    options: tuple[str, ...] = ()
    output: str | None = None


def run_distill(
    flags: Mapping[str, Any],
    recipe_file: Path | None,
    wish: Wish,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Train a student without data, write it to a .pt2, and return what is to be said of it.

    A training that breaks down is stopped; the best student so far is written, and `exit_code`
    is 5.
    """
    job = make_distill_job(flags, recipe_file, wish)
    check_output(job.output)
    with pipeline.open_store(job.recipe.cache_dir) as store:
        driver = _drive(job, store, listener or Listener())
        return _write(job, driver)


def make_distill_job(flags: Mapping[str, Any], recipe_file: Path | None, wish: Wish) -> DistillJob:
    """Bind everything that is asked; raises `UsageError` for what contradicts itself."""
    if wish.method not in METHODS:
        raise UsageError(f"--method: got {wish.method!r}, expected one of {', '.join(METHODS)}")
    recipe = _make_recipe(flags, recipe_file, wish.method)
    if not is_zoo(wish.student):
        split_factory(wish.student)
    file = wish.output or f"out/{_short_name(wish.student)}-distilled.pt2"
    base = make_job(recipe.model_copy(update={"output": file}))
    return DistillJob(
        **{f.name: getattr(base, f.name) for f in dataclasses.fields(base)},
        student=wish.student,
        student_digest=arch_digest(wish.student, recipe.seed),
        method=wish.method,
        options=_make_options(recipe, wish),
    )


def stages_for(job: DistillJob) -> tuple[Stage, ...]:
    """Return the stages of a distillation; a generator needs no images made before."""
    images = () if job.generates else (_SHARED["synthesize"],)
    return (
        _SHARED["trace"],
        _SHARED["data"],
        # Before images are made: a student that does not fit must not cost their time.
        Stage(
            "student",
            ("trace",),
            stages_distill.check_student,
            stages_distill.save_student,
            stages_distill.load_student,
            options=lambda job: {"student": job.student_digest},
            environment=depend.versions("torch"),
            code=depend.modules("matching", "frontend", "_zoo"),
        ),
        _SHARED["zoo"],
        *images,
        _SHARED["holdout"],
        Stage(
            "distill",
            ("trace", "zoo", "student", "holdout", *(stage.name for stage in images)),
            stages_distill.distill,
            stages_distill.save_state,
            stages_distill.load_state,
            options=_distill_options,
            environment=depend.compute,
            code=lambda job: (
                "dfqc.compiler.distill_train",
                "dfqc.compiler.matching",
                *("dfqc.compiler.frontend", "dfqc.compiler._zoo", "dfqc.compiler.calib_quality"),
                *([f"dfqc.calib.{job.recipe.synth}"] if job.generates else []),
            ),
            seeded=True,
        ),
        Stage(
            "judge",
            ("trace", "student", "holdout", "distill"),
            stages_distill.judge,
            stages_distill.save_verdict,
            stages_distill.load_verdict,
            options=lambda job: {"eval-data": job.eval_digest, "student": job.student_digest},
            environment=depend.compute,
            code=depend.modules("evaluate", "dataset", "simulate"),
        ),
    )


def check_output(file: Path) -> None:
    """Refuse, before any work, a file that is no .pt2 or cannot be written."""
    if file.suffix != ".pt2":
        raise UsageError(f"-o {file}: expected a file ending in .pt2")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        probe = file.with_name(f".{file.name}.{os.getpid()}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EnvironmentFault(
            f"{file} cannot be written: {error.strerror or error}; choose another with -o"
        ) from error


def _make_recipe(flags: Mapping[str, Any], file: Path | None, method: str) -> Recipe:
    """Return the recipe of the teacher and its images, with a training's number of them."""
    flags = dict(flags)
    if method != "images":
        for name in ("synth", "calib_data", "samples"):
            if flags.get(name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')}: --method {method} trains a generator that makes "
                    "all images; leave it out, or use --method images"
                )
        flags["synth"] = _GENERATOR
    if method == "dafl" and flags.get("zoo"):
        raise UsageError("--zoo: --method dafl reads the teacher alone; use --method mix")
    recipe = make_recipe(flags, file)
    if method == "mix" and not recipe.zoo:
        raise UsageError(
            "--method mix: images are judged by the models of a zoo, and there is none: give "
            "--zoo, or use --method dafl, which reads the teacher alone"
        )
    if "samples" in recipe.model_fields_set:
        return recipe
    count = IMAGES[recipe.effort]
    if recipe.calib_data:
        count = len(find_images(Path(recipe.calib_data), need_labels=False)[1])
    return make_recipe({**flags, "samples": count}, file)


def _make_options(recipe: Recipe, wish: Wish) -> DistillOptions:
    from types import SimpleNamespace

    from dfqc.compiler.options import plugin_options

    given = parse_options(wish.options, "distill_option")
    if wish.init is not None:
        given["init"] = wish.init
    presets = {effort: PRESETS[wish.method, effort] for effort in ("quick", "standard", "max")}
    holder = SimpleNamespace(Options=DistillOptions, PRESETS=presets)
    options: DistillOptions = plugin_options(holder, "distill", recipe.effort, given)
    return options


def _distill_options(job: DistillJob) -> Mapping[str, Any]:
    # The student's facts tell networks of equal size not apart: its code and weights do.
    own: dict[str, Any] = {"method": job.method, "student": job.student_digest}
    own |= {"distill": job.options.model_dump(mode="json")}
    return {**own, **depend.pick("budget", "synth", "synth-option", "effort")(job)}


def _short_name(student: str) -> str:
    return student.rpartition(":")[2]


def _drive(job: DistillJob, store: Store, listener: Listener) -> Driver:
    recipe = job.recipe

    def finished(record: StageRecord) -> None:
        listener.finished(record)
        if record.name == "trace":
            note = assumed_note(load_json(driver.artifact("trace").file(FACTS))["image"])
            if note:
                log.warning(note)

    driver = Driver(
        stages_for(job),
        job,
        store,
        seed=recipe.seed,
        label=job.model_digest,
        limits=Limits(recipe.budget_seconds, recipe.memory_bytes),
        reporter=listener.reporter,
        finished=finished,
    )
    driver.run()
    return driver


def _write(job: DistillJob, driver: Driver) -> dict[str, Any]:
    """Write student and curve beside each other, and say what they are."""
    from dfqc.compiler.driver import Context
    from dfqc.compiler.model_file import save_model

    last = Context(driver, driver.stages[-1])
    save_model(stages_distill.trained_student(last), job.output)
    state = driver.value("distill")
    curve = job.output.with_suffix(".curve.csv")
    curve.write_text(_table(state.curve), encoding="utf-8")
    teacher, student = (
        load_json(driver.artifact(stage).file(name))
        for stage, name in (("trace", FACTS), ("student", stages_distill.STUDENT))
    )
    return {
        "file": str(job.output),
        "sha256": file_sha256(job.output),
        "method": job.method,
        "seed": job.recipe.seed,
        "teacher": {"source": job.recipe.model, **_sizes(teacher)},
        "student": {"source": job.student, **_sizes(student)},
        "options": job.options.model_dump(mode="json"),
        "taken_over": student["alike"] if job.options.init == "teacher" else {},
        "hints": student["hints"] if job.options.hint else [],
        "images": job.recipe.synth if job.generates else _images(driver),
        "steps": {"done": state.done, "planned": job.options.steps, "shortened": state.shortened},
        **driver.value("judge"),
        "curve": state.curve,
        "curve_file": str(curve),
        "stopped": state.stopped or None,
        "exit_code": AccuracyGateError.exit_code if state.stopped else 0,
        "stages": [dataclasses.asdict(record) for record in driver.records],
    }


def _sizes(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("params", "macs", "classes")}


def _images(driver: Driver) -> dict[str, Any]:
    calib = driver.value("synthesize")
    return {"source": calib.source, "count": len(calib.images)}


def _table(curve: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, curve[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(curve)
    return text.getvalue()
