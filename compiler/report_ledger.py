"""The layers of a build on its page: the manifest in, the precision ledger as a table out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dfqc.compiler._html import ABSENT, Markup, bullets, lookup, number, table
from dfqc.compiler.choice_text import describe_choice

_OFTEN = 4  # layers of which the same is said
_GOOD_DB = 40.0  # length of a full bar


def ledger_html(manifest: Mapping[str, Any]) -> str:
    """Return the table of the layers: bits asked and exported, kernel, time, SQNR."""
    layers, times = manifest.get("layers", []), layer_ms(manifest)
    notes = _common_reasons(layers)
    columns: dict[str, list[object]] = {
        "layer": [layer.get("name") for layer in layers],
        "channels": [_width(layer) for layer in layers],
        "op": [layer.get("op") for layer in layers],
        "asked": [layer.get("asked") for layer in layers],
        "exported": [layer.get("exported") for layer in layers],
        "executed": [layer.get("executed") or "not known" for layer in layers],
        "rounding": [layer.get("rounding") for layer in layers],
        "ms": [number(times.get(layer.get("name")), 4) for layer in layers],
        "why": [_why(layer.get("reason"), notes) for layer in layers],
        "SQNR (dB)": [number(layer.get("sqnr_db"), 1) for layer in layers],
        "": [_bar(layer.get("sqnr_db")) for layer in layers],
    }
    if not any(layer.get("channels_after") for layer in layers):
        del columns["channels"]
    if not any(columns["rounding"]):
        del columns["rounding"]
    if not times:
        del columns["ms"]
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    said = [f"Note {index + 1}: {reason}" for index, reason in enumerate(notes)]
    if times:
        batch = next(iter(lookup(manifest, "build", "latency_ms") or {}), ABSENT)
        said.append(f"ms: profiled at batch {batch}; layers in one kernel each bear all its time.")
    if kept := describe_choice(manifest.get("quantization") or {}):
        said.append(f"Kept as a whole: {kept}.")
    numeric = tuple(i for i, name in enumerate(columns) if name in ("ms", "SQNR (dB)"))
    return table(list(columns), rows, numeric=numeric) + bullets(said)


def layer_ms(manifest: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the milliseconds per layer that `dfqc engine` measured; empty without."""
    times: Mapping[str, float] = lookup(manifest, "build", "layer_ms") or {}
    return times


def _common_reasons(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is said of many layers: once below the table is enough."""
    reasons = Counter(str(layer["reason"]) for layer in layers if layer.get("reason"))
    return [reason for reason, count in reasons.items() if count >= _OFTEN]


def _why(reason: object, notes: Sequence[str]) -> object:
    return f"note {notes.index(str(reason)) + 1}" if reason in notes else reason


def _width(layer: Mapping[str, Any]) -> str:
    before, after = layer.get("channels_before"), layer.get("channels_after")
    return str(after) if before == after else f"{before} → {after}"


def _bar(sqnr: float | None) -> Markup:
    width = 0.0 if sqnr is None else min(max(sqnr / _GOOD_DB, 0.0), 1.0)
    return Markup(
        f'<div class="track"><div class="bar" style="width:{100 * width:.0f}%"></div></div>'
    )
