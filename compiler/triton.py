"""A Triton model repository for one package: an ONNX model in, `config.pbtxt` and its files out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from onnx import ModelProto, TensorProto, ValueInfoProto, load_from_string

MAX_BATCH = 64
_WARM_BATCH = 8

# Triton's own names for what a package can hold.
_PLATFORMS = {".onnx": "onnxruntime_onnx", ".plan": "tensorrt_plan"}
# Its OpenVINO backend takes an ONNX file where it is told the name.
_OPENVINO = ('backend: "openvino"', 'default_model_filename: "model.onnx"')
_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.UINT8: "TYPE_UINT8",
}


def triton_repository(
    name: str,
    model: bytes,
    *,
    cpu: bool,
    target: str = "ort",
    engine: bytes | None = None,
    batches: Sequence[int] = (),
) -> dict[str, bytes]:
    """Return the files of `triton/<name>/`, by their path in the package.

    Args:
        name: wanted name; characters that Triton or a file system refuses become `_`.
        model: the ONNX model; its inputs and outputs are those of the engine too.
        cpu: whether Triton shall run it on CPU.
        target: what the model was built for: `openvino` is run by OpenVINO, others by ONNX Runtime.
        engine: a TensorRT plan to serve instead of the ONNX model.
        batches: batch sizes that the engine was optimized for; the largest is its limit. Empty:
            all sizes are alike.
    """
    name = repository_name(name)
    suffix, served = (".onnx", model) if engine is None else (".plan", engine)
    runtime: tuple[str, ...] = (f'platform: "{_PLATFORMS[suffix]}"',)
    if target == "openvino" and engine is None:
        runtime = _OPENVINO
    config = _config(name, load_from_string(model), runtime, cpu, sorted(batches))
    root = f"triton/{name}"
    return {f"{root}/config.pbtxt": config.encode(), f"{root}/1/model{suffix}": served}


def repository_name(name: str) -> str:
    """Return `name` as the name of a Triton model, which is also a folder and part of a URL."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._-") or "model"


def _config(
    name: str, model: ModelProto, runtime: Sequence[str], cpu: bool, batches: list[int]
) -> str:
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    outputs = list(model.graph.output)
    # Triton adds the batch dimension itself, and only to models that leave it open everywhere.
    batched = all(not _dims(value)[0] > 0 for value in (*inputs, *outputs))
    limit = (batches or [MAX_BATCH])[-1] if batched else 0
    lines = [
        f'name: "{name}"',
        *runtime,
        f"max_batch_size: {limit}",
        *_tensors("input", inputs, batched),
        *_tensors("output", outputs, batched),
        f"instance_group [ {{ count: 1 kind: {'KIND_CPU' if cpu else 'KIND_GPU'} }} ]",
    ]
    if batched:
        # Requests that wait are put together; none is made to wait (no queue delay).
        preferred = f"preferred_batch_size: [ {', '.join(map(str, batches))} ] " if batches else ""
        lines.append(f"dynamic_batching {{ {preferred}}}")
    sizes = (batches or sorted({1, min(_WARM_BATCH, limit)})) if batched else [1]
    lines += _warm_up(inputs, sizes, batched)
    return "\n".join(lines) + "\n"


def _tensors(kind: str, values: list[ValueInfoProto], batched: bool) -> list[str]:
    entries = [f'  {{ name: "{value.name}" {_tensor(value, batched)} }}' for value in values]
    return [f"{kind} [", ",\n".join(entries), "]"]


def _tensor(value: ValueInfoProto, batched: bool) -> str:
    dims = ", ".join(map(str, _dims(value)[1 if batched else 0 :]))
    return f"data_type: {_TYPES[value.type.tensor_type.elem_type]} dims: [ {dims} ]"


def _warm_up(inputs: list[ValueInfoProto], sizes: list[int], batched: bool) -> list[str]:
    """Let the server run zeros before it says that it is ready: the first call is the slowest."""
    if any(dim < 0 for value in inputs for dim in _dims(value)[1 if batched else 0 :]):
        return []  # zeros of what size?
    requests = []
    for size in sizes:
        zeros = {value.name: f"{_tensor(value, batched)} zero_data: true" for value in inputs}
        fed = " ".join(f'inputs {{ key: "{n}" value {{ {z} }} }}' for n, z in zeros.items())
        requests.append(f'  {{ name: "batch_{size}" batch_size: {size} {fed} }}')
    return ["model_warmup [", ",\n".join(requests), "]"]


def _dims(value: ValueInfoProto) -> list[int]:
    """Return the dimensions of a tensor, -1 where they are open."""
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else -1 for d in dims]
