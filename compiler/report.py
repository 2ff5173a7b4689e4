"""What people read about a build: the manifest in, `report.html` and `layers.csv` out.

The page is one file without scripts or links, so that it opens from a ticket or a share. Every
figure comes from the manifest; what was not measured is said, not left out.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from dfqc.compiler._html import ABSENT, Markup, bullets, page, pairs, section, table
from dfqc.compiler.pruning_report import pruning_html
from dfqc.compiler.target_report import rules_html
from dfqc.compiler.units import format_duration, format_size

if TYPE_CHECKING:
    import numpy as np

LAYER_COLUMNS = (*("name", "op", "asked", "exported", "executed", "rounding", "reason", "sqnr_db"),)

_TILE = 96  # pixels of the shorter side below which images are enlarged on a contact sheet
_GOOD_DB = 40.0  # length of a full bar


def report_html(manifest: Mapping[str, Any], contact_sheet_png: bytes | None = None) -> str:
    """Return the report of one build as a self-contained page."""
    title = f"{_source(manifest)} · {manifest.get('bits', '')} · {manifest.get('target', '')}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">{escape(_subtitle(manifest))}</p>',
        _cards(manifest),
        section("Not measured, not executed", bullets(open_points(manifest))),
        section("Gates", _gates(manifest.get("gates", []))),
        section("Accuracy and fidelity", _metrics(manifest)),
        section("Latency", _latency(manifest)),
        section("Size", _size(manifest)),
        section("Rules of the target", rules_html(manifest.get("target_check"))),
        section("Calibration images", _calibration(manifest, contact_sheet_png)),
        section("Pruning", pruning_html(manifest)),
        section("Precision ledger", _ledger(manifest.get("layers", []))),
        section("Weight bits under a limit", _allocation(manifest)),
        section("Stages", _stages(manifest.get("stages", []))),
        section("Reproduce", _command(manifest)),
        section("Environment", pairs(manifest.get("environment", {}))),
    ]
    return page(title, parts)


def layers_csv(manifest: Mapping[str, Any]) -> str:
    """Return the precision ledger, one line per layer."""
    out = io.StringIO()
    layers, widths = manifest.get("layers", []), _widths(manifest)
    pruned = ("channels_before", "channels_after") if manifest.get("pruning") else ()
    columns = (*LAYER_COLUMNS, *pruned, *(f"w{bits}_alone_db" for bits in widths))
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for layer in layers:
        alone = {f"w{bits}_alone_db": _alone(layer, bits) for bits in widths}
        writer.writerow({**layer, **alone})
    return out.getvalue()


def contact_sheet(images: np.ndarray, *, columns: int = 8) -> bytes:
    """Return uint8 images (n, h, w, 3), or (n, h, w, 1) in gray, side by side as a PNG."""
    import numpy as np
    from PIL import Image

    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1), (index % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = image if channels == 3 else image[..., :1]
    enlarge = max(1, _TILE // min(height, width))
    picture = Image.fromarray(sheet)
    size = (picture.width * enlarge, picture.height * enlarge)
    out = io.BytesIO()
    picture.resize(size, Image.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


def open_points(manifest: Mapping[str, Any]) -> list[str]:
    """List what a reader may take for granted and nobody has measured."""
    points = []
    if _get(manifest, "metrics", "top1", "engine") is None:
        points.append(
            "Accuracy: no labelled images were given (--eval-data). Agreement with the float model "
            "on synthetic images is no accuracy."
        )
    if _get(manifest, "metrics", "latency_ms", "engine") is None:
        points.append("Latency: nothing was timed. `dfqc bench` times the package where it is.")
    if _get(manifest, "parity", "argmax_agreement") is None:
        points.append("Parity: the engine was not run, so it is not compared to the simulation.")
    unknown = [row["name"] for row in manifest.get("layers", []) if not row.get("executed")]
    if unknown:
        points.append(f"Kernels: what executes {len(unknown)} of the layers is not known.")
    if _get(manifest, "image", "assumed"):
        points.append("Preprocessing: mean and std were not given; ImageNet's were assumed.")
    return points + [str(note) for note in manifest.get("notes", [])]


def _cards(manifest: Mapping[str, Any]) -> str:
    top1, gates = _get(manifest, "metrics", "top1") or {}, manifest.get("gates", [])
    passed = sum(bool(gate.get("passed")) for gate in gates)
    cards = [("gates passed", f"{passed} of {len(gates)}" if gates else ABSENT)]
    if top1.get("engine") is not None:
        drop = _difference(top1.get("float"), top1["engine"])
        cards.append(("top-1 of the engine", f"{_number(top1['engine'])} % ({drop})"))
    agreement = _get(manifest, "metrics", "agreement", "engine")
    cards.append(("predictions as in float", _unit(agreement, "%")))
    cards.append(("smaller than float", _ratio(manifest, "float_bytes", "model_bytes")))
    cards.append(
        ("faster than float", _unit(_get(manifest, "metrics", "latency_ms", "speedup"), "×"))
    )
    body = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in cards
    )
    return f'<div class="cards">{body}</div>'


def _gates(gates: Sequence[Mapping[str, Any]]) -> str:
    if not gates:
        return "<p>None were set.</p>"
    rows = [
        [
            gate.get("name"),
            _number(gate.get("value")),
            _number(gate.get("limit")),
            _verdict(bool(gate.get("passed"))),
        ]
        for gate in gates
    ]
    return table(("gate", "value", "limit", "verdict"), rows, numeric=(1, 2))


def _metrics(manifest: Mapping[str, Any]) -> str:
    metrics, parity = manifest.get("metrics", {}), manifest.get("parity", {})
    top1, agreement = metrics.get("top1") or {}, metrics.get("agreement") or {}
    rows = [
        [name, _number(top1.get(name)), _number(100 if name == "float" else agreement.get(name))]
        for name in ("float", "pruned", "simulated", "engine")
        if name != "pruned" or top1.get(name) is not None
    ]
    images = top1.get("images")
    facts = {
        "labelled images": images,
        "SQNR of the outputs": _unit(metrics.get("sqnr_db"), "dB"),
        "simulation and engine": _unit(parity.get("argmax_agreement"), "% of predictions equal"),
        "largest difference of their outputs": _number(parity.get("max_abs"), 4),
        "layer with the largest difference": parity.get("worst_layer"),
    }
    header = ("model", "top-1 (%)", "predictions as in float (%)")
    return table(header, rows, numeric=(1, 2)) + pairs(facts)


def _latency(manifest: Mapping[str, Any]) -> str:
    latency = _get(manifest, "metrics", "latency_ms")
    if not latency:
        return "<p>Not measured.</p>"
    names = ("float", "pruned", "engine") if latency.get("pruned") else ("float", "engine")
    rows = [[name, _number(latency.get(name), 3)] for name in names]
    note = (
        f"Batch {latency.get('batch', ABSENT)}, {latency.get('threads', ABSENT)} threads; medians "
        "of calls that took turns in one run. Trust the ratio "
        f"({_number(latency.get('speedup'))}×), not the figures: machines are noisy."
    )
    return table(("model", "median (ms)"), rows, numeric=(1,)) + f"<p>{escape(note)}</p>"


def _size(manifest: Mapping[str, Any]) -> str:
    size = manifest.get("size", {})
    names = {"float_bytes": "float model", "model_bytes": "this model", "ideal_bytes": "ideal"}
    rows = [
        [label, format_size(size[key]), f"{size[key]:,}"]
        for key, label in names.items()
        if size.get(key) is not None
    ]
    note = (
        "Ideal: every weight at its planned bits, int32 biases, one float scale per channel or "
        f"tensor. This model is {_ratio(manifest, 'model_bytes', 'ideal_bytes')} of it."
    )
    return table(("file", "size", "bytes"), rows, numeric=(1, 2)) + f"<p>{escape(note)}</p>"


def _calibration(manifest: Mapping[str, Any], sheet: bytes | None) -> str:
    calib = dict(manifest.get("calib", {}))
    faults, quality = calib.pop("warnings", []), calib.pop("quality", {})
    body = bullets(f"Warning: {fault}" for fault in faults) + pairs(calib | quality)
    if body:
        body += (
            "<p>The score is the mean distance to the statistics of the batch norms: 0 is a match, "
            "real images have 0.1 to 0.2, noise has 0.5 to 1.4.</p>"
        )
    if sheet is None:
        return body
    data = base64.b64encode(sheet).decode()
    return f'{body}<p><img alt="calibration images" src="data:image/png;base64,{data}"></p>'


def _ledger(layers: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            layer.get("name"),
            _width(layer),
            layer.get("op"),
            layer.get("asked"),
            layer.get("exported"),
            layer.get("executed") or "not known",
            layer.get("rounding") or "",
            layer.get("reason"),
            _number(layer.get("sqnr_db"), 1),
            _bar(layer.get("sqnr_db")),
        ]
        for layer in layers
    ]
    header = ["layer", "channels", "op", "asked", "exported", "executed", "rounding", "why"]
    header += ["SQNR (dB)", ""]
    if not any(layer.get("channels_after") for layer in layers):
        header, rows = [header[0], *header[2:]], [[row[0], *row[2:]] for row in rows]
    return table(header, rows, numeric=(len(header) - 2,))


def _width(layer: Mapping[str, Any]) -> str:
    before, after = layer.get("channels_before"), layer.get("channels_after")
    return str(after) if before == after else f"{before} → {after}"


def _allocation(manifest: Mapping[str, Any]) -> str:
    about, widths = manifest.get("allocation"), _widths(manifest)
    if not about:
        return ""
    rows = [
        [
            layer["name"],
            about["chosen"].get(layer["name"], "given"),
            *(_number(_alone(layer, bits), 1) for bits in widths),
        ]
        for layer in manifest.get("layers", [])
        if layer.get("sensitivity")
    ]
    header = ("layer", "bits", *(f"w{bits} alone (dB)" for bits in widths))
    note = (
        "Signal over noise of the output when the weights of this layer alone are rounded, on "
        f"{about['images']} calibration images. Chosen by dynamic programming over the sum of the "
        "noises." + (" The limit is more than all of them need." if about["all_widest"] else "")
    )
    facts = {
        "limit": about["limit"],
        "average bits of the chosen layers": _number(about["avg_bits"]),
        "SQNR if their effects were independent": _unit(about["predicted_sqnr_db"], "dB"),
    }
    columns = tuple(range(1, 2 + len(widths)))
    return pairs(facts) + table(header, rows, numeric=columns) + f"<p>{escape(note)}</p>"


def _widths(manifest: Mapping[str, Any]) -> list[str]:
    rows = [layer.get("sensitivity") or {} for layer in manifest.get("layers", [])]
    return list(next((row for row in rows if row), {}))


def _alone(layer: Mapping[str, Any], bits: str) -> float | None:
    value: float | None = _get(layer, "sensitivity", bits, "sqnr_db")
    return value


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
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
    return table(header, rows, numeric=(1, 3))


def _command(manifest: Mapping[str, Any]) -> str:
    command = manifest.get("command") or f"dfqc build {_source(manifest)} --recipe recipe.yaml"
    digest = _get(manifest, "model", "sha256") or ABSENT
    return (
        f"<pre>{escape(str(command))}</pre><p>Model sha256 <code>{escape(str(digest))}</code>, "
        f"seed {escape(str(manifest.get('seed', ABSENT)))}. The same input gives the same "
        "<code>model.onnx</code>, byte for byte. <code>dfqc verify</code> checks this package on "
        "another machine.</p>"
    )


def _bar(sqnr: float | None) -> Markup:
    width = 0.0 if sqnr is None else min(max(sqnr / _GOOD_DB, 0.0), 1.0)
    return Markup(f'<div class="bar" style="width:{100 * width:.0f}%"></div>')


def _verdict(passed: bool) -> Markup:
    word = "passed" if passed else "failed"
    return Markup(f'<span class="{word}">{word}</span>')


def _source(manifest: Mapping[str, Any]) -> str:
    return str(_get(manifest, "model", "source") or "model")


def _subtitle(manifest: Mapping[str, Any]) -> str:
    parameters = _get(manifest, "model", "params")
    count = f", {parameters:,} parameters" if parameters else ""
    method = _get(manifest, "calib", "method") or "nothing"
    return f"Made by dfqc {manifest.get('dfqc', '')}, calibrated on {method}{count}"


def _get(values: Mapping[str, Any], *path: str) -> Any:
    current: Any = values
    for name in path:
        current = current.get(name) if isinstance(current, Mapping) else None
    return current


def _ratio(manifest: Mapping[str, Any], above: str, below: str) -> str:
    size = manifest.get("size", {})
    if not size.get(above) or not size.get(below):
        return ABSENT
    return f"{size[above] / size[below]:.2f}×"


def _difference(reference: float | None, value: float) -> str:
    return ABSENT if reference is None else f"{value - reference:+.2f}"


def _number(value: object, digits: int = 2) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ABSENT if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def _unit(value: float | None, unit: str) -> str:
    return ABSENT if value is None else f"{_number(value)} {unit}"
