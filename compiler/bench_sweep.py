"""Packages over batch sizes and threads: folders and settings in, one comparison of all out."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dfqc.compiler import bench
from dfqc.compiler._html import page, section, table
from dfqc.compiler._svg import Bar, bar_chart, line_chart
from dfqc.compiler.contracts import Progress, silent
from dfqc.compiler.units import format_size

COLUMNS = (
    *("engine", "target", "batch", "threads", "p50_ms", "p90_ms", "p99_ms", "mean_ms", "best_ms"),
    *("runs", "images_per_second", "speedup", "speedup_best", "load_ms", "peak_rss_bytes"),
    *("engine_bytes", "model_bytes", "joules_per_image", "top1", "model", "provider"),
)

_TRUST = (
    "Engines took turns inside of each setting: its ratios can be trusted, the figures of a "
    "machine with other work cannot."
)


def run_sweep(
    folders: Sequence[Path],
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int | None] = (None,),
    float_model: Path | None = None,
    data: Path | None = None,
    runs: int = bench.RUNS,
    seconds: float = bench.SECONDS,
    provider: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare packages at every pair of batch size and threads.

    The result is that of `run_bench` at the first pair, and `settings` has all of them. Engines
    take turns inside of a pair: compare figures of one pair by their ratios.
    """
    pairs = [(batch, count) for count in threads for batch in batches]
    settings: list[dict[str, Any]] = []
    for index, (batch, count) in enumerate(pairs):
        progress(index, len(pairs), f"batch {batch}")
        settings.append(
            bench.run_bench(
                folders,
                batch=batch,
                threads=count,
                float_model=float_model,
                data=data if index == 0 else None,  # right answers do not depend on the batch
                runs=runs,
                seconds=seconds / len(pairs),
                provider=provider,
            )
        )
        progress(index + 1, len(pairs), f"batch {batch}")
    top1 = {row["name"]: row["top1"] for row in settings[0]["engines"]}
    for setting in settings[1:]:
        for row in setting["engines"]:
            row["top1"] = top1[row["name"]]
    return settings[0] | {"settings": settings}


def describe_sweep(result: Mapping[str, Any]) -> list[str]:
    """Return the lines that `dfqc bench` shows."""
    lines: list[str] = []
    for setting in result["settings"]:
        lines += ["", *bench.describe_bench(setting)]
    return [*lines[1:], f"energy: {result['energy']}"]


def sweep_csv(result: Mapping[str, Any]) -> str:
    """Return one line per engine and setting."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for setting in result["settings"]:
        for row in setting["engines"]:
            latency = row["latency_ms"]
            values = {name: row.get(name, latency.get(name)) for name in COLUMNS}
            values |= {
                "engine": row["name"],
                "p50_ms": latency["median_ms"],
                "speedup": row["speedup"]["median"],
                "speedup_best": row["speedup"]["best"],
                "top1": row["top1"]["percent"] if row["top1"] else None,
            }
            writer.writerow(values)
    return out.getvalue()


def sweep_html(result: Mapping[str, Any]) -> str:
    """Return a page with the plots; it loads nothing from elsewhere."""
    names = [row["name"] for row in result["engines"]]
    colors = {name: index for index, name in enumerate(names)}
    first = result["settings"][0]
    machine = f"{result['cpu']}, images of {'×'.join(map(str, result['input']))}"
    parts = [
        f"<h1>{len(names)} engines on one machine</h1>",
        f'<p class="sub">{escape(machine)}</p>',
        section("Throughput", _throughput(result)),
        *(
            section(
                f"Latency at batch {setting['batch']}, {_threads(setting)}",
                _latency(setting, colors),
            )
            for setting in result["settings"]
        ),
        section("Size, memory, accuracy", _static(first)),
        section("All figures", _all(result)),
        f'<p class="sub">{_TRUST} Energy: {escape(result["energy"])}.</p>',
    ]
    return page("dfqc bench", parts)


def _throughput(result: Mapping[str, Any]) -> str:
    if len({setting["batch"] for setting in result["settings"]}) < 2:
        return ""
    many = len({setting["threads"] for setting in result["settings"]}) > 1
    series: dict[str, list[tuple[float, float]]] = {}
    for setting in result["settings"]:
        for row in setting["engines"]:
            name = f"{row['name']}, {_threads(setting)}" if many else row["name"]
            series.setdefault(name, []).append((setting["batch"], row["images_per_second"]))
    return line_chart("throughput over batch size", series, x="batch size", y="images per second")


def _threads(setting: Mapping[str, Any]) -> str:
    return f"{setting['threads']} thread{'s' if setting['threads'] > 1 else ''}"


def _latency(setting: Mapping[str, Any], colors: Mapping[str, int]) -> str:
    bars = []
    for row in setting["engines"]:
        latency = row["latency_ms"]
        text = f"{latency['median_ms']:.3g} ms, {row['speedup']['median']:.2f}×"
        bars.append(
            Bar(row["name"], latency["median_ms"], text, latency["p99_ms"], colors[row["name"]])
        )
    note = '<p class="sub">Medians; the whisker goes towards the 99th percentile.</p>'
    return bar_chart("median latency", bars) + note


def _static(setting: Mapping[str, Any]) -> str:
    rows = [
        [
            row["name"],
            format_size(row["model_bytes"]),
            format_size(row["engine_bytes"]),
            f"{row['load_ms']:.1f}",
            f"{row['top1']['percent']:.2f} ± {1.96 * row['top1']['standard_error']:.2f}"
            if row["top1"]
            else None,
        ]
        for row in setting["engines"]
    ]
    header = ("engine", "file", "memory", "load (ms)", "top-1 (%, 95 %)")
    return table(header, rows, numeric=(1, 2, 3, 4))


def _all(result: Mapping[str, Any]) -> str:
    rows = []
    for setting in result["settings"]:
        for row in setting["engines"]:
            latency = row["latency_ms"]
            times = [f"{latency[name]:.3f}" for name in ("median_ms", "p90_ms", "p99_ms")]
            joules = row["joules_per_image"]
            rows.append(
                [
                    *(row["name"], setting["batch"], setting["threads"], *times),
                    f"{row['images_per_second']:.1f}",
                    f"{row['speedup']['median']:.2f}",
                    None if joules is None else f"{joules:.4g}",
                ]
            )
    header = ("engine", "batch", "threads", "p50 (ms)", "p90", "p99", "images/s", "×", "J/image")
    return table(header, rows, numeric=tuple(range(1, 9)))
