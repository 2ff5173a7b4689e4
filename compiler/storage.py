"""Values of stages on disk: a value in, files out, and back; equal values give equal bytes.

Tensors are kept as safetensors, everything else as JSON: nothing that is read can run code.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler.contracts import CalibSet, Lowered, QParams, QTensor, QuantState
from dfqc.compiler.spec import Plan, plan_from_json

if TYPE_CHECKING:
    from torch import Tensor

PLAN, CALIB, STATE = "plan.json", "calib.safetensors", "state.safetensors"
MODEL, FLOAT_MODEL = "model.onnx", "float.onnx"
INFO, NAMES = "info.json", "names.json"


def save_json(value: object, path: Path) -> None:
    """Write JSON, one key a line, keys in the order given."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def save_plan(plan: Plan, folder: Path) -> None:
    """Write a plan."""
    save_json(plan.to_json(), folder / PLAN)


def load_plan(folder: Path) -> Plan:
    """Read what `save_plan` wrote."""
    return plan_from_json(load_json(folder / PLAN))


def save_calib(calib: CalibSet, folder: Path) -> None:
    """Write a calibration set."""
    from safetensors.torch import save_file

    tensors = {"images": calib.images.detach().cpu().contiguous()}
    if calib.labels is not None:
        tensors["labels"] = calib.labels.detach().cpu().contiguous()
    tensors |= {f"carry/{k}": v.detach().cpu().contiguous() for k, v in calib.carry.items()}
    save_file(tensors, folder / CALIB)
    about = {"source": calib.source, "images": len(calib.images), "info": dict(calib.info)}
    save_json(about, folder / INFO)


def load_calib(folder: Path) -> CalibSet:
    """Read what `save_calib` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(folder / CALIB)
    about = load_json(folder / INFO)
    carry = {k.removeprefix("carry/"): v for k, v in tensors.items() if k.startswith("carry/")}
    images, labels = tensors["images"], tensors.get("labels")
    return CalibSet(images, labels, about["source"], about["info"], carry)


def save_state(state: QuantState, folder: Path) -> None:
    """Write a quantizer's decisions with their plan."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, weight in state.weights.items():
        tensors[f"codes/{name}"] = weight.codes.cpu().contiguous()
        tensors[f"scale/{name}"] = weight.scale.cpu().contiguous()
    tensors |= {f"bias/{name}": b.detach().cpu().contiguous() for name, b in state.biases.items()}
    save_file(tensors, folder / STATE)
    save_plan(state.plan, folder)
    acts = {name: dataclasses.asdict(grid) for name, grid in state.acts.items()}
    save_json({"acts": acts, "info": dict(state.info)}, folder / INFO)


def load_state(folder: Path) -> QuantState:
    """Read what `save_state` wrote."""
    from safetensors.torch import load_file

    plan, about, tensors = load_plan(folder), load_json(folder / INFO), load_file(folder / STATE)
    # In the order of the plan, as the quantizer made them.
    weights = {
        name: QTensor(tensors[f"codes/{name}"], tensors[f"scale/{name}"])
        for name in plan.layers
        if f"codes/{name}" in tensors
    }
    biases = {name: tensors[f"bias/{name}"] for name in plan.layers if f"bias/{name}" in tensors}
    acts = {name: QParams(**grid) for name, grid in about["acts"].items()}
    return QuantState(plan, weights, biases, acts, about["info"])


def save_lowered(value: tuple[Lowered, Mapping[str, int]], folder: Path) -> None:
    """Write a lowered model with its name map, and the sizes of the models in bytes."""
    lowered, sizes = value
    (folder / MODEL).write_bytes(lowered.model)
    names = {"taps": dict(lowered.taps), "layers": dict(lowered.layers)}
    save_json(names | {"sizes": dict(sizes)}, folder / NAMES)


def load_lowered(folder: Path) -> Lowered:
    """Read the lowered model."""
    names = load_json(folder / NAMES)
    return Lowered((folder / MODEL).read_bytes(), names["taps"], names["layers"])


def save_float(model: bytes, folder: Path) -> None:
    """Write the float model."""
    (folder / FLOAT_MODEL).write_bytes(model)


def load_float(folder: Path) -> bytes:
    """Read the float model."""
    return (folder / FLOAT_MODEL).read_bytes()
