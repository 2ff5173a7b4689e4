"""One table of all measured quantizers: the rows of `reconstruction_*.json` in, a pivot out.

python benchmarks/summary.py benchmarks/results/reconstruction
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reconstruction import METHODS

OTHERS = ("reconstruction_speed",)  # against the published loop
LEGEND = (
    "Drops of top-1 in points, by the simulation; from the tables `reconstruction_*.md`, which "
    "have the commands, agreement, seconds and memory. Ends `w8a8`: 8-bit first and last layer; "
    "`same`: k bits everywhere. Bold: the smallest drop of the line. Empty: not run. Where two "
    "files have a cell, the last by name counts: `*_since_*` were measured anew after a change."
)
BITS = ("w8a8", "w4a8", "w4a4", "w3a3", "w2a4")


def main() -> int:
    """Write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefix", type=Path, help="PREFIX_*.json are read, PREFIX.md is written")
    prefix: Path = parser.parse_args().prefix
    files = sorted(prefix.parent.glob(f"{prefix.name}_*.json"))
    rows = [
        row for file in files if file.stem not in OTHERS for row in json.loads(file.read_text())
    ]
    table = render(rows)
    prefix.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def render(rows: Iterable[dict[str, Any]]) -> str:
    """Return the drops in points, a line per network, images, convention and bits."""
    lines: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        source = f"{row['calibration_images']} {row['calibration']}"
        key = (row["net"], row["images"], source, row["ends"], row["bits"])
        lines.setdefault(key, {})[row["method"]] = row
    methods = [m for m in METHODS if any(m in found for found in lines.values())]
    head = ["net", "float", "test images", "calibration", "ends", "bits", *methods]
    text = [
        "Command: `python benchmarks/summary.py benchmarks/results/reconstruction`",
        "",
        LEGEND,
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
    ]
    order = sorted(lines, key=lambda k: (k[0], k[3], k[2], BITS.index(k[4])))
    for key in order:
        found = lines[key]
        drops = {method: row["float"] - row["top1"] for method, row in found.items()}
        least = min(drops.values())
        cells = [_cell(drops.get(m), least) for m in methods]
        net, images, calibration, ends, bits = key
        exact = next(iter(found.values()))["float"]
        shown = [net, f"{exact:.2f}", str(images), calibration, ends, bits, *cells]
        text.append("| " + " | ".join(shown) + " |")
    return "\n".join(text) + "\n"


def _cell(drop: float | None, least: float) -> str:
    if drop is None:
        return ""
    return f"**{drop:.2f}**" if drop <= least + 1e-9 else f"{drop:.2f}"


if __name__ == "__main__":
    sys.exit(main())
