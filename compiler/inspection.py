"""What is inside a package or a QDQ model: a path in, operators, grids and bytes out (no torch)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from dfqc.compiler.errors import LoadError
from dfqc.compiler.package import MODEL, open_package
from dfqc.compiler.pruning_report import summarize
from dfqc.compiler.units import format_size

_COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_STORED_BITS: dict[int, int] = {
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
}


def run_inspect(path: Path) -> dict[str, Any]:
    """Describe a package folder or an ONNX file: what `dfqc inspect` prints."""
    if path.is_file():
        return {"model": str(path)} | inspect_model(path)
    package = open_package(path)
    manifest = package.manifest
    summary = {"package": str(path)} | inspect_model(package.folder / MODEL)
    fields = ("bits", "target", "dfqc", "metrics", "parity", "size", "gates", "layers", "pruning")
    return summary | {name: manifest[name] for name in fields if name in manifest}


def inspect_model(path: Path) -> dict[str, Any]:
    """Return operators, quantized weights and tensors, bytes per type and metadata of a model."""
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's fault has no stable name
        raise LoadError(f"{path}: this is no ONNX model ({error}); expected model.onnx") from error
    graph = _Graph(model)
    stored = graph.bytes_by_type()
    file_bytes = path.stat().st_size
    return {
        "file_bytes": file_bytes,
        "bytes": {**stored, "graph": file_bytes - sum(stored.values())},
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "ir_version": model.ir_version,
        "operators": dict(Counter(node.op_type for node in model.graph.node).most_common()),
        "weights": graph.weights(),
        "activations": graph.activations(),
        "metadata": {p.key: p.value for p in model.metadata_props},
    }


def describe_inspect(result: Mapping[str, Any]) -> list[str]:
    """Return the lines that `dfqc inspect` shows for a result of `run_inspect`."""
    parts = ", ".join(f"{kind} {format_size(count)}" for kind, count in result["bytes"].items())
    opsets = ", ".join(f"{domain} {version}" for domain, version in result["opset"].items())
    lines = [
        f"{result.get('package') or result['model']}: {format_size(result['file_bytes'])}",
        f"bytes       {parts}",
        f"opset       {opsets}, IR {result['ir_version']}",
        "operators   " + ", ".join(f"{op} {n}" for op, n in result["operators"].items()),
        "weights     " + _tally(f"{row['bits']} bits" for row in result["weights"]),
        "activations " + _tally(f"{row['bits']} bits" for row in result["activations"]),
    ]
    if pruning := result.get("pruning"):
        lines.append(f"pruning     {summarize(pruning)}")
    lines += [f"metadata    {key} = {value}" for key, value in result["metadata"].items()]
    for row in result.get("layers", []):
        lines.append(
            f"layer       {row['name']}: asked {row.get('asked')}, exported {row.get('exported')}, "
            f"executed {row.get('executed')}"
        )
    for gate in result.get("gates", []):
        verdict = "passed" if gate["passed"] else "FAILED"
        lines.append(
            f"gate        {gate['name']} {gate['value']} (limit {gate['limit']}) {verdict}"
        )
    return lines


def output_step(model: onnx.ModelProto) -> float:
    """Return by how much an output changes when the last codes in front of it move by one.

    Behind a quantizer that is its scale; behind a layer that reads codes, its input scale times
    its largest weight. 0 where the output comes from a float layer.
    """
    return _Graph(model).output_step()


class _Graph:
    """Look-ups by value name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.tensors = {t.name: t for t in model.graph.initializer}
        self.producer: dict[str, NodeProto] = {
            name: node for node in model.graph.node for name in node.output
        }

    def bytes_by_type(self) -> dict[str, int]:
        """Return the bytes of all constants by type, largest first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[TensorProto.DataType.Name(tensor.data_type).lower()] += _stored_bytes(tensor)
        return dict(counts.most_common())

    def weights(self) -> list[dict[str, Any]]:
        """Return one row per layer with weights: name, shape, and the type they are stored in."""
        rows = []
        for node in self.model.graph.node:
            tensor = self._weight(node)
            if tensor is None:
                continue
            kind = TensorProto.DataType.Name(tensor.data_type).lower()
            bits = _STORED_BITS.get(tensor.data_type, 8 * _item_bytes(tensor))
            rows.append(
                {
                    "name": tensor.name,
                    "op": node.op_type,
                    "shape": list(tensor.dims),
                    "stored": kind,
                    "bits": bits,
                    "bytes": _stored_bytes(tensor),
                }
            )
        return rows

    def activations(self) -> list[dict[str, Any]]:
        """Return one row per quantized tensor: its grid, a clip behind it included."""
        readers: dict[str, list[NodeProto]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        return [
            self._grid(node, readers)
            for node in self.model.graph.node
            if node.op_type == "QuantizeLinear"
        ]

    def output_step(self) -> float:
        """Return what the function of this name promises."""
        node = self._last_codes_or_layer()
        if node is None:
            return 0.0
        if _is_dequantize(node):
            return float(self._array(node.input[1]).max())
        tensor = self._weight(node)
        data = self.producer.get(node.input[0])
        dequantize = self.producer.get(node.input[1])
        if tensor is None or not _is_dequantize(data) or not _is_dequantize(dequantize):
            return 0.0
        assert data is not None
        assert dequantize is not None
        codes = np.abs(numpy_helper.to_array(tensor).astype(np.float64))
        axis = next((a.i for a in dequantize.attribute if a.name == "axis"), 1)
        others = tuple(d for d in range(codes.ndim) if d != axis % codes.ndim)
        largest = codes.max(axis=others) * self._array(dequantize.input[1])
        return float(self._array(data.input[1]).max() * largest.max())

    def _grid(self, node: NodeProto, readers: Mapping[str, list[NodeProto]]) -> dict[str, Any]:
        # ONNX: without a zero point the codes are uint8.
        zero = self._array(node.input[2]) if len(node.input) > 2 else np.uint8(0)
        limits = np.iinfo(zero.dtype) if zero.dtype.kind in "iu" else None
        low, high = (int(limits.min), int(limits.max)) if limits else (0, 0)
        codes = node.output[0]
        clips = [n for n in readers.get(codes, ()) if n.op_type == "Clip"]
        if len(clips) == 1:
            low, high = (int(self._array(name)) for name in clips[0].input[1:3])
            codes = clips[0].output[0]
        return {
            "name": codes,
            "scale": float(self._array(node.input[1]).max()),
            "zero_point": int(zero.max()),
            "quant_min": low,
            "quant_max": high,
            "bits": int(high - low).bit_length(),
        }

    def _last_codes_or_layer(self) -> NodeProto | None:
        """Walk up from the output to the nearest DequantizeLinear or layer."""
        queue: list[str] = [self.model.graph.output[0].name]
        for name in queue:
            node = self.producer.get(name)
            if node is None:
                continue
            if node.op_type in _COMPUTE or _is_dequantize(node):
                return node
            queue += [n for n in node.input if n not in queue]
        return None

    def _weight(self, node: NodeProto) -> TensorProto | None:
        """Return the constant behind a layer's second input."""
        if node.op_type not in _COMPUTE:
            return None
        name = node.input[1]
        while name in self.producer:
            name = self.producer[name].input[0]
        return self.tensors.get(name)

    def _array(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise LoadError(f"{name}: expected a constant scale, zero point or limit")
        array: np.ndarray = numpy_helper.to_array(self.tensors[name])
        return array


def _is_dequantize(node: NodeProto | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def _item_bytes(tensor: TensorProto) -> int:
    return int(numpy_helper.to_array(tensor).dtype.itemsize)


def _stored_bytes(tensor: TensorProto) -> int:
    if tensor.raw_data:
        return len(tensor.raw_data)
    count = int(np.prod(tensor.dims, dtype=np.int64))
    bits = _STORED_BITS.get(tensor.data_type)
    return count * _item_bytes(tensor) if bits is None else (count * bits + 7) // 8


def _tally(kinds: Iterable[str]) -> str:
    counts = Counter(kinds)
    return ", ".join(f"{count} × {kind}" for kind, count in sorted(counts.items())) or "none"
