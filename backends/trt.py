"""TensorRT 10 and 11: a quantized graph in, the explicit-QDQ model that its parser takes out.

This release writes the file and simulates it; it builds no engine. No machine of the project has
had an NVIDIA driver: nothing here has been executed by TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dfqc.compiler.errors import EnvironmentFault
from dfqc.compiler.spec import TargetSpec

if TYPE_CHECKING:
    from dfqc.compiler.contracts import Lowered, QuantState, Runner
    from dfqc.compiler.graph import Graph

TARGET = TargetSpec(
    name="trt",
    description="TensorRT 10/11: symmetric INT8 Q/DQ, float bias; the ONNX file, no engine yet",
    weight_bits=(2, 3, 4, 5, 6, 7, 8),
    act_bits=(2, 3, 4, 5, 6, 7, 8, 16, 32),
    integer_ops=("Conv2d", "Linear"),
    act_signed=True,
    act_symmetric=True,
    placement="inputs",
    clip="float",
    bias="float32",
    packed_int4=False,  # no TensorRT convolution takes INT4 weights
    weight_only_ops=("Linear",),
    weight_only_note="weight-only: up to 4 bits as INT4 blocks where they fit, else INT8 codes; "
    "the product is computed in float",
    block_int4=True,
    bases=("fp32", "fp16"),
    engine_file="model.plan",
    kernel_note="TensorRT has no INT4 convolution: values on the narrow grid run on INT8 kernels",
)

NO_ENGINE = (
    "dfqc does not build TensorRT engines yet: model.onnx in the package is the explicit-QDQ file "
    "for it; on the GPU machine run trtexec --onnx=model.onnx --stronglyTyped "
    "--saveEngine=model.plan (TensorRT 11: without --stronglyTyped)"
)


def available() -> tuple[bool, str]:
    """Return (False, the reason): engines are finished by the user on the GPU machine."""
    return False, "dfqc writes and simulates the file, trtexec builds the engine on the GPU machine"


def lower(graph: Graph, state: QuantState, *, metadata: Mapping[str, str]) -> Lowered:
    """Return the QDQ model of a folded graph, written the way TensorRT fuses it."""
    from dfqc.backends import _qdq

    return _qdq.lower(graph, state, TARGET, metadata=metadata)


def lower_float(graph: Graph) -> bytes:
    """Return the unquantized model: the control that every benchmark runs beside."""
    from dfqc.backends import _qdq

    return _qdq.lower_float(graph, TARGET)


def open_runner(model: Path, *, threads: int | None = None) -> Runner:
    """Raise `EnvironmentFault`: there is no engine to open."""
    raise EnvironmentFault(f"{model}: {NO_ENGINE}")


def executed(model: Path, layers: Mapping[str, str]) -> Mapping[str, str]:
    """Raise `EnvironmentFault`: nothing has been executed."""
    raise EnvironmentFault(f"{model}: {NO_ENGINE}")
