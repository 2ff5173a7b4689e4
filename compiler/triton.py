"""A Triton model repository for one package: an ONNX model in, `config.pbtxt` and its files out."""

from __future__ import annotations

import re

from onnx import ModelProto, TensorProto, ValueInfoProto, load_from_string

MAX_BATCH = 64

# Triton's own names for what a package can hold.
_PLATFORMS = {".onnx": "onnxruntime_onnx", ".plan": "tensorrt_plan"}
_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.UINT8: "TYPE_UINT8",
}


def triton_repository(
    name: str, model: bytes, *, cpu: bool, engine: bytes | None = None
) -> dict[str, bytes]:
    """Return the files of `triton/<name>/`, by their path in the package.

    Args:
        name: wanted name; characters that Triton or a file system refuses become `_`.
        model: the ONNX model; its inputs and outputs are those of the engine too.
        cpu: whether Triton shall run it on CPU.
        engine: a TensorRT plan to serve instead of the ONNX model.
    """
    name = repository_name(name)
    suffix, served = (".onnx", model) if engine is None else (".plan", engine)
    config = _config(name, load_from_string(model), _PLATFORMS[suffix], cpu)
    root = f"triton/{name}"
    return {f"{root}/config.pbtxt": config.encode(), f"{root}/1/model{suffix}": served}


def repository_name(name: str) -> str:
    """Return `name` as the name of a Triton model, which is also a folder and part of a URL."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._-") or "model"


def _config(name: str, model: ModelProto, platform: str, cpu: bool) -> str:
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    outputs = list(model.graph.output)
    # Triton adds the batch dimension itself, and only to models that leave it open everywhere.
    batched = all(not _dims(value)[0] > 0 for value in (*inputs, *outputs))
    lines = [
        f'name: "{name}"',
        f'platform: "{platform}"',
        f"max_batch_size: {MAX_BATCH if batched else 0}",
        *_tensors("input", inputs, batched),
        *_tensors("output", outputs, batched),
        f"instance_group [ {{ count: 1 kind: {'KIND_CPU' if cpu else 'KIND_GPU'} }} ]",
    ]
    if batched:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def _tensors(kind: str, values: list[ValueInfoProto], batched: bool) -> list[str]:
    entries = []
    for value in values:
        dims = ", ".join(map(str, _dims(value)[1 if batched else 0 :]))
        data_type = _TYPES[value.type.tensor_type.elem_type]
        entries.append(f'  {{ name: "{value.name}" data_type: {data_type} dims: [ {dims} ] }}')
    return [f"{kind} [", ",\n".join(entries), "]"]


def _dims(value: ValueInfoProto) -> list[int]:
    """Return the dimensions of a tensor, -1 where they are open."""
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else -1 for d in dims]
