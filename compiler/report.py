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

from dfqc.compiler._html import (
    ABSENT,
    Markup,
    bullets,
    folded,
    lookup,
    number,
    page,
    pairs,
    section,
    size_ratio,
    table,
    with_unit,
)
from dfqc.compiler.pruning_report import pruning_html
from dfqc.compiler.report_charts import (
    layers_chart,
    show_fidelity,
    show_latency,
    show_sizes,
    show_stages,
)
from dfqc.compiler.report_ledger import layer_ms, ledger_html
from dfqc.compiler.target_report import rules_html

if TYPE_CHECKING:
    import numpy as np

LAYER_COLUMNS = (
    *("name", "op", "asked", "exported", "executed", "rounding", "reason", "sqnr_db", "ms"),
)

_TILE = 96  # pixels of the shorter side below which images are enlarged on a contact sheet


def report_html(manifest: Mapping[str, Any], contact_sheet_png: bytes | None = None) -> str:
    """Return the report of one build as a self-contained page."""
    name = _source(manifest).replace("\\", "/").rpartition("/")[2]
    title = f"{name} · {manifest.get('bits', '')} · {manifest.get('target', '')}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">{escape(_subtitle(manifest))}</p>',
        _status(manifest),
        _cards(manifest),
        section("Not measured, not executed", bullets(open_points(manifest))),
        section("Gates", _gates(manifest.get("gates", []))),
        section("Accuracy and fidelity", show_fidelity(manifest)),
        section("Latency", show_latency(manifest)),
        section("Size", show_sizes(manifest)),
        section("Rules of the target", rules_html(manifest.get("target_check"))),
        section("Calibration images", _calibration(manifest, contact_sheet_png)),
        section("Pruning", pruning_html(manifest)),
        section("Layers", layers_chart(manifest.get("layers", []))),
        section("Precision ledger", ledger_html(manifest)),
        section("Weight bits under a limit", _allocation(manifest)),
        section("Sensitivity of the layers", _sensitivity(manifest)),
        section("Layers that are faster in float", _autotuned(manifest)),
        section("Stages", show_stages(manifest.get("stages", []))),
        section("Reproduce", _command(manifest)),
        section(
            "Environment", folded("versions and machine", pairs(manifest.get("environment", {})))
        ),
    ]
    return page(title, parts)


def layers_csv(manifest: Mapping[str, Any]) -> str:
    """Return the precision ledger, one line per layer; `ms` where the engine was profiled."""
    out = io.StringIO()
    layers, widths = manifest.get("layers", []), _widths(manifest)
    times = layer_ms(manifest)
    pruned = ("channels_before", "channels_after") if manifest.get("pruning") else ()
    columns = (*LAYER_COLUMNS, *pruned, *(f"w{bits}_alone_db" for bits in widths))
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for layer in layers:
        alone = {f"w{bits}_alone_db": _alone(layer, bits) for bits in widths}
        writer.writerow({**layer, **alone, "ms": times.get(layer.get("name"))})
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
    if lookup(manifest, "metrics", "top1", "engine") is None:
        points.append(
            "Accuracy: no labelled images were given (--eval-data). Agreement with the float model "
            "on synthetic images is no accuracy."
        )
    if lookup(manifest, "metrics", "latency_ms", "engine") is None:
        points.append("Latency: nothing was timed. `dfqc bench` times the package where it is.")
    if lookup(manifest, "parity", "argmax_agreement") is None:
        points.append("Parity: the engine was not run, so it is not compared to the simulation.")
    unknown = [row["name"] for row in manifest.get("layers", []) if not row.get("executed")]
    if unknown:
        points.append(f"Kernels: what executes {len(unknown)} of the layers is not known.")
    if lookup(manifest, "image", "assumed"):
        points.append("Preprocessing: mean and std were not given; ImageNet's were assumed.")
    return points + [str(note) for note in manifest.get("notes", [])]


def _status(manifest: Mapping[str, Any]) -> str:
    status = manifest.get("status")
    if status not in ("passed", "failed"):
        return ""
    failed = [str(g.get("name")) for g in manifest.get("gates", []) if not g.get("passed")]
    text = status if not failed else f"{status}: {', '.join(failed)}"
    return f'<p class="verdict {status}">{escape(text)}</p>'


def _cards(manifest: Mapping[str, Any]) -> str:
    top1, gates = lookup(manifest, "metrics", "top1") or {}, manifest.get("gates", [])
    passed = sum(bool(gate.get("passed")) for gate in gates)
    cards = [("gates passed", f"{passed} of {len(gates)}" if gates else ABSENT)]
    if top1.get("engine") is not None:
        drop = _difference(top1.get("float"), top1["engine"])
        cards.append(("top-1 of the engine", f"{number(top1['engine'])} % ({drop})"))
    agreement = lookup(manifest, "metrics", "agreement", "engine")
    images = lookup(manifest, "metrics", "agreement", "images") or "the"
    equal = f"predictions equal to float's on {images} synthetic images"
    cards.append((equal, with_unit(agreement, "%")))
    cards.append(("smaller than float", size_ratio(manifest, "float_bytes", "model_bytes")))
    cards.append(
        (
            "times as fast as float",
            with_unit(lookup(manifest, "metrics", "latency_ms", "speedup"), "×"),
        )
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
            _short(gate.get("value")),
            _short(gate.get("limit")),
            _verdict(bool(gate.get("passed"))),
        ]
        for gate in gates
    ]
    return table(("gate", "value", "limit", "verdict"), rows, numeric=(1, 2))


