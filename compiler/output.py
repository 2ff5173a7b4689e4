"""What a command prints: a result in, one JSON object or plain lines on stdout out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dfqc.compiler.errors import EnvironmentFault

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@contextlib.contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """Send to stderr what libraries print while they work."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def emit(result: Mapping[str, Any], lines: Iterable[str], *, as_json: bool) -> None:
    """Print the result of a command."""
    if as_json:
        from dfqc.compiler.package import to_json

        typer.echo(to_json(result))
        return
    for line in lines:
        typer.echo(line)


def write_text(path: Path, text: str) -> None:
    """Write a file that was asked for; `EnvironmentFault` where that cannot be done."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: cannot be written ({error.strerror or error}); choose another place"
        ) from error


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lay out rows in columns as wide as their longest cell; the last column is free."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header) - 1)]
    return [
        "  ".join(
            [*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]
        ).rstrip()
        for row in cells
    ]
