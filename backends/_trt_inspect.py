"""What an engine's inspector says: its JSON in, one record per executed layer out.

TensorRT 10 and 11 write it differently: format and type of a tensor are one field in the one
(`Format/Datatype`) and two in the other (`Format`, `DataType`), and the ends of the engine are
called `Bindings` in the one and `I/O Tensors` in the other. Both are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfqc.compiler.errors import LoadError

ABSENT = "not found in the engine"
# They move or hold data for a layer and bear its name.
_MOVERS = ("reformat", "noop", "constant")
_METADATA = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PROFILE = re.compile(r"\s*\[profile \d+\]$")
_TYPES = (
    ("int8", "int8"),
    ("int4", "int4"),
    ("fp8", "fp8"),
    ("fp4", "fp4"),
    ("bf16", "bf16"),
    ("bfloat16", "bf16"),
    ("fp16", "fp16"),
    ("half", "fp16"),
    ("float16", "fp16"),
    ("fp32", "fp32"),
    ("float", "fp32"),
    ("int32", "int32"),
    ("int64", "int64"),
    ("bool", "bool"),
)


@dataclass(frozen=True)
class EngineLayer:
    """One executed layer: types of what it reads and writes, its kernel, the ONNX nodes in it."""

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    tactic: str
    nodes: tuple[str, ...]


def parse(text: str) -> list[EngineLayer]:
    """Read the inspector's JSON of a whole engine; `LoadError` if it is none."""
    try:
        data = json.loads(text)
        rows = data["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"the engine's layer information cannot be read ({error}); expected JSON with `Layers`"
        ) from error
    return [_read_layer(row) for row in rows]


def tensor_names(text: str) -> list[str]:
    """Return the names at the ends of the engine."""
    data = json.loads(text)
    entries = data.get("I/O Tensors", data.get("Bindings", []))
    return [str(entry["Name"] if isinstance(entry, Mapping) else entry) for entry in entries]


def kernels(found: Sequence[EngineLayer], layers: Mapping[str, str]) -> dict[str, str]:
    """Return, per module path, what executes it: kind, types and kernel."""
    return {path: _describe(layer_of(found, path)) for path in layers}


def layer_of(found: Sequence[EngineLayer], path: str) -> EngineLayer | None:
    """Return the engine layer that computes a module; nodes of the file bear its path."""
    for layer in found:
        if path in layer.nodes and not layer.kind.lower().startswith(_MOVERS):
            return layer
    return None


def times(
    found: Sequence[EngineLayer], layers: Mapping[str, str], profile: Mapping[str, float]
) -> dict[str, float]:
    """Return milliseconds per module path; modules that run in one layer share its time."""
    spent = {_PROFILE.sub("", name): ms for name, ms in profile.items()}
    rows = {path: layer_of(found, path) for path in layers}
    return {
        path: spent[layer.name]
        for path, layer in rows.items()
        if layer is not None and layer.name in spent
    }


def _read_layer(row: Any) -> EngineLayer:
    if isinstance(row, str):  # built without detailed verbosity: names are all there is
        name = _PROFILE.sub("", row)
        return EngineLayer(name, "", (), (), "", _split(name))
    name = _PROFILE.sub("", str(row.get("Name", "")))
    nodes = tuple(_METADATA.findall(str(row.get("Metadata", "")))) or _split(name)
    return EngineLayer(
        name,
        str(row.get("LayerType", "")),
        tuple(_type(tensor) for tensor in row.get("Inputs", ())),
        tuple(_type(tensor) for tensor in row.get("Outputs", ())),
        str(row.get("TacticName", "")),
        nodes,
    )


def _split(name: str) -> tuple[str, ...]:
    """Return the nodes in a fused layer's name."""
    return tuple(part.strip() for part in name.split(" + "))


def _type(tensor: Mapping[str, Any]) -> str:
    """Return the element type of a tensor, as short as people write it."""
    texts = (tensor.get(key) for key in ("DataType", "Datatype", "Format/Datatype", "Format"))
    for text in texts:
        low = str(text or "").lower()
        for word, name in _TYPES:
            if word in low:
                return name
    return "unknown"


def _describe(layer: EngineLayer | None) -> str:
    if layer is None:
        return ABSENT
    reads, writes = (" ".join(dict.fromkeys(t)) or "?" for t in (layer.reads[:1], layer.writes))
    kernel = f", {layer.tactic}" if layer.tactic else ""
    return f"{layer.kind or 'layer'} {reads} -> {writes}{kernel}"