def _short(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"


def _calibration(manifest: Mapping[str, Any], sheet: bytes | None) -> str:
    calib = dict(manifest.get("calib", {}))
    faults, quality = calib.pop("warnings", []), calib.pop("quality", {})
    body = bullets(f"Warning: {fault}" for fault in faults)
    if sheet is not None:
        data = base64.b64encode(sheet).decode()
        body += f'<p><img alt="calibration images" src="data:image/png;base64,{data}"></p>'
    if calib:
        body += pairs(calib) + folded("quality of the images in detail", pairs(quality))
        body += (
            "<p>The score is the mean distance to the statistics of the batch norms: 0 is a match, "
            "real images have 0.1 to 0.2, noise has 0.5 to 1.4.</p>"
        )
    return body


def _autotuned(manifest: Mapping[str, Any]) -> str:
    about = manifest.get("autotune")
    if not about:
        return ""
    rows = [
        [
            trial["what"],
            len(trial["layers"]),
            number(trial["median"], 3),
            number(trial["best"], 3),
            "yes" if trial["kept"] else "no",
        ]
        for trial in about["trials"]
    ]
    header = ("in float", "layers", "times as fast (medians)", "(best calls)", "kept")
    note = (
        f"Engines of batch {about['batch']} on {about['threads']} threads, each timed in turns "
        "with the best before it. For another machine: build there, or name layers with --layer."
    )
    return table(header, rows, numeric=(1, 2, 3)) + f"<p>{escape(note)}</p>"


def _allocation(manifest: Mapping[str, Any]) -> str:
    about = manifest.get("allocation")
    if not about:
        return ""
    rows = {
        layer["name"]: str(about["chosen"].get(layer["name"], "given"))
        for layer in manifest.get("layers", [])
    }
    note = "Chosen by dynamic programming over the sum of the noises."
    if about["all_widest"]:
        note += " The limit is more than all of them need."
    facts = {
        "limit": about["limit"],
        "average bits of the chosen layers": number(about["avg_bits"]),
        "SQNR if their effects were independent": with_unit(about["predicted_sqnr_db"], "dB"),
    }
    return pairs(facts) + _alone_table(manifest, rows, about["images"], note)


def _sensitivity(manifest: Mapping[str, Any]) -> str:
    about = manifest.get("sensitivity")
    if not about or manifest.get("allocation"):
        return ""
    rows = {layer["name"]: layer.get("exported", "") for layer in manifest.get("layers", [])}
    return _alone_table(manifest, rows, about["images"])


def _alone_table(
    manifest: Mapping[str, Any], bits: Mapping[str, str], images: int, more: str = ""
) -> str:
    """What rounding the weights of every layer alone does, beside the bits that the layer has."""
    widths = _widths(manifest)
    rows = [
        [layer["name"], bits[layer["name"]], *(number(_alone(layer, w), 1) for w in widths)]
        for layer in manifest.get("layers", [])
        if layer.get("sensitivity")
    ]
    note = (
        "Signal over noise of the output when the weights of this layer alone are rounded, on "
        f"{images} calibration images. {more}"
    )
    header = ("layer", "bits", *(f"w{width} alone (dB)" for width in widths))
    columns = tuple(range(1, 2 + len(widths)))
    return table(header, rows, numeric=columns) + f"<p>{escape(note.strip())}</p>"


def _widths(manifest: Mapping[str, Any]) -> list[str]:
    rows = [layer.get("sensitivity") or {} for layer in manifest.get("layers", [])]
    return list(next((row for row in rows if row), {}))


def _alone(layer: Mapping[str, Any], bits: str) -> float | None:
    value: float | None = lookup(layer, "sensitivity", bits, "sqnr_db")
    return value


def _command(manifest: Mapping[str, Any]) -> str:
    command = manifest.get("command") or f"dfqc build {_source(manifest)} --recipe recipe.yaml"
    digest = lookup(manifest, "model", "sha256") or ABSENT
    return (
        f"<pre>{escape(str(command))}</pre><p>Model sha256 <code>{escape(str(digest))}</code>, "
        f"seed {escape(str(manifest.get('seed', ABSENT)))}. The same input gives the same "
        "<code>model.onnx</code>, byte for byte. <code>dfqc verify</code> checks this package on "
        "another machine.</p>"
    )


def _verdict(passed: bool) -> Markup:
    word = "passed" if passed else "failed"
    return Markup(f'<span class="{word}">{word}</span>')


def _source(manifest: Mapping[str, Any]) -> str:
    return str(lookup(manifest, "model", "source") or "model")


def _subtitle(manifest: Mapping[str, Any]) -> str:
    parameters = lookup(manifest, "model", "params")
    count = f", {parameters:,} parameters" if parameters else ""
    method = lookup(manifest, "calib", "method") or "nothing"
    return f"Made by dfqc {manifest.get('dfqc', '')}, calibrated on {method}{count}"


def _difference(reference: float | None, value: float) -> str:
    return ABSENT if reference is None else f"{value - reference:+.2f}"
