"""Finish a package on the device that will run it: a package in, the same with its engine out.

No torch: numpy and the target's runtime are all a device needs.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dfqc.compiler import plugins
from dfqc.compiler.artifact import default_root
from dfqc.compiler.errors import (
    EnvironmentFault,
    LoadError,
    ParityGateError,
    SpeedGateError,
    UsageError,
)
from dfqc.compiler.handover import hand_over
from dfqc.compiler.package import (
    GOLDEN,
    MODEL,
    Package,
    file_faults,
    open_package,
    to_json,
    write_package,
)
from dfqc.compiler.report import layers_csv, report_html
from dfqc.compiler.units import parse_size

if TYPE_CHECKING:
    import numpy as np

    from dfqc.compiler.contracts import Progress
    from dfqc.compiler.verify_package import Golden

Hardware = Literal["none", "ampere-plus", "same-compute"]
HARDWARE: tuple[Hardware, ...] = ("none", "ampere-plus", "same-compute")
_SPEED_GATE = "min_speedup"
# What only the float controls tell: figures of another run would not go with this engine's.
_CONTROL_FIELDS = (
    *("float", "float_p90", "speedup", "speedup_best", "half", "half_precision", "half_speedup"),
    "pruned",  # its speed-up over float stays: both were timed by the build
)
# Codes of a build that another run here may mend; a refused file or lost accuracy stays.
_MENDED_HERE = (0, ParityGateError.exit_code, SpeedGateError.exit_code, EnvironmentFault.exit_code)
INSPECTOR, SHEET = "engine.layers.json", "calib/contact_sheet.png"


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        batches: one optimization profile is tuned for each; up to the largest, all are taken.
        cache_dir: where measured kernels are kept, by GPU and version.
        workspace: bytes of device memory that kernels may use beside tensors; None: all.
        level: how long the builder searches, 0..5; None: its default.
        version_compatible: the plan runs on later versions too, slower.
        hardware: on which other GPUs it runs.
        controls: the float model, in float32 and float16, is timed beside it.
    """

    batches: tuple[int, ...] = (1,)
    cache_dir: Path = field(default_factory=default_root)
    workspace: int | None = None
    level: int | None = None
    version_compatible: bool = False
    hardware: Hardware = "none"
    controls: bool = True


