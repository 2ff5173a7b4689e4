"""The walk from a model file to a package, top to bottom: a recipe in, a `Build` out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqc.compiler import stage_keys as depend
from dfqc.compiler import (
    stages,
    stages_allocate,
    stages_autotune,
    stages_calib,
    stages_engine,
    stages_lower,
    stages_prune,
    stages_target,
    storage,
)
from dfqc.compiler.artifact import DEFAULT_LIMIT, Store, default_root
from dfqc.compiler.contracts import Progress, silent
from dfqc.compiler.driver import Driver, Limits, Stage, StageRecord
from dfqc.compiler.job import Job
from dfqc.compiler.units import parse_size

STAGES: tuple[Stage, ...] = (
    # First, because everything is named by the graph: layers, rules, reports.
    Stage(
        "trace",
        (),
        stages.trace,
        stages.save_trace,
        stages.load_trace,
        stages.verify_trace,
        options=depend.trace_options,
        environment=depend.versions("torch"),
        code=depend.modules("loading", "frontend"),
    ),
    # Before folding, so that the batch norms, from which expected activations are derived, describe
    # the equalized model too. Images are made for the original one: they serve all recipes.
    Stage(
        "equalize",
        ("trace",),
        stages.equalize,
        check=stages.verify_equalize,
        options=depend.pick("equalize"),
        code=depend.modules("passes.equalize"),
    ),
    # What can be removed and restored without data is, before anything is planned: a budget that
    # cannot be met fails here, and the plan is the smaller model's. Images are the original's.
    Stage(
        "prune",
        ("trace", "equalize"),
        stages_prune.prune,
        stages_prune.save_prune,
        stages_prune.load_prune,
        stages_prune.verify_prune,
        options=depend.prune_options,
        environment=depend.prune_environment,
        code=depend.prune_code,
        seeded=True,
    ),
    # Before any work: a rule that matches nothing and bits that the target cannot hold fail here.
    Stage(
        "plan",
        ("equalize", "prune"),
        stages.plan,
        storage.save_plan,
        storage.load_plan,
        options=depend.plan_options,
        code=depend.modules("plan", "passes.fold"),
    ),
    # What the images need is checked now, not when they are needed: an empty folder, too few
    # images, a label out of range or missing batch norms must not cost an hour of synthesis.
    Stage(
        "data",
        ("trace",),
        stages.check_data,
        stages.save_data,
        stages.load_data,
        options=depend.data_options,
        code=depend.modules("dataset"),
    ),
    # Other models beside which images are made. Read by few synthesizers, and only when they run.
    Stage(
        "zoo",
        ("trace",),
        stages_calib.read_zoo,
        options=lambda job: {"zoo": job.zoo_digests},
        environment=depend.versions("torch"),
        code=depend.modules("mixing_zoo", "loading", "frontend"),
    ),
    # On the unfolded graph, whose batch-norm statistics it matches. Independent of the plan: one
    # calibration set serves all bits and targets of a model.
    Stage(
        "synthesize",
        ("trace", "zoo"),
        stages_calib.synthesize,
        stages_calib.save_calibration,
        storage.load_calib,
        options=depend.synthesize_options,
        environment=depend.compute,
        code=depend.synthesizer,
        seeded=True,
    ),
    # What judges must not be what was fitted: other images, made in another way.
    Stage(
        "holdout",
        ("trace",),
        stages_calib.hold_out,
        stages_calib.save_calibration,
        storage.load_calib,
        options=depend.pick("budget"),
        environment=depend.compute,
        code=depend.held_out,
        seeded=True,
    ),
    # Images tell more of a pruned model's layers than batch norms do. Before folding, because later
    # stages read the batch norms of what is quantized.
    Stage(
        "refit",
        ("trace", "equalize", "prune", "synthesize", "holdout"),
        stages_prune.refit,
        stages_prune.save_refit,
        stages_prune.load_refit,
        options=depend.refit_options,
        environment=depend.compute,
        code=depend.modules("pruning", "passes._least_squares", "judging"),
        seeded=True,
    ),
    # All but synthesis works on the folded graph: it is what the engine runs. Folding takes
    # milliseconds, storing the weights twice would not.
    Stage(
        "fold",
        ("equalize", "prune", "refit"),
        stages.fold,
        check=stages.verify_fold,
        code=depend.modules("passes.fold"),
    ),
    # Which layers can do with fewer bits shows on images. Without a limit the plan passes through.
    Stage(
        "allocate",
        ("trace", "fold", "plan", "synthesize"),
        stages_allocate.allocate,
        stages_allocate.save_allocation,
        storage.load_plan,
        options=stages_allocate.options,
        environment=depend.allocation,
        code=depend.backend("allocate", "sensitivity", "plan", "quantize.rtn"),
    ),
    # Before anything is learned: what is left in float takes no part in it. Timed, so that another
    # machine may choose otherwise; without --autotune the plan passes through.
    Stage(
        "autotune",
        ("fold", "allocate"),
        stages_autotune.autotune,
        stages_autotune.save_choice,
        storage.load_plan,
        options=stages_autotune.options,
        environment=stages_autotune.environment,
        code=depend.backend("autotune", "plan", "quantize.rtn"),
    ),
    Stage(
        "quantize",
        ("equalize", "prune", "refit", "fold", "autotune", "synthesize", "holdout"),
        stages.quantize,
        storage.save_state,
        storage.load_state,
        options=depend.quantize_options,
        environment=depend.compute,
        code=depend.quantizer,
        seeded=True,
    ),
    # After rounding, whose mean error it undoes, and before lowering, which snaps the biases.
    Stage(
        "correct",
        ("equalize", "prune", "refit", "fold", "synthesize", "holdout", "quantize"),
        stages.correct,
        storage.save_state,
        storage.load_state,
        options=depend.pick("bias-correction", "memory", "trt-base"),
        environment=depend.compute,
        code=depend.modules("passes.bias"),
    ),
    # The control of every comparison. Independent of the plan: one serves all bits of a model.
    Stage(
        "float",
        ("trace",),
        stages_lower.export_float,
        storage.save_float,
        storage.load_float,
        options=depend.pick("target"),
        environment=depend.versions(*depend.EXPORTERS),
        code=depend.backend("passes.fold"),
    ),
    # A second control: what of the speed comes from fewer channels, what from fewer bits.
    Stage(
        "pruned",
        ("prune", "fold"),
        stages_prune.export_pruned,
        stages_prune.save_pruned,
        stages_prune.load_pruned,
        options=depend.pick("target"),
        environment=depend.versions(*depend.EXPORTERS),
        code=depend.backend(),
    ),
    Stage(
        "lower",
        ("trace", "fold", "float", "correct"),
        stages_lower.lower,
        storage.save_lowered,
        storage.load_lowered,
        options=depend.lower_options,
        environment=depend.versions(*depend.EXPORTERS),
        code=depend.backend("sizes"),
    ),
    # What the simulation computes: another machine, with or without this one's runtime, checks its
    # engine against it.
    Stage(
        "golden",
        ("fold", "holdout", "correct", "lower"),
        stages_engine.golden,
        stages_engine.save_golden,
        stages_engine.load_golden,
        options=depend.pick("target"),
        environment=depend.versions("torch"),
        code=depend.backend("simulate", "verify_package"),
    ),
    # Where the engine is built elsewhere: does the file hold the rules that it will be read by?
    Stage(
        "check",
        ("lower", "golden"),
        stages_target.check,
        stages_target.save_check,
        stages_target.load_check,
        options=depend.pick("target"),
        environment=depend.versions("onnx", "onnxruntime"),
        code=depend.backend("inspection"),
    ),
    # Before any figure is believed: does the engine compute what was simulated?
    Stage(
        "verify",
        ("fold", "holdout", "correct", "lower"),
        stages_engine.verify,
        stages_engine.save_verdict,
        stages_engine.load_verdict,
        options=depend.pick("target"),
        environment=depend.engine,
        code=depend.backend("parity"),
    ),
    Stage(
        "evaluate",
        ("trace", "prune", "fold", "holdout", "correct", "lower"),
        stages_engine.evaluate,
        stages_engine.save_metrics,
        stages_engine.load_metrics,
        options=depend.evaluate_options,
        environment=depend.engine,
        code=depend.backend("evaluate", "fidelity", "dataset", "simulate"),
    ),
    # Last, when nothing else runs: the one figure that other work would spoil.
    Stage(
        "bench",
        ("trace", "float", "pruned", "lower"),
        stages_engine.bench,
        stages_engine.save_latency,
        stages_engine.load_latency,
        options=depend.bench_options,
        environment=depend.engine,
        code=depend.backend("bench"),
    ),
)
# What cannot be done where the target's runtime is missing.
ON_ENGINE = ("verify", "bench")


@dataclass(frozen=True)
class Build:
    """A finished run: what the manifest and the package are made from."""

    job: Job
    driver: Driver

    @property
    def records(self) -> list[StageRecord]:
        """What became of every stage."""
        return self.driver.records

    def file(self, stage: str, name: str) -> Path:
        """Return a file of a stage's artifact."""
        return self.driver.artifact(stage).file(name)

    def data(self, stage: str, name: str) -> Any:
        """Return a JSON file of a stage's artifact."""
        return storage.load_json(self.file(stage, name))


