"""Finish a model on its device: an ONNX file in, a plan file and all that is known of it out."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dfqc.backends import _trt_api, _trt_inspect
from dfqc.backends._trt_engine import build_plan, has_sparse_weights, ranges
from dfqc.backends._trt_run import Runner
from dfqc.compiler.finish import EngineOptions

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def build_engine(
    model: Path, plan: Path, options: EngineOptions, images: np.ndarray | None = None
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Build, open, inspect and time an engine; return plain data, and what `images` give."""
    trt, driver = _trt_api.tensorrt(), _trt_api.require_driver()
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
        # The profiler comes last: it makes calls slower.
        latency = {str(b): _latency(runner.latencies(b)) for b in options.batches}
        profile = runner.layer_times(options.batches[0])
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
        "latency_ms": latency,
        "executed": _trt_inspect.kernels(found, layers),
        "layer_ms": _trt_inspect.times(found, layers, profile),
        "layers": [dataclasses.asdict(layer) for layer in found],
        "inspector": text,
    }
    return about, outputs


def _layer_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes that bear a module's path: helpers of ours have no names."""
    return [n for n in model.graph.node if n.op_type in _LAYERS and n.name]


def _latency(samples: np.ndarray) -> dict[str, float]:
    return {
        "median_ms": float(np.median(samples)),
        "p90_ms": float(np.quantile(samples, 0.9)),
        "p99_ms": float(np.quantile(samples, 0.99)),
        "runs": len(samples),
    }