def parse_batches(text: str) -> tuple[int, ...]:
    """Read `1,8,32`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch: got {text!r}, expected positive numbers, for example 1,8,32")
    return tuple(sorted({int(part) for part in parts}))


def read_options(
    batches: str,
    *,
    hardware: str,
    version_compatible: bool = False,
    level: int | None = None,
    workspace: str | None = None,
    cache_dir: Path | None = None,
    controls: bool = True,
) -> EngineOptions:
    """Read what a command line gives."""
    known = [name for name in HARDWARE if name == hardware]
    if not known:
        raise UsageError(f"--hardware: got {hardware!r}, expected one of {', '.join(HARDWARE)}")
    return EngineOptions(
        parse_batches(batches),
        cache_dir or default_root(),
        parse_size(workspace, where="--workspace") if workspace else None,
        level,
        version_compatible,
        known[0],
        controls,
    )


def run_engine(
    folder: Path, options: EngineOptions, progress: Progress | None = None
) -> dict[str, Any]:
    """Build the engine of a package into it, compare it with the simulation, time it.

    Returns the new manifest; where the engine computes something else, its gate `parity` has
    failed. A package whose target runs the model itself is left as it is.

    Raises:
        LoadError: not a package, or changed since it was written.
        EnvironmentFault: the target's runtime is missing here.
        UnsupportedError: the runtime refuses the model.
    """
    package = open_package(folder)
    backend = plugins.load("target", package.target)
    name = backend.TARGET.engine_file
    if not name:
        return dict(package.manifest)
    usable, reason = backend.available()
    if not usable:
        raise EnvironmentFault(
            f"{folder}: the engine of target '{package.target}' cannot be built here: {reason}; "
            "run the same command on the machine that will run it"
        )
    faults = file_faults(package)
    if faults:
        raise LoadError(f"{folder}: not as it was written: {'; '.join(faults[:5])}; copy it again")
    with tempfile.TemporaryDirectory(prefix="dfqc-") as scratch:
        plan = Path(scratch) / name
        golden = _read_golden(package)
        images = None if golden is None else golden.inputs
        control = package.float_model if options.controls else None
        model = package.folder / MODEL
        built, outputs = backend.build_engine(model, plan, options, images, control, progress)
        parity = None if golden is None else _check(package, golden, outputs)
        return write_finished(package, plan, built, parity, options.batches)


def write_finished(
    package: Package,
    plan: Path,
    built: Mapping[str, Any],
    parity: Mapping[str, Any] | None,
    batches: Sequence[int],
) -> dict[str, Any]:
    """Write the package again with its engine: manifest, report, checksums, Triton repository."""
    manifest = _finished_manifest(package, plan.name, built, parity)
    contents: dict[str, Path | bytes] = {
        name: package.folder / name for name in package.manifest["files"]
    }
    sheet = package.folder / SHEET
    picture = sheet.read_bytes() if sheet.is_file() else None
    contents |= {
        plan.name: plan,
        INSPECTOR: (to_json(json.loads(built["inspector"])) + "\n").encode(),
        "layers.csv": layers_csv(manifest).encode(),
        "report.html": report_html(manifest, picture).encode(),
    }
    files = hand_over(
        *(manifest, contents),
        name=_served_name(package),
        cpu=False,
        engine=plan.read_bytes(),
        batches=batches,
    )
    return write_package(package.folder, manifest, files)


def describe_engine(manifest: Mapping[str, Any]) -> list[str]:
    """Return the lines that `dfqc engine` shows."""
    built = manifest.get("build")
    if not built:
        return [f"target '{manifest['target']}' runs {MODEL} itself: there is no engine to build"]
    device = built["device"]
    lines = [f"engine     {manifest['engine']}, {built['runtime']}, {device['gpu']}"]
    for batch, row in built["latency_ms"].items():
        lines.append(f"latency    batch {batch}: {row['median_ms']:.3f} ms, without copies")
        lines += _control_lines(built.get("controls") or {}, batch)
    int8 = sum("int8" in str(kernel) for kernel in built["executed"].values())
    lines.append(f"kernels    {int8} of {len(built['executed'])} layers read or write int8")
    return lines


def _control_lines(controls: Mapping[str, Any], batch: str) -> list[str]:
    """Return how the engine compares with the float model at one batch size."""
    lines = []
    for name, rows in controls.items():
        row, ratio = rows[batch], rows[batch]["engine_speedup"]["median"]
        slower = "" if ratio >= 1 else "; the compressed model is SLOWER"
        lines.append(f"           {name} {row['median_ms']:.3f} ms ({ratio:.2f} x{slower})")
    return lines


def _read_golden(package: Package) -> Golden | None:
    """Return golden inputs and outputs, without inner codes: those are no outputs of an engine."""
    from dfqc.compiler.verify_package import read_golden

    path = package.folder / GOLDEN
    return dataclasses.replace(read_golden(path), codes={}) if path.is_file() else None


def _check(package: Package, golden: Golden, outputs: np.ndarray) -> dict[str, Any]:
    """Compare what the engine computed with the simulation."""
    import onnx

    from dfqc.compiler.verify_package import check_golden

    model = onnx.load(package.folder / MODEL)
    return check_golden(golden, _Recorded(outputs), model, package.manifest)


class _Recorded:
    """Outputs that are there already, behind the interface of a runner."""

    def __init__(self, outputs: np.ndarray) -> None:
        self.outputs = outputs

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Return them."""
        return self.outputs[: len(images)]

    def codes(self, images: np.ndarray, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return nothing: no inner values are known."""
        return {}

    def close(self) -> None:
        """Nothing to free."""


def _finished_manifest(
    package: Package, engine: str, built: Mapping[str, Any], parity: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the manifest with what is known now; what was known before stays."""
    old = package.manifest
    passed = parity is None or not parity["failures"]
    layers = [
        {**row, "executed": built["executed"].get(row["name"], row.get("executed"))}
        for row in old.get("layers", ())
    ]
    kept = {name: value for name, value in old.items() if name != "files"}
    known = {name: value for name, value in built.items() if name not in ("inspector", "layers")}
    first = next(iter(built["latency_ms"].values()))
    batch = int(next(iter(built["latency_ms"])))
    metrics = dict(old.get("metrics", {}))
    before = metrics.get("latency_ms", {})
    metrics["latency_ms"] = {
        **{name: None if name in _CONTROL_FIELDS else value for name, value in before.items()},
        "engine": first["median_ms"],
        "engine_p90": first["p90_ms"],
        "batch": batch,
        "runs": first["runs"],
    }
    metrics["latency_ms"] |= _control_fields(built.get("controls") or {}, str(batch))
    speed = metrics["latency_ms"].get("speedup")
    gates = [
        _judge_speed(gate, speed) if gate["name"] == _SPEED_GATE else gate
        for gate in old.get("gates", ())
        if gate["name"] != "parity"
    ]
    if parity is not None:
        value = parity["untied_agreement"]
        gates.append({"name": "parity", "value": value, "limit": 99.0, "passed": passed})
    failed = [gate for gate in gates if not gate["passed"]]
    runtime = f"{built['runtime']}, {built['device']['gpu']}"
    return {
        **kept,
        "engine": engine,
        "status": "failed" if failed else "passed",
        "exit_code": _exit_code(old, passed, failed),
        "metrics": metrics,
        "parity": {**old.get("parity", {}), **_parity_fields(parity)},
        "gates": gates,
        "layers": layers,
        "notes": [note for note in old.get("notes", ()) if not note.startswith("Not verified")],
        "build": known,
        "environment": {**old.get("environment", {}), "runtime": runtime},
    }


def _control_fields(controls: Mapping[str, Any], batch: str) -> dict[str, Any]:
    """Return the manifest's latencies of the float model, under the names that a build gives."""
    found: dict[str, Any] = {}
    for name, rows in controls.items():
        row, ratio = rows[batch], rows[batch]["engine_speedup"]
        if name == "float":
            found |= {"float": row["median_ms"], "float_p90": row["p90_ms"]}
            found |= {"speedup": ratio["median"], "speedup_best": ratio["best"]}
        else:
            found |= {"half": row["median_ms"], "half_precision": name}
            found |= {"half_speedup": ratio["median"]}
    return found


def _judge_speed(gate: Mapping[str, Any], speed: float | None) -> dict[str, Any]:
    """Return the speed gate with what was measured here."""
    return {**gate, "value": speed, "passed": speed is not None and speed >= gate["limit"]}


def is_too_slow(gates: Sequence[Mapping[str, Any]]) -> bool:
    """Report whether the speed gate is among them, measured and failed."""
    return any(
        gate["name"] == _SPEED_GATE and gate["value"] is not None and not gate["passed"]
        for gate in gates
    )


def _exit_code(old: Mapping[str, Any], passed: bool, failed: Sequence[Mapping[str, Any]]) -> int:
    """Return the build's code; 8, an engine that was missing, is mended unless a gate stays open.

    Without a float control (`--no-controls`) a speed gate that was open stays open.
    """
    if not passed:
        return ParityGateError.exit_code
    code = int(old.get("exit_code") or 0)
    if code not in _MENDED_HERE:
        return code
    if any(gate["name"].startswith("parity") for gate in failed):  # that of the build's images
        return ParityGateError.exit_code
    if is_too_slow(failed):
        return SpeedGateError.exit_code
    return EnvironmentFault.exit_code if failed else 0


def _parity_fields(parity: Mapping[str, Any] | None) -> dict[str, Any]:
    if parity is None:
        return {}
    fields = ("max_abs", "argmax_agreement", "tolerance", "images")
    return {name: parity[name] for name in fields} | {"passed": not parity["failures"]}


def _served_name(package: Package) -> str:
    """Return the name that the package's Triton repository has already."""
    names: Sequence[str] = sorted(
        name.split("/")[1] for name in package.manifest["files"] if name.startswith("triton/")
    )
    return names[0] if names else package.name
