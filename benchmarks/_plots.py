"""Bars of a speed table: rows in, OUTPUT-ENGINE.svg out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLORS = ("#1b9e77", "#66c2a5", "#a6d854", "#bdbdbd", "#737373")


def write_bars(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Write, per engine, the speed of every network's models over float, one thread, batch 1."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "dfqc"  # equal rows, equal bytes
    from matplotlib import pyplot

    for engine in dict.fromkeys(row["engine"] for row in rows):
        shown = [r for r in rows if (r["engine"], r["threads"], r["batch"]) == (engine, 1, 1)]
        if not shown:
            continue
        timed = (k for r in shown for k, v in r.items() if isinstance(v, dict) and "cpu_ms" in v)
        labels = [k for k in dict.fromkeys(timed) if k != "float"]
        figure, axes = pyplot.subplots(figsize=(2 + 1.2 * len(shown), 4))
        width = 0.8 / len(labels)
        for index, label in enumerate(labels):
            places = [
                number + (index - len(labels) / 2 + 0.5) * width for number in range(len(shown))
            ]
            heights = [
                r["float"]["cpu_ms"] / r[label]["cpu_ms"] if label in r else 0 for r in shown
            ]
            axes.bar(places, heights, width, label=label, color=COLORS[index % len(COLORS)])
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(shown)), [r["net"] for r in shown], rotation=20, ha="right")
        axes.set_ylabel("times float (CPU time)")
        axes.set_title(f"{engine}: one thread, batch 1")
        axes.legend(ncols=len(labels), fontsize="small", frameon=False)
        figure.tight_layout()
        path = output.with_name(f"{output.name}_{engine}.svg")
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
