"""What changed between two builds: two packages (or manifests) in, figures that differ out.

For pull requests: the package of the branch before, that of the change after. Nothing is measured
here; what the two manifests say is compared, with a note where two figures are not comparable.
Needs no torch, no engine and no model: a `manifest.json` alone will do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqc.compiler.package import read_manifest

_Z95 = 1.96
# What makes two figures of the same name mean different things.
_CONTEXT = (
    ("target", ("target",), "size and latency are those of different targets"),
    ("processor", ("environment", "cpu"), "latencies are those of different machines"),
    ("runtime", ("environment", "runtime"), "latencies are those of different runtimes"),
    ("batch", ("metrics", "latency_ms", "batch"), "latencies are those of different batches"),
    ("threads", ("metrics", "latency_ms", "threads"), "latencies are those of different threads"),
    ("labelled images", ("metrics", "top1", "images"), "top-1 is that of different image sets"),
    ("model", ("model", "sha256"), "the float model itself is another one"),
)


@dataclass(frozen=True)
class Figure:
    """One figure of both builds. `path` is its place in the manifest; `better` is its good side."""

    name: str
    path: tuple[str, ...]
    unit: str
    better: str  # "higher" or "lower"
    noise: float = 0.0  # relative change below which it is called the same


# Latency is not exact: what is below 5 % is noise on any machine that is not locked down.
FIGURES = (
    Figure("top-1", ("metrics", "top1", "engine"), "%", "higher"),
    Figure("top-1, simulated", ("metrics", "top1", "simulated"), "%", "higher"),
    Figure("top-1 of the float model", ("metrics", "top1", "float"), "%", "higher"),
    Figure("predictions as in float", ("metrics", "agreement", "engine"), "%", "higher"),
    Figure("as in float, simulated", ("metrics", "agreement", "simulated"), "%", "higher"),
    Figure("SQNR of the outputs", ("metrics", "sqnr_db"), "dB", "higher", 0.005),
    Figure("simulation and engine agree", ("parity", "argmax_agreement"), "%", "higher"),
    Figure("size of the model", ("size", "model_bytes"), "bytes", "lower"),
    Figure("speed-up over float", ("metrics", "latency_ms", "speedup"), "x", "higher", 0.05),
    Figure("latency", ("metrics", "latency_ms", "engine"), "ms", "lower", 0.05),
    Figure("multiply-adds", ("macs",), "", "lower"),
    Figure("parameters", ("params",), "", "lower"),
)
_LAYER_FIELDS = ("asked", "exported", "executed", "channels_after")


def run_diff(before: Path, after: Path, *, max_drop: float | None = None) -> dict[str, Any]:
    """Compare two packages: what `dfqc diff A B` prints.

    Args:
        before: package folder or `manifest.json` of the build that is compared with.
        after: that of the change.
        max_drop: points of top-1 (without labels: of agreement with float) that may be lost from
            `before` to `after`; more is told in `failures`.
    """
    old, new = read_manifest(before), read_manifest(after)
    figures = [_compare(figure, old, new) for figure in FIGURES]
    result = {
        "before": _identify(before, old),
        "after": _identify(after, new),
        "figures": [
            row for row in figures if row["before"] is not None or row["after"] is not None
        ],
        "top1_uncertainty": _uncertainty(old, new),
        "gates": _compare_gates(old, new),
        "layers": _compare_layers(old.get("layers", []), new.get("layers", [])),
        "recipe": _changed(old.get("recipe", {}), new.get("recipe", {})),
        "environment": _changed(old.get("environment", {}), new.get("environment", {})),
        "notes": _notes(old, new),
    }
    return result | {"failures": _failures(result, max_drop)}


def _identify(place: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    folder = place if place.is_dir() else place.parent
    return {
        "package": str(place),
        "name": folder.resolve().name,
        "status": manifest.get("status"),
        "bits": manifest.get("bits"),
        "target": manifest.get("target"),
        "recipe_sha256": manifest.get("recipe_sha256"),
        "dfqc": manifest.get("dfqc"),
    }


def _compare(figure: Figure, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    before, after = _figure(figure, old), _figure(figure, new)
    change = None if before is None or after is None else after - before
    return {
        "name": figure.name,
        "unit": figure.unit,
        "before": before,
        "after": after,
        "change": change,
        "verdict": _judge(figure, before, change),
    }


def _figure(figure: Figure, manifest: Mapping[str, Any]) -> float | None:
    if figure.path[-1] in ("macs", "params"):
        return _cost(manifest, figure.path[-1])
    value = _get(manifest, figure.path)
    return value if isinstance(value, (int, float)) else None


def _cost(manifest: Mapping[str, Any], name: str) -> float | None:
    """Return the MACs or parameters of what was built: those left after pruning."""
    pruned = _get(manifest, ("pruning", f"{name}_after"))
    value = _get(manifest, ("model", name)) if pruned is None else pruned
    return None if value is None else float(value)


def _judge(figure: Figure, before: float | None, change: float | None) -> str | None:
    if before is None or change is None:
        return None
    if abs(change) <= figure.noise * abs(before):
        return "same"
    return "better" if (change > 0) == (figure.better == "higher") else "worse"


def _uncertainty(old: Mapping[str, Any], new: Mapping[str, Any]) -> float | None:
    """Return the points within which a change of top-1 may be chance (95 %), at most.

    Both drops were measured against the float model on the same images; how far the two depend on
    each other is not known, so that their errors are added.
    """
    path = ("metrics", "top1", "drop_standard_error")
    errors = [_get(manifest, path) for manifest in (old, new)]
    return None if None in errors else _Z95 * sum(errors)


def _compare_gates(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    before, after = ({g["name"]: g for g in m.get("gates", [])} for m in (old, new))
    return [
        {"name": name, "before": before.get(name), "after": after.get(name)}
        for name in dict.fromkeys([*before, *after])
    ]


def _compare_layers(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    before, after = ({row["name"]: row for row in rows} for rows in (old, new))
    changed = []
    for name in (name for name in after if name in before):
        fields = {
            field: [before[name].get(field), after[name].get(field)]
            for field in _LAYER_FIELDS
            if before[name].get(field) != after[name].get(field)
        }
        if fields:
            sqnr = [before[name].get("sqnr_db"), after[name].get("sqnr_db")]
            row = {"name": name, "op": after[name].get("op"), "changes": fields, "sqnr_db": sqnr}
            changed.append(row | {"reason": after[name].get("reason")})
    return {
        "count": len(after),
        "changed": changed,
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
    }


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        name: [old.get(name), new.get(name)]
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    }


def _notes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    notes = []
    for name, path, meaning in _CONTEXT:
        before, after = _get(old, path), _get(new, path)
        if before is not None and after is not None and before != after:
            notes.append(f"{name} differs ({_short(before)}, {_short(after)}): {meaning}")
    if _get(new, ("metrics", "latency_ms", "engine")) is not None:
        notes.append(
            "the builds were timed in two runs: `dfqc bench` times both packages in one; the "
            "speed-up over float is measured inside of each run"
        )
    return notes


def _failures(result: Mapping[str, Any], max_drop: float | None) -> list[str]:
    """List what `--max-drop` refuses: a loss above it, or a figure that is not there."""
    if max_drop is None:
        return []
    found = {row["name"]: row for row in result["figures"]}
    # The first that either build has: another figure must not stand in for one that got lost.
    names = ("top-1", "top-1, simulated", "predictions as in float", "as in float, simulated")
    row = next((found[name] for name in names if name in found), None)
    if row is None:
        return ["neither manifest has top-1 or agreement with float"]
    if row["change"] is None:
        missing = "after" if row["after"] is None else "before"
        return [f"{row['name']} is missing {missing}: build both with the same --eval-data"]
    if -row["change"] > max_drop:
        lost = f"{row['before']:.2f} % to {row['after']:.2f} %"
        return [f"{row['name']} falls by {-row['change']:.2f} points ({lost}), limit {max_drop:g}"]
    return []


def _get(values: Mapping[str, Any], path: Sequence[str]) -> Any:
    current: Any = values
    for name in path:
        current = current.get(name) if isinstance(current, Mapping) else None
    return current


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
