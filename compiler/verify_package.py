"""Check a package where it is: the folder in, what agrees with its build and what does not out.

Four questions, without torch: are the files the ones that were written, is the model valid ONNX,
does it bear the manifest's metadata, and does the engine compute on this machine what the
simulation computed when the package was built.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import onnx

from dfqc.compiler import plugins
from dfqc.compiler.baking import BAKED, compare_baked
from dfqc.compiler.contracts import Runner
from dfqc.compiler.errors import EnvironmentFault, LoadError
from dfqc.compiler.inspection import output_step
from dfqc.compiler.package import GOLDEN, MODEL, Package, file_faults, open_package
from dfqc.compiler.providers import CPU, Opener, opener, provider_of

CODE_IMAGES = 2
# Where the inputs of a layer are equal, its own codes differ only by rounding on a boundary.
MAX_STEPS = 1
MAX_SHARE = 0.02
# Codes in front of the last layer that may each be off by one, on their largest weight.
OUTPUT_STEPS = 4
FLOAT_TOLERANCE = 1e-4  # of the largest output: float32 sums in another order
MIN_AGREEMENT = 99.0  # percent of the images that are not tied within the tolerance

# Model metadata and the field of the manifest that says the same.
_METADATA = {
    "dfqc.version": ("dfqc",),
    "dfqc.target": ("target",),
    "dfqc.bits": ("bits",),
    "dfqc.source_sha256": ("model", "sha256"),
    "dfqc.seed": ("seed",),
    "dfqc.recipe_sha256": ("recipe_sha256",),
}


@dataclass(frozen=True)
class Golden:
    """What the simulation computed at build time.

    `inputs` (n, c, h, w) and `outputs` (n, classes) are float32; `codes` are the quantizers' codes
    for the first images, in graph order; `taps` and `layers` map them to values of the model.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    codes: Mapping[str, np.ndarray]
    taps: Mapping[str, str]
    layers: Mapping[str, str]


@dataclass(frozen=True)
class CodeDifference:
    """How the codes of one quantizer differ; `share` is the part of them that does."""

    quantizer: str
    max_steps: int
    share: float

    @property
    def is_rounding(self) -> bool:
        """Report whether the difference can be rounding of equal numbers."""
        return self.max_steps <= MAX_STEPS and self.share <= MAX_SHARE


def write_golden(path: Path, golden: Golden) -> None:
    """Write `golden.npz`; equal contents give equal bytes."""
    arrays = {f"codes/{name}": codes for name, codes in golden.codes.items()}
    maps = json.dumps({"taps": dict(golden.taps), "layers": dict(golden.layers)})
    np.savez_compressed(
        path,
        allow_pickle=False,
        inputs=golden.inputs.astype(np.float32),
        outputs=golden.outputs.astype(np.float32),
        maps=np.array(maps),
        **arrays,
    )


