"""What the stage that leaves slow layers in float does: a plan in, the plan that is quantized out.

Without --autotune it hands the plan on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler.driver import Context
from dfqc.compiler.job import Job
from dfqc.compiler.spec import Plan
from dfqc.compiler.stages_engine import bench_threads
from dfqc.compiler.storage import save_json, save_plan

if TYPE_CHECKING:
    import numpy as np

    from dfqc.compiler.graph import Graph

TRIALS = "trials.json"
_TIME_SHARE = 0.2  # of a --budget
_RUNS, _SECONDS, _IMAGES = 40, 3.0, 2


def options(job: Job) -> dict[str, Any]:
    """Return what the choice depends on beside the plan."""
    if not job.recipe.autotune:
        return {"autotune": False}
    return {
        "autotune": True,
        "target": job.recipe.target,
        "batch": job.recipe.batch,
        "threads": bench_threads(job),
    }


def environment(job: Job) -> Mapping[str, Any]:
    """Return what the choice depends on of this machine: nothing, where nothing is timed."""
    from dfqc.compiler.stage_keys import engine

    return engine(job) if job.recipe.autotune else {}


def autotune(context: Context) -> tuple[Plan, dict[str, Any]]:
    """Return the plan, and what was tried (empty without --autotune)."""
    from dfqc.compiler.autotune import autotune as choose

    job: Job = context.settings
    plan: Plan = context.value("allocate")
    if not job.recipe.autotune:
        return plan, {}
    graph = context.value("fold")
    chosen, trials = choose(
        *(graph, plan, job.backend.TARGET),
        lambda plans: time_plans(job, graph, plans),
        seconds=context.share_of_time(_TIME_SHARE),
        progress=context.progress(),
    )
    left = [name for name, layer in chosen.layers.items() if layer != plan.layers[name]]
    return chosen, {
        "batch": job.recipe.batch,
        "threads": bench_threads(job),
        "in_float": [name for name in left if chosen.layers[name].weight is None],
        "trials": [dataclasses.asdict(trial) for trial in trials],
    }


def time_plans(job: Job, graph: Graph, plans: Mapping[str, Plan]) -> Mapping[str, np.ndarray]:
    """Return the milliseconds of calls of the plans' engines, timed in turns."""
    import torch

    from dfqc.compiler.bench import random_images, sample
    from dfqc.compiler.contracts import CalibSet
    from dfqc.compiler.quantize import rtn

    images = random_images(graph.image, max(_IMAGES, job.recipe.batch))
    calib = CalibSet(torch.from_numpy(images[:_IMAGES]), None, "noise")
    cheap = rtn.Options.model_validate({"weights": "minmax", "acts": "minmax"})
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dfqc-")))
        runners = {}
        for name, plan in plans.items():
            state = rtn.quantize(
                *(graph, calib, plan, cheap), rng=torch.Generator(), device=torch.device("cpu")
            )
            model = folder / f"{name}.onnx"
            model.write_bytes(job.backend.lower(graph, state, metadata={}).model)
            runner = job.backend.open_runner(model, threads=bench_threads(job))
            stack.callback(runner.close)
            runners[name] = runner
        return sample(runners, images[: job.recipe.batch], runs=_RUNS, seconds=_SECONDS)


def save_choice(value: tuple[Plan, Mapping[str, Any]], folder: Path) -> None:
    """Write the plan and what was tried."""
    save_plan(value[0], folder)
    save_json(dict(value[1]), folder / TRIALS)
