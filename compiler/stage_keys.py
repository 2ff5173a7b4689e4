"""What the output of each stage depends on, as data: a job in, the parts of its key out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dfqc.compiler import machine, plugins, stages_engine
from dfqc.compiler.job import Job

EXPORTERS = ("torch", "onnx", "onnxscript", "onnx-ir", "dfqc")


def pick(*names: str) -> Callable[[Job], Mapping[str, Any]]:
    """Options of a stage: some keys of the saved recipe, which is plain data."""
    return lambda job: {name: job.recipe.saved()[name] for name in names}


def versions(*names: str) -> Callable[[Job], Mapping[str, Any]]:
    """Versions of distributions."""
    return lambda job: machine.versions(*names)


def trace_options(job: Job) -> Mapping[str, Any]:
    """What a capture of the model depends on."""
    # The model counts by content: the same file under another path is the same model.
    image = pick("input-size", "resize", "mean", "std", "unsafe-load")(job)
    return {"model": job.model_digest, **image}


def prune_options(job: Job) -> Mapping[str, Any]:
    """What is removed, and how it is restored; one key for all recipes that remove nothing."""
    if not job.recipe.shrinks:
        return {}
    amounts = pick("prune", "prune-by", "params", "macs", "prune-layer", "sparsity", "restore")(job)
    how = pick("prune-criterion", "prune-residual", "channel-multiple")(job)
    limit: Mapping[str, Any] = {}
    if job.recipe.prune == "auto":
        target = dataclasses.asdict(job.backend.TARGET)
        limit = pick("size", "avg-bits", "bits", "ends", "layer", "device")(job)
        limit = {**limit, "target": target}
    return {**amounts, **how, **limit}


def prune_environment(job: Job) -> Mapping[str, Any]:
    """What computes; where the amount is to be chosen, also what writes the file."""
    return allocation(job) if job.recipe.prune == "auto" else machine.versions("torch")


def prune_code(job: Job) -> tuple[str, ...]:
    """Code that decides and restores; for a choice, also what makes images and writes files."""
    ours: tuple[str, ...] = ("dfqc.compiler.pruning",)
    if job.recipe.prune == "auto":
        ours += (f"dfqc.backends.{job.recipe.target}", "dfqc.compiler.stages_joint")
        ours += ("dfqc.calib.zeroq", "dfqc.calib.noise", "dfqc.compiler.batches")
    return ours


def refit_options(job: Job) -> Mapping[str, Any]:
    """Whether weights are fitted, and within which memory."""
    return {"memory": job.recipe.memory} if job.recipe.refits else {}


def quantize_options(job: Job) -> Mapping[str, Any]:
    """What the quantizer depends on beside its inputs."""
    names = ("quantizer", "quantizer-option", "effort", "budget", "memory", "bias-correction")
    own = {"restore": job.recipe.restore} if job.recipe.quantizer == "udfc" else {}
    return {**pick(*names)(job), **own}


def plan_options(job: Job) -> Mapping[str, Any]:
    """What the decisions before any work depend on."""
    target = dataclasses.asdict(job.backend.TARGET)
    # What a limit on the weights asks for is checked with the plan, and changes nothing in it.
    return {**pick("bits", "ends", "layer", "avg-bits", "size")(job), "target": target}


def data_options(job: Job) -> Mapping[str, Any]:
    """What is checked of images."""
    digests = {"calib-data": job.calib_digest, "eval-data": job.eval_digest}
    return {**pick("synth", "samples")(job), **digests}


def synthesize_options(job: Job) -> Mapping[str, Any]:
    """What the calibration images depend on."""
    options = pick("synth", "synth-option", "effort", "samples", "budget")(job)
    return {**options, "calib-data": job.calib_digest}


def lower_options(job: Job) -> Mapping[str, Any]:
    """What the file depends on; it carries the digest of the recipe."""
    return {"target": job.recipe.target, "recipe": job.recipe_digest()}


def evaluate_options(job: Job) -> Mapping[str, Any]:
    """What accuracy is measured on."""
    return {"target": job.recipe.target, "eval-data": job.eval_digest}


def bench_options(job: Job) -> Mapping[str, Any]:
    """How latency is measured."""
    threads = stages_engine.bench_threads(job)
    return {"target": job.recipe.target, "batch": job.recipe.batch, "threads": threads}


def compute(job: Job) -> Mapping[str, Any]:
    """What computes: torch, and the kind of device."""
    return {**machine.versions("torch"), "device": job.recipe.device.split(":")[0]}


def allocation(job: Job) -> Mapping[str, Any]:
    """What computes the effects of layers, and what writes the file whose size is limited."""
    return {**compute(job), **machine.versions(*EXPORTERS)}


def engine(job: Job) -> Mapping[str, Any]:
    """What executes."""
    # What an engine computes, and how fast, belongs to this runtime on this processor.
    flags = ",".join(machine.integer_flags())
    return {"runtime": job.runtime, "cpu": machine.cpu_model(), "flags": flags}


def synthesizer(job: Job) -> tuple[str, ...]:
    """Code that makes the calibration images."""
    ours = ("dfqc.compiler.batches", "dfqc.compiler.calib_quality")
    return (f"dfqc.calib.{job.recipe.synth}", *ours)


def held_out(job: Job) -> tuple[str, ...]:
    """Code that makes the held-out images."""
    ours = ("dfqc.compiler.batches", "dfqc.compiler.calib_quality")
    return ("dfqc.calib.zeroq", "dfqc.calib.noise", *ours)


def quantizer(job: Job) -> tuple[str, ...]:
    """Code that quantizes."""
    name = job.recipe.quantizer
    opponent = plugins.constant("quantizer", name, "OPPONENT")
    loaded = (plugins.module_name("synthesizer", opponent),) if opponent else ()
    return (plugins.module_name("quantizer", name), *loaded, "dfqc.compiler.stages_calib")


def backend(*others: str) -> Callable[[Job], tuple[str, ...]]:
    """Code of the target, and other modules of the compiler."""
    ours = tuple(f"dfqc.compiler.{name}" for name in others)
    return lambda job: (f"dfqc.backends.{job.recipe.target}", *ours)


def modules(*names: str) -> Callable[[Job], tuple[str, ...]]:
    """Modules of the compiler."""
    return lambda job: tuple(f"dfqc.compiler.{name}" for name in names)
