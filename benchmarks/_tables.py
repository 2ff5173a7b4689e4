"""Where a benchmark's rows go: rows and their Markdown in, OUTPUT.json and OUTPUT.md out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Columns = Sequence[tuple[str, Callable[[dict[str, Any]], str]]]


def write_results(rows: list[dict[str, Any]], table: str, output: Path | None) -> None:
    """Print the table; with `output`, write it and the rows beside each other."""
    save_results(rows, table, output)
    print("\n" + table)


def save_results(rows: list[dict[str, Any]], table: str, output: Path | None) -> None:
    """Write what there is so far, so that a run that is cut off leaves its rows."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name(f"{output.name}.md").write_text(table, encoding="utf-8")
        text = json.dumps(rows, indent=1)
        output.with_name(f"{output.name}.json").write_text(text + "\n", encoding="utf-8")


def table_line(columns: Columns, row: dict[str, Any]) -> str:
    """Return one row of a Markdown table."""
    return "| " + " | ".join(show(row) for _, show in columns) + " |"


def render_table(columns: Columns, rows: list[dict[str, Any]], command: str, legend: str) -> str:
    """Return the Markdown table with the command that made it."""
    head = [
        f"Command: `{command}`",
        "",
        legend,
        "",
        "| " + " | ".join(name for name, _ in columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    return "\n".join([*head, *(table_line(columns, row) for row in rows)]) + "\n"
