"""The verb that compares two builds: `diff`; needs neither torch nor an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfqc.compiler.errors import AccuracyGateError, UsageError
from dfqc.compiler.output import Json, emit

Before = Annotated[Path, typer.Argument(metavar="BEFORE", help="Package, or its manifest.json.")]
After = Annotated[Path, typer.Argument(metavar="AFTER", help="Package, or its manifest.json.")]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("diff", help="What changed from one package to another, for pull requests.")(diff)


def diff(
    before: Before,
    after: After,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a comment.")] = False,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, metavar="PTS", help="Fail (5) above this loss of top-1 points."),
    ] = None,
    json: Json = False,
) -> None:
    """Compare two packages."""
    from dfqc.compiler.diff import run_diff
    from dfqc.compiler.diff_text import describe_diff, markdown_diff

    if markdown and json:
        raise UsageError("dfqc diff: --markdown and --json both go to stdout; use one of them")
    result = run_diff(before, after, max_drop=max_drop)
    lines = [markdown_diff(result).rstrip()] if markdown else describe_diff(result)
    emit(result, lines, as_json=json)
    if result["failures"]:
        typer.echo(f"dfqc: {'; '.join(result['failures'])}", err=True)
        raise typer.Exit(AccuracyGateError.exit_code)