def stages_for(job: Job) -> tuple[Stage, ...]:
    """Return the stages that this machine can run."""
    if job.runtime is not None:
        return STAGES
    return tuple(stage for stage in STAGES if stage.name not in ON_ENGINE)


def make_driver(
    job: Job,
    store: Store,
    *,
    last: str | None = None,
    reporter: Callable[[str], Progress] = lambda title: silent,
    finished: Callable[[StageRecord], None] = lambda record: None,
) -> Driver:
    """Return a driver of the stages up to `last` (all of them without it)."""
    chosen = stages_for(job)
    if last is not None:
        chosen = chosen[: [stage.name for stage in chosen].index(last) + 1]
    recipe = job.recipe
    return Driver(
        chosen,
        job,
        store,
        seed=recipe.seed,
        label=job.model_digest,
        limits=Limits(recipe.budget_seconds, recipe.memory_bytes),
        reporter=reporter,
        finished=finished,
    )


@contextlib.contextmanager
def open_store(cache_dir: str | None) -> Iterator[Store]:
    """Open the store of the recipe, and trim it in the end."""
    limit = os.environ.get("DFQC_CACHE_LIMIT")
    size = parse_size(limit, where="DFQC_CACHE_LIMIT") if limit else DEFAULT_LIMIT
    store = Store(Path(cache_dir) if cache_dir else default_root(), limit_bytes=size)
    try:
        yield store
    finally:
        store.close()
