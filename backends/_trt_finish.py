"""Finish a model on its device: an ONNX file in, a plan file and all that is known of it out."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dfqc.backends import _trt_api, _trt_inspect
from dfqc.backends._trt_engine import build_plan, has_sparse_weights, ranges
from dfqc.backends._trt_run import Runner, half_model
from dfqc.compiler.bench import speedup
from dfqc.compiler.contracts import Progress, silent
from dfqc.compiler.errors import DfqcError
from dfqc.compiler.finish import EngineOptions

log = logging.getLogger("dfqc.trt")

FLOAT, HALF = "float", "fp16"  # the controls
_TURNS, _CALLS = 5, 20  # engines take turns: clocks and heat hit all of them alike
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def build_engine(
    model: Path,
    plan: Path,
    options: EngineOptions,
    images: np.ndarray | None = None,
    float_model: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Build, open, inspect and time an engine; return plain data, and what `images` give.

    With `float_model`, engines of it in float32 and in float16 are timed beside it.
    """
    trt, driver = _trt_api.tensorrt(), _trt_api.require_driver()
    report = progress or silent
    steps = 2 if float_model is None else 4
    report(0, steps, "engine")
    start = time.perf_counter()
    data = model.read_bytes()
    plan.write_bytes(build_plan(data, options))
    seconds = time.perf_counter() - start
    runner = Runner(plan.read_bytes(), plan, model, trusted=options.version_compatible)
    try:
        outputs = None if images is None else runner.infer(images)
        text = runner.inspect()
        found = _trt_inspect.parse(text)
        layers = {node.name: "" for node in _layer_nodes(onnx.load_from_string(data))}
        with _controls(float_model, options, report, steps) as (controls, refused):
            report(steps - 1, steps, "timing")
            samples = {b: _turns({"engine": runner, **controls}, b) for b in options.batches}
        # The profiler comes last: it makes calls slower.
        profile = runner.layer_times(options.batches[0])
        report(steps, steps, "timing")
    finally:
        runner.close()
    about = {
        "runtime": f"TensorRT {trt.__version__}",
        "device": dataclasses.asdict(driver),
        "profiles": [list(sizes) for sizes in ranges(options.batches)],
        "version_compatible": options.version_compatible,
        "hardware": options.hardware,
        "sparse_weights": has_sparse_weights(data),
        "build_seconds": seconds,
        "latency_ms": {str(b): _latency(found["engine"]) for b, found in samples.items()},
        "controls": {
            name: {
                str(b): _latency(found[name])
                | {"engine_speedup": speedup(found[name], found["engine"])}
                for b, found in samples.items()
            }
            for name in controls
        },
        "controls_refused": refused,
        "executed": _trt_inspect.kernels(found, layers),
        "layer_ms": _trt_inspect.times(found, layers, profile),
        "layers": [dataclasses.asdict(layer) for layer in found],
        "inspector": text,
    }
    return about, outputs


def _layer_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes that bear a module's path: helpers of ours have no names."""
    return [n for n in model.graph.node if n.op_type in _LAYERS and n.name]


@contextlib.contextmanager
def _controls(
    model: Path | None, options: EngineOptions, report: Progress, steps: int
) -> Iterator[tuple[Mapping[str, Runner], Mapping[str, str]]]:
    """Open the float model in float32 and float16; the second part says what TensorRT refuses."""
    opened: dict[str, Runner] = {}
    refused: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        kinds = ((FLOAT, Path.read_bytes), (HALF, half_model)) if model else ()
        for number, (name, read) in enumerate(kinds):
            assert model is not None
            report(1 + number, steps, f"{name} control")
            try:
                data = build_plan(read(model), options)
                runner = Runner(data, model, model, trusted=options.version_compatible)
            except DfqcError as error:  # the package's own engine is finished all the same
                log.warning("no %s control: %s", name, error)
                refused[name] = str(error)
                continue
            opened[name] = stack.enter_context(contextlib.closing(runner))
        yield opened, refused


def _turns(runners: Mapping[str, Runner], batch: int) -> dict[str, np.ndarray]:
    """Return the milliseconds of every engine's calls; each turn another one goes first."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in runners}
    order = list(runners)
    for _ in range(_TURNS):
        for name in order:
            found[name].append(runners[name].latencies(batch, runs=_CALLS))
        order = order[1:] + order[:1]
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _latency(samples: np.ndarray) -> dict[str, float]:
    return {
        "median_ms": float(np.median(samples)),
        "p90_ms": float(np.quantile(samples, 0.9)),
        "p99_ms": float(np.quantile(samples, 0.99)),
        "runs": len(samples),
    }