def read_golden(path: Path) -> Golden:
    """Read what `write_golden` wrote."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            maps = json.loads(str(file["maps"]))
            codes = {
                n.removeprefix("codes/"): file[n] for n in file.files if n.startswith("codes/")
            }
            inputs, outputs = file["inputs"], file["outputs"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise LoadError(f"{path}: cannot be read ({error}); build the package again") from error
    return Golden(inputs, outputs, codes, maps["taps"], maps["layers"])


def run_verify(
    folder: Path, *, threads: int | None = None, provider: str | None = None
) -> dict[str, Any]:
    """Check a package: what `dfqc verify PACKAGE` prints. `failures` is empty if it is sound.

    `provider` is where ONNX Runtime computes (`dfqc.backends.ort.PROVIDERS`), None the CPU. On
    others than the CPU, `kernels` is empty: they are not known.

    Raises:
        UsageError: `provider` for a target that has none.
        LoadError: not a package, or changed since it was written, or not valid ONNX.
        EnvironmentFault: all that is well, but the target's engine cannot be opened here.
    """
    package = open_package(folder)
    open_runner = opener(package.target, provider)
    faults = file_faults(package)
    if faults:
        raise LoadError(
            f"{folder}: not as it was written ({len(faults)} faults): {'; '.join(faults[:5])}; "
            "expected the package as built: copy it again"
        )
    model = _check_model(package.folder / MODEL)
    faults = metadata_faults(model, package.manifest)
    if faults:
        raise LoadError(f"{folder}: model and manifest do not belong together: {'; '.join(faults)}")
    if not (package.folder / GOLDEN).is_file():
        raise LoadError(
            f"{folder}: has no {GOLDEN}, so there is nothing to compare the engine with; "
            "build it again"
        )
    golden = read_golden(package.folder / GOLDEN)
    backend = plugins.load("target", package.target)
    try:
        runner = open_runner(package.engine, threads=threads)
    except EnvironmentFault as error:
        raise EnvironmentFault(
            f"{folder}: files as written, model valid, metadata as in the manifest, but no engine "
            f"can be compared with the simulation: {error}"
        ) from error
    try:
        parity = check_golden(golden, runner, model, package.manifest)
    finally:
        runner.close()
    baked = _check_baked(package, golden, open_runner)
    failures = [*parity["failures"], *(baked or {}).get("failures", [])]
    ran = provider_of(runner)
    kernels = dict(backend.executed(package.engine, golden.layers)) if ran in (None, CPU) else {}
    return {
        "package": str(folder),
        "runtime": backend.available()[1],
        "provider": ran,
        "files": len(package.manifest["files"]) + 1,
        "gates": list(package.manifest.get("gates", [])),
        "parity": parity,
        "kernels": kernels,
        "other_kernels": _other_kernels(package, kernels),
        "baked": baked,
        "failures": failures,
    }


def describe_verify(result: Mapping[str, Any]) -> list[str]:
    """Return the lines that `dfqc verify` shows for a result of `run_verify`."""
    parity = result["parity"]
    lines = [
        f"files    {result['files']} as written, model valid, metadata as in the manifest",
        f"outputs  largest difference {parity['max_abs']:.3g}, tolerance {parity['tolerance']:.3g}",
        f"arg-max  equal on {parity['argmax_agreement']:.2f} % of {parity['images']} images",
        "codes    " + _describe_codes(parity["first_divergence"], len(parity["layers"])),
    ]
    if result["provider"]:
        unknown = "" if result["kernels"] else ", kernels not known"
        lines.append(f"provider {result['provider']}{unknown}")
    if baked := result["baked"]:
        text = f"largest difference {baked['max_abs']:.3g}, tolerance {baked['tolerance']:.3g}"
        lines.append(f"pixels   {BAKED} and {MODEL}: {text}")
    for name, (then, here) in result["other_kernels"].items():
        lines.append(f"note     {name} ran as {then} at build time, here as {here}")
    lines += [
        f"note     gate {gate['name']} failed at build time: {gate.get('value')}, "
        f"limit {gate.get('limit')}"
        for gate in result["gates"]
        if not gate.get("passed", True)
    ]
    lines += [f"FAILED   {failure}" for failure in result["failures"]]
    return lines


def _check_baked(package: Package, golden: Golden, open_runner: Opener) -> dict[str, Any] | None:
    """Compare the model that takes pixels with the other one; None where there is none."""
    path = package.folder / BAKED
    if not path.is_file() or package.engine.name != MODEL:
        return None  # a finished engine is no ONNX model: its runner opens neither
    found = compare_baked(open_runner, package.engine, path, golden.inputs, package.image)
    text = f"{BAKED} and {MODEL} differ by {found['max_abs']:.3g}"
    return found | {"failures": [] if found["passed"] else [text]}


def metadata_faults(model: onnx.ModelProto, manifest: Mapping[str, Any]) -> list[str]:
    """List metadata of the model that contradict the manifest."""
    properties = {p.key: p.value for p in model.metadata_props}
    faults = []
    for key, path in _METADATA.items():
        value: Any = manifest
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None and key in properties and properties[key] != str(value):
            faults.append(f"{key} is {properties[key]!r}, the manifest says {value!r}")
    return faults


def check_golden(
    golden: Golden, runner: Runner, model: onnx.ModelProto, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """Compare an opened engine with the simulation; `failures` says what is out of tolerance."""
    outputs = runner.infer(golden.inputs)
    limits = golden_limits(golden, model, manifest)
    tolerance = limits["tolerance"]
    max_abs = float(np.abs(outputs - golden.outputs).max())
    equal = outputs.argmax(1) == golden.outputs.argmax(1)
    clear = _margins(golden.outputs) > limits["margin"]
    clear_agreement = 100 * float(equal[clear].mean()) if clear.any() else 100.0
    layers = _compare_codes(golden, runner)
    first = next((row for row in layers if row.max_steps), None)
    failures = []
    if not max_abs <= tolerance:  # also true of NaN
        failures.append(f"outputs differ by {max_abs:.3g}, tolerance {tolerance:.3g}")
    if clear_agreement < MIN_AGREEMENT:
        failures.append(
            f"arg-max equal on {clear_agreement:.2f} % of {int(clear.sum())} untied images, "
            f"expected {MIN_AGREEMENT:.0f} %"
        )
    if first is not None and not first.is_rounding:
        failures.append(
            f"quantizer {first.quantizer} is the first to diverge, on equal inputs: "
            f"{100 * first.share:.2f} % of its codes by up to {first.max_steps} steps, "
            f"expected at most {100 * MAX_SHARE:.0f} % by {MAX_STEPS}"
        )
    return {
        "images": len(golden.inputs),
        "max_abs": max_abs,
        "tolerance": tolerance,
        "argmax_agreement": 100 * float(equal.mean()),
        "untied_agreement": clear_agreement,
        "first_divergence": dataclasses.asdict(first) if first else None,
        "layers": [dataclasses.asdict(row) for row in layers],
        "failures": failures,
    }


def golden_limits(
    golden: Golden, model: onnx.ModelProto, manifest: Mapping[str, Any]
) -> dict[str, float]:
    """Return how far outputs may be off, and the lead that decides an arg-max beyond doubt."""
    step = OUTPUT_STEPS * output_step(model)
    step += FLOAT_TOLERANCE * float(np.abs(golden.outputs).max())
    tolerance = step + _known_difference(manifest)
    return {"tolerance": tolerance, "margin": 2 * step, "agreement": MIN_AGREEMENT}


def _compare_codes(golden: Golden, runner: Runner) -> list[CodeDifference]:
    """Compare quantizer by quantizer, in graph order."""
    names = [name for name in golden.taps if name in golden.codes]
    if not names:
        return []
    count = len(golden.codes[names[0]])
    values = runner.codes(golden.inputs[:count], [golden.taps[name] for name in names])
    rows = []
    for name in names:
        here, expected = values[golden.taps[name]], golden.codes[name]
        distance = np.abs(here.astype(np.int32).reshape(expected.shape) - expected)
        rows.append(CodeDifference(name, int(distance.max()), float((distance > 0).mean())))
    return rows


def _check_model(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # protobuf's and the checker's faults have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoadError(f"{path}: the ONNX checker refuses it: {reason}") from error
    return model


def _known_difference(manifest: Mapping[str, Any]) -> float:
    """Return the difference that was there, and accepted, on the machine that built it."""
    failed = [g for g in manifest.get("gates", []) if not g.get("passed", True)]
    if any("parity" in str(gate.get("name")) for gate in failed):
        return 0.0
    return float(manifest.get("parity", {}).get("max_abs") or 0.0)


def _margins(outputs: np.ndarray) -> np.ndarray:
    """Return the distance of the largest to the second largest logit, per image."""
    if outputs.shape[1] < 2:
        return np.full(len(outputs), np.inf)
    ordered = np.sort(outputs, axis=1)
    margins: np.ndarray = ordered[:, -1] - ordered[:, -2]
    return margins


def _other_kernels(package: Package, kernels: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return the layers that ran on another kernel at build time: name -> (then, here)."""
    rows = package.manifest.get("layers", [])
    then = {row["name"]: row.get("executed") for row in rows}
    return {
        name: (str(then[name]), kernel)
        for name, kernel in kernels.items()
        if then.get(name) and then[name] != kernel
    }


def _describe_codes(first: Mapping[str, Any] | None, count: int) -> str:
    if count == 0:
        return "no quantizers to compare"
    if first is None:
        return f"equal at all {count} quantizers"
    return (
        f"first difference at {first['quantizer']}: {100 * first['share']:.3f} % of its codes, "
        f"by up to {first['max_steps']}"
    )
