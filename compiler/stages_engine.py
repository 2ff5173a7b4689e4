"""What each stage on the lowered model does: golden values, parity, accuracy, latency.

In: a context whose `lower` stage is done. Out: plain data for the manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler import machine
from dfqc.compiler.driver import Context
from dfqc.compiler.job import Job
from dfqc.compiler.package import GOLDEN, to_json
from dfqc.compiler.stages import FACTS, image_spec
from dfqc.compiler.storage import FLOAT_MODEL, MODEL, load_json, save_json

if TYPE_CHECKING:
    from dfqc.compiler.contracts import Runner
    from dfqc.compiler.verify_package import Golden

log = logging.getLogger("dfqc.bench")

PARITY, METRICS, LATENCY = "parity.json", "metrics.json", "latency.json"
_GOLDEN_IMAGES = 16
_LAYER_IMAGES = 32
_BLOCK = 16  # channels that vector kernels work on together
_NO_GAIN = 1.1


@dataclass(frozen=True)
class Verdict:
    """Outcome of the parity check, and the kernels that the engine runs."""

    report: Mapping[str, Any]
    executed: Mapping[str, str]


def golden(context: Context) -> Golden:
    """Return what the simulation computes, for other machines to repeat; needs no engine."""
    from dfqc.compiler.simulate import TorchRunner, simulated
    from dfqc.compiler.verify_package import CODE_IMAGES, Golden

    lowered = context.value("lower")
    inputs = context.value("holdout").images[:_GOLDEN_IMAGES].numpy()
    reference = TorchRunner(simulated(context.value("fold"), context.value("correct")))
    codes = dict(reference.codes(inputs[:CODE_IMAGES], list(lowered.taps)))
    del codes["output"]
    return Golden(inputs, reference.infer(inputs), codes, lowered.taps, lowered.layers)


def save_golden(value: Golden, folder: Path) -> None:
    """Write golden.npz."""
    from dfqc.compiler.verify_package import write_golden

    write_golden(folder / GOLDEN, value)


def load_golden(folder: Path) -> Golden:
    """Read it."""
    from dfqc.compiler.verify_package import read_golden

    return read_golden(folder / GOLDEN)


def verify(context: Context) -> Verdict:
    """Compare simulation and engine layer by layer, and ask the engine what it really runs."""
    from dfqc.compiler.parity import check_parity

    job: Job = context.settings
    graph, state = context.value("fold"), context.value("correct")
    lowered, images = context.value("lower"), context.value("holdout").images
    with _opened(context.settings, context.path("lower", MODEL)) as runner:
        report = check_parity(graph, state, lowered, runner, images, progress=context.progress())
    executed = job.backend.executed(context.path("lower", MODEL), lowered.layers)
    return Verdict(report.to_json(), executed)


def save_verdict(verdict: Verdict, folder: Path) -> None:
    """Write the report."""
    save_json(dict(verdict.report) | {"executed": dict(verdict.executed)}, folder / PARITY)


def load_verdict(folder: Path) -> Any:
    """Read the report."""
    return load_json(folder / PARITY)


def evaluate(context: Context) -> dict[str, Any]:
    """Compare simulation and engine with the float model, on held-out and on labelled images."""
    from dfqc.compiler.evaluate import compare
    from dfqc.compiler.fidelity import layer_sqnr
    from dfqc.compiler.simulate import TorchRunner, simulated

    job: Job = context.settings
    graph, state = context.value("fold"), context.value("correct")
    held_out = context.value("holdout").images
    runners: dict[str, Runner] = {
        "float": TorchRunner(context.value("trace")),
        "simulated": TorchRunner(simulated(graph, state)),
    }
    if context.value("prune").keep:
        runners["pruned"] = TorchRunner(graph)  # what channels cost, without what rounding costs
    nodes = {name: layer.node for name, layer in state.plan.layers.items()}
    result: dict[str, Any] = {
        # Float layers here: the integer ones already clip their output as a ReLU behind them would.
        "layers": layer_sqnr(
            graph, simulated(graph, state, integer=False), nodes, held_out[:_LAYER_IMAGES]
        ),
        "images": len(held_out),
    }
    with contextlib.ExitStack() as stack:
        if job.runtime is not None:
            runners["engine"] = stack.enter_context(
                _opened(context.settings, context.path("lower", MODEL))
            )
        batches = [chunk.numpy() for chunk in held_out.split(32)]
        for name in list(runners)[1:]:
            found = compare(runners["float"], runners[name], batches)
            result[name] = dataclasses.asdict(found)
        if job.recipe.eval_data:
            result["eval"] = _score(context, runners)
    return result


def _score(context: Context, runners: Mapping[str, Runner]) -> dict[str, Any]:
    """Return top-1 of every runner, and how often they agree, on the user's images."""
    from dfqc.compiler.dataset import open_dataset
    from dfqc.compiler.evaluate import score

    recipe, image = context.settings.recipe, context.value("trace").image
    dataset = open_dataset(Path(recipe.eval_data), image)
    scores = score(runners, dataset, progress=context.progress("evaluate"))
    names = list(runners)
    result: dict[str, Any] = {
        "images": len(scores.labels),
        "top1": {name: scores.top1(name).percent for name in names},
        "agreement": {name: scores.agreement("float", name) for name in names[1:]},
    }
    if "engine" in runners:
        result["drop_standard_error"] = scores.paired_error("float", "engine")
        result["parity"] = scores.agreement("simulated", "engine")
    return result


