"""How fast engines are: opened runners in, latencies measured side by side out (no torch).

The engines take turns, so that whatever else the machine does hits all of them alike; what can be
trusted on a shared machine is the ratio of two figures of one run, not the figures.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfqc.compiler import machine, plugins
from dfqc.compiler.contracts import ImageSpec, Latency, Model, Progress, Runner, silent
from dfqc.compiler.energy import Meter, find_meter, joules_per_call
from dfqc.compiler.errors import DfqcError, LoadError, UsageError
from dfqc.compiler.evaluate import score
from dfqc.compiler.package import Package, open_package
from dfqc.compiler.probe import Entry, static_row
from dfqc.compiler.providers import opener, provider_of
from dfqc.compiler.units import format_size

log = logging.getLogger("dfqc.bench")

RUNS = 100
WARMUP = 10
SECONDS = 30.0  # per engine; slow engines stop here instead of at `RUNS`

_FLOAT = "float"
_MIN_TURNS = 5
_TURN_SECONDS = 0.05
_MAX_BURST = 10


def measure(
    runners: Mapping[str, Model],
    make_input: Callable[[int], np.ndarray],
    *,
    batch: int = 1,
    threads: int,
    warmup: int = WARMUP,
    runs: int = RUNS,
    seconds: float = SECONDS,
) -> dict[str, Latency]:
    """Time engines side by side and return their latencies.

    Args:
        runners: opened engines by name.
        make_input: batch size -> images (n, c, h, w); called once, all engines get the same.
        batch: images per call.
        threads: what the runners were opened with; only recorded.
        warmup: calls before the clock starts, per engine.
        runs: timed calls per engine, at least; turns are completed.
        seconds: time per engine after which no further turn is begun.
    """
    samples = sample(
        runners, make_input(batch), warmup=warmup, runs=runs, seconds=seconds * len(runners)
    )
    return {
        name: summarize(values, batch=batch, threads=threads, warmup=warmup)
        for name, values in samples.items()
    }


def sample(
    runners: Mapping[str, Model],
    images: np.ndarray,
    *,
    warmup: int = WARMUP,
    runs: int = RUNS,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Return the milliseconds of every timed call, by engine.

    The engines take turns of a few calls, each time another one first. The first call of a turn
    is not counted: it pays for the caches that the engine before it has filled.
    """
    if not runners or runs < 1:
        raise UsageError(
            f"nothing to time: {len(runners)} engines, {runs} runs; expected 1 or more"
        )
    slowest = max(_warm_up(runner, images, warmup, clock) for runner in runners.values())
    burst = int(np.clip(_TURN_SECONDS / max(slowest, 1e-9), 1, min(_MAX_BURST, runs)))
    times: dict[str, list[float]] = {name: [] for name in runners}
    order = list(runners)
    start, turns = clock(), 0
    while len(times[order[0]]) < runs:
        if turns >= _MIN_TURNS and clock() - start > seconds:
            break
        for name in order:
            if burst > 1:
                runners[name].infer(images)
            times[name] += [_timed(runners[name], images, clock) for _ in range(burst)]
        turns += 1
        order = order[1:] + order[:1]
    return {name: 1000 * np.array(values) for name, values in times.items()}


def summarize(samples: np.ndarray, *, batch: int, threads: int, warmup: int) -> Latency:
    """Return median, 90th percentile and mean of timed calls (milliseconds)."""
    return Latency(
        median_ms=float(np.median(samples)),
        p90_ms=float(np.quantile(samples, 0.9)),
        mean_ms=float(samples.mean()),
        batch=batch,
        threads=threads,
        runs=len(samples),
        warmup=warmup,
    )


