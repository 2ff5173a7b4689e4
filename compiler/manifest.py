"""The manifest, schema 1, and the gates: a finished build in, one JSON object out.

Other tools read it: fields are added, never renamed.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Mapping
from typing import Any

from dfqc.compiler import ledger, machine
from dfqc.compiler.baking import describe_preprocessing
from dfqc.compiler.errors import (
    AccuracyGateError,
    EnvironmentFault,
    ParityGateError,
    SpeedGateError,
    UnsupportedError,
)
from dfqc.compiler.evaluate import agrees
from dfqc.compiler.job import Job
from dfqc.compiler.package import MODEL, SCHEMA
from dfqc.compiler.pipeline import Build
from dfqc.compiler.pruning_report import describe_pruning
from dfqc.compiler.reproduce import build_command
from dfqc.compiler.stages import DATA, FACTS, assumed_note
from dfqc.compiler.stages_engine import LATENCY, METRICS, PARITY
from dfqc.compiler.stages_target import CHECK, list_broken
from dfqc.compiler.storage import INFO, NAMES

# The gravest first: a file that is refused makes no engine, and a wrong engine's accuracy and speed
# mean nothing.
EXIT_CODES = {
    "rules": UnsupportedError.exit_code,
    "parity": ParityGateError.exit_code,
    "parity_eval": ParityGateError.exit_code,
    "parity_baked": ParityGateError.exit_code,
    "max_drop": AccuracyGateError.exit_code,
    "max_drop_agreement": AccuracyGateError.exit_code,
    "min_speedup": SpeedGateError.exit_code,
}
_VERSIONS = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime",
    "openvino",
    "numpy",
)


def assemble(build: Build, baked: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the manifest; `files` is filled in by the package writer.

    `baked` says what the second model is, the one that takes pixels, and how it compares.
    """
    job, facts = build.job, build.data("trace", FACTS)
    metrics, parity = _metrics(build), _parity(build)
    checked = build.data("check", CHECK) or None  # empty for a target without rules
    gates = check_gates(job, metrics, parity, checked)
    if baked and baked["passed"] is not None:
        gates.append(_gate("parity_baked", baked["max_abs"], baked["tolerance"], baked["passed"]))
    code = exit_code(job, gates)
    return {
        "schema": SCHEMA,
        "dfqc": machine.version("dfqc"),
        "status": "passed" if code == 0 else "failed",
        "exit_code": code,
        "model": {
            "source": job.recipe.model,
            "arch": job.recipe.arch,
            "sha256": facts["sha256"],
            "params": facts["params"],
            "macs": facts["macs"],
        },
        "target": job.recipe.target,
        "bits": job.recipe.bits,
        "seed": job.recipe.seed,
        "engine": MODEL,
        "image": facts["image"],
        "preprocessing": describe_preprocessing(facts["image"], baked),
        "command": build_command(job.recipe),
        "recipe": job.recipe.saved(),
        "recipe_sha256": job.recipe_digest(),
        "metrics": metrics,
        "size": build.data("lower", NAMES)["sizes"],
        "parity": parity,
        "target_check": checked,
        "calib": _calib(build),
        "gates": gates,
        "notes": [
            *_notes(job, facts["image"], checked),
            *ledger.list_collapses(build),
        ],
        "stages": [dataclasses.asdict(record) for record in build.records],
        "pruning": describe_pruning(build),
        "allocation": ledger.describe_allocation(build),
        "sensitivity": ledger.describe_sensitivity(build),
        "autotune": ledger.describe_autotune(build),
        "quantization": ledger.describe_quantization(build),
        "layers": ledger.list_layers(build),
        "environment": _environment(job),
    }


