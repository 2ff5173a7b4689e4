"""TensorRT 10 and 11: a quantized graph in, its explicit-QDQ model, and on a GPU its engine, out.

The file is held against TensorRT's documented rules wherever it is written; engines are built,
profiled and run where TensorRT and a driver are. No machine of the project has had an NVIDIA
driver: nothing here has been executed by TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler.spec import TargetSpec

if TYPE_CHECKING:
    import numpy as np

    from dfqc.compiler.contracts import Lowered, Progress, QuantState, Runner
    from dfqc.compiler.finish import EngineOptions
    from dfqc.compiler.graph import Graph

TARGET = TargetSpec(
    name="trt",
    description="TensorRT 10/11: symmetric INT8 Q/DQ, float bias; the engine is built on the GPU",
    weight_bits=(2, 3, 4, 5, 6, 7, 8),
    act_bits=(2, 3, 4, 5, 6, 7, 8, 16, 32),
    integer_ops=("Conv2d", "Linear"),
    act_signed=True,
    act_symmetric=True,
    placement="inputs",
    clip="float",
    bias="float32",
    packed_int4=False,  # no TensorRT convolution takes INT4 weights
    kernel_note="TensorRT has no INT4 convolution: values on the narrow grid run on INT8 kernels",
    weight_only_ops=("Linear",),
    weight_only_note="weight-only: up to 4 bits as INT4 blocks where they fit, else INT8 codes; "
    "the product is computed in float",
    block_int4=True,
    bases=("fp32", "fp16"),
    engine_file="model.plan",
)

BASE_KEY = "dfqc.base"  # metadata of a model whose unquantized rest is not float32
STAND_IN = "ONNX Runtime on CPU, node by node"


def available() -> tuple[bool, str]:
    """Return (True, versions and GPU) where engines can be built and run, else (False, why)."""
    from dfqc.backends import _trt_api

    return _trt_api.available()


def lower(graph: Graph, state: QuantState, *, metadata: Mapping[str, str]) -> Lowered:
    """Return the QDQ model of a folded graph, written the way TensorRT fuses it.

    With `dfqc.base` = fp16 in the metadata, what is not quantized is float16, and so are scales.
    """
    from dfqc.backends import _qdq, _qdq_half

    if metadata.get(BASE_KEY) == "fp16":
        to_half = _qdq_half.to_half
        return _qdq.lower(graph, state, TARGET, metadata=metadata, finish=to_half)
    return _qdq.lower(graph, state, TARGET, metadata=metadata)


def lower_float(graph: Graph) -> bytes:
    """Return the unquantized model: the control that every benchmark runs beside."""
    from dfqc.backends import _qdq

    return _qdq.lower_float(graph, TARGET)


def check(model: Path) -> list[dict[str, str]]:
    """Return the places where a file breaks a documented rule of TensorRT; needs no TensorRT."""
    import dataclasses

    import onnx

    from dfqc.backends import _trt_rules

    return [dataclasses.asdict(finding) for finding in _trt_rules.check(onnx.load(model))]


def rehearse(model: Path, images: np.ndarray) -> np.ndarray | None:
    """Run the same file in ONNX Runtime and return its output; None where that is missing."""
    from dfqc.backends import ort

    if not ort.available()[0]:
        return None
    runner = ort.open_runner(model, threads=1, as_written=True)
    try:
        return runner.infer(images)
    finally:
        runner.close()


def open_runner(model: Path, *, threads: int | None = None) -> Runner:
    """Open an engine file, or build one in memory from a `model.onnx`, and run it on the GPU.

    `threads` means nothing there. `EnvironmentFault` where TensorRT or a driver is missing.
    """
    from dfqc.backends import _trt_run

    return _trt_run.open_runner(model)


def open_half(model: Path, *, threads: int | None = None) -> tuple[str, Runner]:
    """Open the float model in float16: the control of whoever would serve no integers.

    `threads` means nothing on a GPU. `EnvironmentFault` where TensorRT or a driver is missing.
    """
    from dfqc.backends import _trt_run

    return "fp16", _trt_run.open_half(model)


def executed(model: Path, layers: Mapping[str, str]) -> Mapping[str, str]:
    """Return, per module path, the kernel and precision that the engine's inspector names."""
    from dfqc.backends import _trt_inspect, _trt_run

    with _trt_run.opened(model) as runner:
        return _trt_inspect.kernels(_trt_inspect.parse(runner.inspect()), layers)


def build_engine(
    model: Path,
    plan: Path,
    options: EngineOptions,
    images: np.ndarray | None = None,
    float_model: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Build the engine of `model` into the file `plan`.

    Returns what is known of it, as plain data, and what it computes for `images`. Engines of
    `float_model` in float32 and float16 are built in memory and timed beside it. `progress` is
    called per engine that is built, and before they are timed.

    Raises:
        EnvironmentFault: TensorRT or a driver is missing here.
        UnsupportedError: TensorRT refuses the model.
    """
    from dfqc.backends import _trt_finish

    return _trt_finish.build_engine(model, plan, options, images, float_model, progress)
