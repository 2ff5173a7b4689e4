"""What the manifest says of layers and of their quantization: a finished build in, rows out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfqc.compiler.allocate import Effect, table_from_json
from dfqc.compiler.pipeline import Build
from dfqc.compiler.pruning_report import PRUNING, list_widths
from dfqc.compiler.stages_allocate import ALLOCATION
from dfqc.compiler.stages_autotune import TRIALS
from dfqc.compiler.stages_engine import METRICS, PARITY
from dfqc.compiler.storage import INFO, PLAN


def list_layers(build: Build) -> list[dict[str, Any]]:
    """Return what every layer asked for, got and runs as, and how its weights were rounded."""
    planned = build.data("autotune", PLAN)["layers"]
    table = table_from_json(build.data("allocate", ALLOCATION).get("table", {}))
    sqnr = build.data("evaluate", METRICS)["layers"]
    executed: Mapping[str, str] = {}
    if build.job.runtime is not None:
        executed = build.data("verify", PARITY)["executed"]
    widths = list_widths(build.file("prune", PRUNING))
    rounding = _rounding(build.data("correct", INFO)["info"])
    return [
        {
            "name": layer["name"],
            "op": layer["op"],
            "asked": _bits(layer["asked"]),
            "exported": _bits(layer["exported"]),
            "executed": executed.get(layer["name"]),
            "reason": layer["reason"],
            "rounding": rounding.get(layer["name"]),
            "sqnr_db": sqnr.get(layer["name"]),
            # Output channels; null where nothing was pruned.
            "channels_before": widths.get(layer["name"], [None, None])[0],
            "channels_after": widths.get(layer["name"], [None, None])[1],
            "sensitivity": _sensitivity(table.get(layer["name"])),
        }
        for layer in planned
    ]


def describe_allocation(build: Build) -> dict[str, Any] | None:
    """Say under what the weights' bits were chosen, and what came of it; None: they were given."""
    about = build.data("allocate", ALLOCATION)
    if "limit" not in about:
        return None
    return {name: value for name, value in about.items() if name != "table"}


def describe_sensitivity(build: Build) -> dict[str, Any] | None:
    """Say on how many images the layers' `sensitivity` was measured; None: it was not."""
    about = build.data("allocate", ALLOCATION)
    return {"images": about["images"]} if about else None


def describe_autotune(build: Build) -> dict[str, Any] | None:
    """Say which layers are faster in float, and what was timed; None: nothing was tried."""
    found: dict[str, Any] = build.data("autotune", TRIALS)
    return found or None


def _sensitivity(row: Mapping[int, Effect] | None) -> dict[str, Any] | None:
    """What this layer's weights alone do to the output, by their bits."""
    if row is None:
        return None
    return {
        str(bits): {"sqnr_db": e.sqnr_db, "kl": e.kl, "agreement": e.agreement}
        for bits, e in row.items()
    }


def _bits(raw: Mapping[str, int]) -> str:
    return f"w{raw['weight']}a{raw['act']}"


# What some quantizers say and others do not.
_OWN = (
    *("last", "collapsed", "start", "hessian", "images", "rounded_to_nearest", "spilled_bytes"),
    *("ranges_from_images", "layers_with_norms", "led_astray", "matched_distance"),
    "widened_caches",
)


def describe_quantization(build: Build) -> dict[str, Any]:
    """Return which quantizer ran, what it chose between and what it kept, per unit and in all."""
    about = build.data("correct", INFO)["info"]
    return {
        "quantizer": about["quantizer"],
        "kept": about.get("kept"),
        "heldout_distance": about.get("heldout_distance"),
        "shortened": about.get("shortened", False),
        "bias_correction": about.get("bias_correction"),
        **{name: about[name] for name in _OWN if name in about},
        "units": about.get("units", []),
    }


def list_collapses(build: Build) -> list[str]:
    """Return one sentence where a training was stopped because it had collapsed."""
    about = build.data("correct", INFO)["info"]
    if not about.get("collapsed"):
        return []
    what = f"--quantizer {about['quantizer']} stopped after {about['iterations']} iterations"
    kept = f"kept was {about.get('kept')}, the nearest to the float network on held-out images"
    return [f"{what}: {about['collapsed']}; {kept}"]


def _rounding(about: Mapping[str, Any]) -> dict[str, str]:
    """Return, per layer, what gave its weights their codes; empty for a method of one way."""
    # A walk for activations alone leaves all codes as the units have them, and so does tuning, but
    # with `tune_rounding`.
    units = [unit for unit in about.get("units", []) if unit["walk"] != "acts"]
    kept = about.get("kept", "tuned")
    if kept == "start":  # of a training, which was not better
        kept = about["start_kept"]
    changed = kept == "tuned" and about.get("tuned", {}).get("flipped", 0) > 0
    learned = kept in ("reconstructed", "tuned") and not changed
    return {
        layer: unit["winner"] if learned else kept for unit in units for layer in unit["layers"]
    }