def check_gates(
    job: Job,
    metrics: Mapping[str, Any],
    parity: Mapping[str, Any],
    checked: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return every gate that was set, and parity, which always is; a missing value fails."""
    gates = []
    if checked is not None:
        gates.append(_gate("rules", checked["errors"], 0, checked["errors"] == 0))
    if job.runtime is not None:
        limit = parity["tolerance"]["argmax_agreement"]
        passed = parity["passed"]
        gates.append(_gate("parity", parity["argmax_agreement"], limit, passed))
        if parity["eval_agreement"] is not None:
            value = parity["eval_agreement"]
            passed = agrees(value, metrics["top1"]["images"])
            gates.append(_gate("parity_eval", value, limit, passed))
    if (limit := job.recipe.max_drop) is not None:
        # Without labels the loss of top-1 is unknown; another name says that it is not that.
        name = "max_drop" if metrics["top1"]["images"] else "max_drop_agreement"
        drop = _drop(metrics)
        gates.append(_gate(name, drop, limit, drop <= limit))
    if (limit := job.recipe.min_speedup) is not None:
        speedup = metrics["latency_ms"]["speedup"]
        gates.append(_gate("min_speedup", speedup, limit, (speedup or 0.0) >= limit))
    return gates


def exit_code(job: Job, gates: list[dict[str, Any]]) -> int:
    """Return the code of the gravest failed gate, 8 if nothing could be verified, else 0.

    Without a runtime, what was not measured has not failed. A target whose engine is built on the
    device owes none here, unless one is required or a gate needs it.
    """
    unknown = [gate for gate in gates if job.runtime is None and gate["value"] is None]
    failed = [gate["name"] for gate in gates if not gate["passed"] and gate not in unknown]
    for name, code in EXIT_CODES.items():
        if name in failed:
            return code
    later = job.backend.TARGET.engine_file and not job.recipe.require_engine and not unknown
    return 0 if job.runtime is not None or later else EnvironmentFault.exit_code


def verdict(manifest: Mapping[str, Any]) -> str:
    """Return one sentence on why a build did not pass; empty if it did."""
    faults = [
        f"gate {gate['name']} failed: {_show(gate['value'])}, limit {_show(gate['limit'])}"
        for gate in manifest["gates"]
        if not gate["passed"]
    ]
    if manifest["exit_code"] == EnvironmentFault.exit_code:
        faults += manifest["notes"][:1]  # says why nothing was verified
    return "; ".join(faults)


def _gate(name: str, value: float | None, limit: float, passed: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "passed": passed}


def _drop(metrics: Mapping[str, Any]) -> float:
    """Points lost by what was built, in top-1 or, without labels, in agreement with float."""
    built = "simulated" if metrics["agreement"]["engine"] is None else "engine"
    if metrics["top1"]["images"]:
        return float(metrics["top1"]["float"] - metrics["top1"][built])
    return float(100.0 - metrics["agreement"][built])


def _metrics(build: Build) -> dict[str, Any]:
    measured = build.data("evaluate", METRICS)
    built = "engine" if "engine" in measured else "simulated"
    return {
        "top1": _top1(measured.get("eval") or {}),
        "agreement": {
            "simulated": measured["simulated"]["agreement"],
            "engine": measured.get("engine", {}).get("agreement"),
            "images": measured["images"],
        },
        "sqnr_db": measured[built]["sqnr_db"],
        "latency_ms": _latency(build),
    }


def _top1(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Percent of right predictions; every value is null without labelled images."""
    found = scores.get("top1", {})
    return {
        **{name: found.get(name) for name in ("float", "pruned", "simulated", "engine")},
        "images": scores.get("images", 0),
        "agreement": scores.get("agreement"),
        "drop_standard_error": scores.get("drop_standard_error"),
    }


def _latency(build: Build) -> dict[str, Any]:
    """Medians in ms; every value is null where no engine could be run."""
    times = build.data("bench", LATENCY) if build.job.runtime is not None else {}
    reference, engine, ratio = (times.get(n, {}) for n in ("float", "engine", "speedup"))
    return {
        "float": reference.get("median_ms"),
        "engine": engine.get("median_ms"),
        "speedup": ratio.get("median"),
        "batch": engine.get("batch"),
        "threads": engine.get("threads"),
        "float_p90": reference.get("p90_ms"),
        "engine_p90": engine.get("p90_ms"),
        # The pruned model in float; null where no channels were removed.
        "pruned": times.get("pruned", {}).get("median_ms"),
        "pruned_speedup": times.get("pruned_speedup", {}).get("median"),
        # The float model in the half precision that the engine has here; null where it has none.
        "half": times.get("half", {}).get("median_ms"),
        "half_precision": times.get("half_precision"),
        "half_speedup": times.get("half_speedup", {}).get("median"),
        "speedup_best": ratio.get("best"),
        "runs": engine.get("runs"),
        "warmup": engine.get("warmup"),
    }


def _parity(build: Build) -> dict[str, Any]:
    if build.job.runtime is None:
        return {"max_abs": None, "argmax_agreement": None, "worst_layer": None, "passed": None}
    report = build.data("verify", PARITY)
    scores = build.data("evaluate", METRICS).get("eval") or {}
    kept = {name: value for name, value in report.items() if name not in ("layers", "executed")}
    return kept | {"eval_agreement": scores.get("parity")}


def _calib(build: Build) -> dict[str, Any]:
    about = build.data("synthesize", INFO)
    held_out = build.data("holdout", INFO)
    score = about["info"]["score"]
    return {
        "method": build.job.recipe.synth,
        "source": about["source"],
        "images": about["images"],
        "asked": about["info"]["asked"],  # more than were made, where the time was short
        # Mean distance to the batch norms' statistics: 0 is a match, real images have 0.1 to 0.2.
        "score": score["bn_distance"],
        "quality": _quality(score),
        "warnings": score["warnings"],
        "holdout_images": held_out["images"],
        "holdout_score": held_out["info"]["score"]["bn_distance"],
        **build.data("data", DATA).get("calib", {}),  # images that the data set has
    }


def _quality(score: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures behind the score; `calib/quality.json` has those of every layer."""
    firing, seen = score["firing"] or {}, score["predictions"] or {}
    return {
        "worst_layer": score["worst_layer"],
        "worst_layer_score": score["layers"].get(score["worst_layer"]),
        "channels_expected": firing.get("expected"),
        "channels_silent": firing.get("silent"),
        "classes_seen": seen.get("hit"),
        "classes_possible": seen.get("possible"),
        "evenness": seen.get("evenness"),
        "label_agreement": score["agreement"],
        "twins": score["twins"]["images"],
        "out_of_range": score["out_of_range"],
    }


def _notes(
    job: Job, image: Mapping[str, Any], checked: Mapping[str, Any] | None = None
) -> list[str]:
    assumed = assumed_note(image)
    notes = [assumed] if assumed else []
    notes += list_broken(checked)
    if job.runtime is not None:
        return notes
    unverified = (
        f"Not verified: the runtime of target {job.recipe.target!r} cannot be used here "
        f"({job.no_runtime}). The model was written, checked as ONNX and simulated, but no "
        "engine was run"
    )
    if job.backend.TARGET.engine_file:
        unverified += f"; finish it on the device: dfqc engine {job.output}"
    return [unverified, *notes]


def _environment(job: Job) -> dict[str, Any]:
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": machine.cpu_model(),
        "integer_instructions": ", ".join(machine.integer_flags()),
        "cores": machine.cpu_count(),
        "runtime": job.runtime,
        **machine.versions(*_VERSIONS),
    }


def _show(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