def bench(context: Context) -> dict[str, Any]:
    """Time the engine beside the float model, both by the same runtime."""
    from dfqc.compiler.bench import random_images, sample, speedup, summarize

    recipe, threads = context.settings.recipe, bench_threads(context.settings)
    models = {"float": context.path("float", FLOAT_MODEL), "engine": context.path("lower", MODEL)}
    smaller = context.path("pruned", FLOAT_MODEL)
    models |= {"pruned": smaller} if smaller.is_file() else {}
    image = image_spec(load_json(context.path("trace", FACTS))["image"])
    with contextlib.ExitStack() as stack:
        runners = {
            name: stack.enter_context(_opened(context.settings, path, threads))
            for name, path in models.items()
        }
        half = context.settings.backend.open_half(models["float"], threads=threads)
        if half is not None:
            runners["half"] = stack.enter_context(contextlib.closing(half[1]))
        samples = sample(runners, random_images(image, recipe.batch))
    result: dict[str, Any] = {
        name: dataclasses.asdict(summarize(times, batch=recipe.batch, threads=threads, warmup=10))
        for name, times in samples.items()
    }
    if "pruned" in samples:
        result["pruned_speedup"] = speedup(samples["float"], samples["pruned"])
        gain = result["pruned_speedup"]["best"]
        if gain < _NO_GAIN and recipe.channel_multiple < _BLOCK:
            log.warning(
                "pruning makes the float model %.2f times as fast here: kernels work in blocks of "
                "channels, and what is left of one costs as much as a whole; try "
                "--channel-multiple %d, or 4, which is enough for 8-bit kernels",
                gain,
                _BLOCK,
            )
    if half is not None:
        result["half_precision"] = half[0]
        result["half_speedup"] = speedup(samples["half"], samples["engine"])
    return result | {"speedup": speedup(samples["float"], samples["engine"])}


def save_metrics(metrics: Mapping[str, Any], folder: Path) -> None:
    """Write what `evaluate` measured."""
    # In strict JSON: an engine equal to float has no noise, and no SQNR in dB.
    (folder / METRICS).write_text(to_json(metrics) + "\n")


def load_metrics(folder: Path) -> Any:
    """Read it."""
    return load_json(folder / METRICS)


def save_latency(latency: Mapping[str, Any], folder: Path) -> None:
    """Write what `bench` measured."""
    save_json(dict(latency), folder / LATENCY)


def load_latency(folder: Path) -> Any:
    """Read it."""
    return load_json(folder / LATENCY)


def bench_threads(job: Job) -> int:
    """Return the threads of the latency measurement."""
    return job.recipe.threads or machine.cpu_count()


@contextlib.contextmanager
def _opened(job: Job, model: Path, threads: int | None = None) -> Iterator[Runner]:
    runner = job.backend.open_runner(model, threads=threads)
    try:
        yield runner
    finally:
        runner.close()