def speedup(reference: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    """Return how many times faster than `reference`: by medians, and by best calls.

    The best call is the one least disturbed; where the two ratios differ, the machine was busy.
    """
    return {
        "median": float(np.median(reference) / np.median(samples)),
        "best": float(reference.min() / samples.min()),
    }


def random_images(image: ImageSpec, batch: int, *, seed: int = 0) -> np.ndarray:
    """Return normalized float32 images (n, c, h, w) of uniform noise, the same every time."""
    pixels = np.random.default_rng(seed).random((batch, *image.size), dtype=np.float32)
    mean, std = (np.array(v, np.float32).reshape(-1, 1, 1) for v in (image.mean, image.std))
    images: np.ndarray = (pixels - mean) / std
    return images


def run_bench(
    folders: Sequence[Path],
    *,
    batch: int = 1,
    threads: int | None = None,
    float_model: Path | None = None,
    data: Path | None = None,
    runs: int = RUNS,
    seconds: float = SECONDS,
    provider: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare packages on this machine: what `dfqc bench A [B C]` prints.

    The reference of all ratios is the float model (`float_model`, or the one in the first
    package), and where there is none, the first package. Where the engine has half-precision
    kernels here, the float model in those is a row of its own. With `data`, top-1 on these
    labelled images is measured too. `provider` is where ONNX Runtime computes
    (`dfqc.backends.ort.PROVIDERS`), None the CPU; with another target it raises `UsageError`.
    """
    packages = [open_package(folder) for folder in folders]
    image = _common_image(packages, data is not None)
    threads = threads or machine.cpu_count()
    entries = [
        dataclasses.replace(entry, provider=provider) for entry in _entries(packages, float_model)
    ]
    openers = {entry.name: opener(entry.target, provider) for entry in entries}
    rows = [static_row(entry, image, batch, threads) for entry in entries]
    runners: dict[str, Runner] = {}
    try:
        for entry in entries:
            runners[entry.name] = openers[entry.name](entry.model, threads=threads)
        if entries[0].name == _FLOAT:
            half = _open_half(entries[0], threads)
            if half is not None:
                entry = dataclasses.replace(entries[0], name=f"{_FLOAT} {half[0]}", half=True)
                runners[entry.name] = half[1]
                rows.insert(1, static_row(entry, image, batch, threads))
        images = random_images(image, batch)
        samples = sample(runners, images, runs=runs, seconds=seconds * len(runners))
        top1 = _accuracies(runners, data, image, progress)
        meter, energy = find_meter()
        joules = _energies(meter, runners, images)
    finally:
        for runner in runners.values():
            runner.close()
    reference = entries[0].name
    for row in rows:
        times = samples[row["name"]]
        row["latency_ms"] = _latency_row(times, batch, threads)
        row["images_per_second"] = 1000 * batch / row["latency_ms"]["median_ms"]
        row["speedup"] = speedup(samples[reference], times)
        row["top1"] = top1.get(row["name"])
        row["joules_per_image"] = joules.get(row["name"])
        row["provider"] = provider_of(runners[row["name"]])
    return {
        "batch": batch,
        "threads": threads,
        "input": list(image.size),
        "reference": reference,
        "cpu": machine.cpu_model(),
        "energy": energy,
        "engines": rows,
    }


def _open_half(entry: Entry, threads: int) -> tuple[str, Runner] | None:
    """Open the float model in half precision; what keeps it from running costs only its row."""
    backend = plugins.load("target", entry.target)
    try:
        found: tuple[str, Runner] | None = backend.open_half(entry.model, threads=threads)
    except DfqcError as error:
        log.warning("no row of the float model in half precision: %s", error)
        return None
    return found


def describe_bench(result: Mapping[str, Any]) -> list[str]:
    """Return the lines that `dfqc bench` shows for a result of `run_bench`."""
    width = max(6, *(len(row["name"]) for row in result["engines"]))
    columns = (
        "  median ms    p90 ms    p99 ms  images/s  ratio          load ms    memory      file"
    )
    ran = dict.fromkeys(row["provider"] for row in result["engines"] if row["provider"])
    lines = [
        f"batch {result['batch']}, {result['threads']} threads, {result['cpu']}"
        + "".join(f", ONNX Runtime on {name}" for name in ran),
        f"ratios to {result['reference']}: by medians (by best calls)",
        "engine".ljust(width) + columns,
    ]
    for row in result["engines"]:
        latency, ratio = row["latency_ms"], row["speedup"]
        accuracy = f"  top-1 {row['top1']['percent']:.2f} %" if row["top1"] else ""
        if row["joules_per_image"] is not None:
            accuracy += f"  {row['joules_per_image']:.4g} J/image"
        lines.append(
            f"{row['name']:<{width}} {latency['median_ms']:10.3f} {latency['p90_ms']:9.3f} "
            f"{latency['p99_ms']:9.3f} "
            f"{row['images_per_second']:9.1f}  {ratio['median']:.2f} ({ratio['best']:.2f}) "
            f"{row['load_ms']:12.1f} {format_size(row['engine_bytes']):>9} "
            f"{format_size(row['model_bytes']):>9}{accuracy}"
        )
    return lines


def _warm_up(runner: Model, images: np.ndarray, calls: int, clock: Callable[[], float]) -> float:
    """Return the seconds of the fastest of the warm-up calls."""
    return min(_timed(runner, images, clock) for _ in range(max(calls, 1)))


def _timed(runner: Model, images: np.ndarray, clock: Callable[[], float]) -> float:
    start = clock()
    runner.infer(images)
    return clock() - start


def _common_image(packages: Sequence[Package], normalized: bool) -> ImageSpec:
    if not packages:
        raise UsageError("dfqc bench: no packages given, expected one or more folders")
    first = packages[0]
    for other in packages[1:]:
        if other.image.size != first.image.size:
            raise UsageError(
                f"{other.folder}: takes images of {other.image.size}, {first.folder} of "
                f"{first.image.size}; only packages with one input size can be compared"
            )
        if normalized and _steps(other.image) != _steps(first.image):
            raise UsageError(
                f"{other.folder} and {first.folder} preprocess images in other ways, so that one "
                "set cannot be fed to both: evaluate them one by one with `dfqc eval`"
            )
    return first.image


def _steps(image: ImageSpec) -> tuple[object, ...]:
    return image.mean, image.std, image.resize


def _entries(packages: Sequence[Package], float_model: Path | None) -> list[Entry]:
    control = float_model or packages[0].float_model
    if control is not None and not control.is_file():
        raise LoadError(f"{control}: no such file; expected the float model as ONNX")
    # The float control runs on the runtime of the first package: one runtime, two models.
    entries = [Entry(_FLOAT, packages[0].target, control)] if control else []
    names = [package.name for package in packages]
    for package in packages:
        unique = names.count(package.name) == 1 and package.name != _FLOAT
        entries.append(
            Entry(package.name if unique else str(package.folder), package.target, package.engine)
        )
    return list({entry.name: entry for entry in entries}.values())


def _accuracies(
    runners: Mapping[str, Runner], data: Path | None, image: ImageSpec, progress: Progress
) -> dict[str, Any]:
    if data is None:
        return {}
    from dfqc.compiler.dataset import open_dataset

    scores = score(runners, open_dataset(data, image), progress=progress)
    return {name: dataclasses.asdict(scores.top1(name)) for name in runners}


def _energies(
    meter: Meter | None, runners: Mapping[str, Model], images: np.ndarray
) -> dict[str, float]:
    """Return the joules of one image by engine; empty where the machine tells none."""
    if meter is None:
        return {}
    return {
        name: joules_per_call(meter, functools.partial(runner.infer, images)) / len(images)
        for name, runner in runners.items()
    }


def _latency_row(samples: np.ndarray, batch: int, threads: int) -> dict[str, Any]:
    latency = summarize(samples, batch=batch, threads=threads, warmup=WARMUP)
    tail = {"p99_ms": float(np.quantile(samples, 0.99)), "best_ms": float(samples.min())}
    return dataclasses.asdict(latency) | tail
