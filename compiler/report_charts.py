"""The measured part of a report: the manifest in, tables with their charts out.

Every chart has its table: figures can be read and copied, and the page is complete in print.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dfqc.compiler._html import (
    ABSENT,
    bullets,
    folded,
    lookup,
    number,
    pairs,
    size_ratio,
    table,
    with_unit,
)
from dfqc.compiler._svg import Bar, bar_chart, column_chart, interval_chart
from dfqc.compiler.intervals import Z95, wilson
from dfqc.compiler.units import format_duration, format_size

_PER_COLUMN = (8, 4, 6, 3, 2)  # weight bits by color; all others have the last one


def show_fidelity(manifest: Mapping[str, Any]) -> str:
    """Return top-1 and agreement with float, each with its 95 % interval."""
    metrics, parity = manifest.get("metrics", {}), manifest.get("parity", {})
    top1, agreement = metrics.get("top1") or {}, metrics.get("agreement") or {}
    rows = [
        [
            name,
            _interval(top1.get(name), top1.get("images")),
            number(100)
            if name == "float"
            else _interval(agreement.get(name), agreement.get("images")),
        ]
        for name in ("float", "pruned", "simulated", "engine")
        if name != "pruned" or top1.get(name) is not None
    ]
    error = top1.get("drop_standard_error")
    facts = {
        "labelled images": top1.get("images"),
        "held-out images": agreement.get("images"),
        "loss of top-1 (paired, 95 %)": _loss(top1, error),
        "SQNR of the outputs": with_unit(metrics.get("sqnr_db"), "dB"),
        "simulation and engine": with_unit(
            parity.get("argmax_agreement"), "% of predictions equal"
        ),
        "largest difference of their outputs": number(parity.get("max_abs"), 4),
        "layer with the largest difference": parity.get("worst_layer"),
    }
    chart = interval_chart("top-1 and agreement with 95 % intervals", _interval_rows(manifest))
    header = ("model", "top-1 (%)", "predictions as in float (%)")
    return chart + table(header, rows, numeric=(1, 2)) + pairs(facts)


def _interval_rows(manifest: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
    """Return what has a number of images, and so an interval."""
    rows = []
    for label, measure, names in (
        ("top-1", "top1", ("float", "simulated", "engine")),
        ("as float", "agreement", ("simulated", "engine")),
    ):
        found = lookup(manifest, "metrics", measure) or {}
        for name in names:
            if found.get(name) is not None and found.get("images"):
                interval = wilson(found[name], found["images"])
                rows.append((f"{label}, {name}", float(found[name]), *interval))
    return rows


def _interval(percent: float | None, images: int | None) -> str:
    if percent is None or not images:
        return number(percent)
    low, high = wilson(percent, images)
    return f"{number(percent)} ({low:.2f} to {high:.2f})"


def _loss(top1: Mapping[str, Any], error: float | None) -> str | None:
    if error is None or top1.get("engine") is None:
        return None
    return f"{top1['float'] - top1['engine']:.2f} ± {Z95 * error:.2f} points"


def show_latency(manifest: Mapping[str, Any]) -> str:
    """Return the times of the engine beside those of the float model."""
    latency = lookup(manifest, "metrics", "latency_ms") or {}
    if latency.get("engine") is None:
        return "<p>Not measured.</p>"
    names = [n for n in ("float", "half", "pruned", "engine") if latency.get(n) is not None]
    labels = [f"float {latency['half_precision']}" if n == "half" else n for n in names]
    bars = [
        Bar(label, latency[name], f"{latency[name]:.3g} ms", latency.get(f"{name}_p90"), index)
        for index, (name, label) in enumerate(zip(names, labels, strict=True))
    ]
    rows = [
        [label, number(latency[name], 3), number(latency.get(f"{name}_p90"), 3)]
        for name, label in zip(names, labels, strict=True)
    ]
    note = (
        f"Batch {latency.get('batch', ABSENT)}, {latency.get('threads', ABSENT)} threads; medians "
        "of calls that took turns in one run; whiskers go to the 90th percentile. Trust the ratio "
        f"({number(latency.get('speedup'))}×), not the figures: machines are noisy."
    )
    figures = table(("model", "median (ms)", "p90 (ms)"), rows, numeric=(1, 2))
    return bar_chart("latency", bars) + figures + f"<p>{escape(note)}</p>"


def show_sizes(manifest: Mapping[str, Any]) -> str:
    """Return the sizes of the files, and the least that the planned bits need."""
    size = manifest.get("size", {})
    names = {"float_bytes": "float model", "model_bytes": "this model", "ideal_bytes": "ideal"}
    present = [(label, size[key]) for key, label in names.items() if size.get(key) is not None]
    bars = [
        Bar(label, float(count), format_size(count), None, index)
        for index, (label, count) in enumerate(present)
    ]
    rows = [[label, format_size(count), f"{count:,}"] for label, count in present]
    note = (
        "Ideal: every weight at its planned bits, int32 biases, one float scale per channel or "
        f"tensor. This model is {size_ratio(manifest, 'model_bytes', 'ideal_bytes')} of it."
    )
    figures = table(("file", "size", "bytes"), rows, numeric=(1, 2))
    return bar_chart("sizes", bars) + figures + f"<p>{escape(note)}</p>"


def layers_chart(layers: Sequence[Mapping[str, Any]]) -> str:
    """Return the SQNR of every layer in the order of the network, colored by its weight bits."""
    known = [layer for layer in layers if math.isfinite(layer.get("sqnr_db") or math.nan)]
    columns = [
        Bar(
            str(layer["name"]),
            float(layer["sqnr_db"]),
            f"{layer['sqnr_db']:.1f} dB, {layer.get('exported')}",
            color=_color(layer),
        )
        for layer in known
    ]
    legend = {_color(layer): _bits_name(layer) for layer in known}
    chart = column_chart("SQNR per layer", columns, unit="SQNR (dB)", legend=legend)
    worst = sorted(known, key=lambda layer: float(layer["sqnr_db"]))[:3]
    said = [f"{layer['name']}: {layer['sqnr_db']:.1f} dB" for layer in worst]
    if len(known) <= len(worst):
        return chart
    return f"{chart}<p>Lowest:</p>{bullets(said)}"


def _color(layer: Mapping[str, Any]) -> int:
    bits = _weight_bits(layer)
    return _PER_COLUMN.index(bits) if bits in _PER_COLUMN else len(_PER_COLUMN)


def _bits_name(layer: Mapping[str, Any]) -> str:
    bits = _weight_bits(layer)
    return f"{bits}-bit weights" if bits in _PER_COLUMN else "other weights"


def _weight_bits(layer: Mapping[str, Any]) -> int | None:
    text = str(layer.get("exported") or "").removeprefix("w").partition("a")[0]
    return int(text) if text.isdigit() else None


def show_stages(stages: Sequence[Mapping[str, Any]]) -> str:
    """Return how long the stages took, and took the first time where they are from the store."""
    bars = [
        Bar(
            str(stage.get("name")),
            float(stage["seconds"]),
            format_duration(stage["seconds"]) + (" (stored)" if stage.get("cached") else ""),
            color=5 if stage.get("cached") else 0,
        )
        for stage in stages
        if stage.get("seconds")
    ]
    rows = [
        [
            stage.get("name"),
            format_duration(stage.get("seconds") or 0.0),
            "cached" if stage.get("cached") else "made",
            format_size(stage.get("peak_rss_bytes") or 0),
            str(stage.get("key", ""))[:12],
        ]
        for stage in stages
    ]
    header = ("stage", "time to make", "this run", "peak memory", "key")
    return bar_chart("seconds per stage", bars) + folded(
        "memory and keys of the stages", table(header, rows, numeric=(1, 3))
    )
