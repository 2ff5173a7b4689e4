"""Where a benchmark's rows go: rows and their Markdown in, OUTPUT.json and OUTPUT.md out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_results(rows: list[dict[str, Any]], table: str, output: Path | None) -> None:
    """Print the table; with `output`, write it and the rows beside each other."""
    save_results(rows, table, output)
    print("\n" + table)


def save_results(rows: list[dict[str, Any]], table: str, output: Path | None) -> None:
    """Write what there is so far, so that a run that is cut off leaves its rows."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".md").write_text(table, encoding="utf-8")
        text = json.dumps(rows, indent=1)
        output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
