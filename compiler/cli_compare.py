"""The verbs that compare packages: `bench`, on this device, and `diff`; neither needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfqc.compiler.cli_package import Provider
from dfqc.compiler.errors import AccuracyGateError, UsageError
from dfqc.compiler.output import Json, emit, only_results_on_stdout, write_text

Folders = Annotated[list[Path], typer.Argument(metavar="PACKAGE...", help="One or more packages.")]
Before = Annotated[Path, typer.Argument(metavar="BEFORE", help="Package, or its manifest.json.")]
After = Annotated[Path, typer.Argument(metavar="AFTER", help="Package, or its manifest.json.")]
Batches = Annotated[str, typer.Option(metavar="N,N", help="Images per call; several: a sweep.")]
Threads = Annotated[
    str | None, typer.Option(metavar="N,N", help="Threads of the engine; several: a sweep.")
]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("bench", help="Latency of packages, measured side by side.")(bench)
    app.command("diff", help="What changed from one package to another, for pull requests.")(diff)


def bench(
    packages: Folders,
    batch: Batches = "1",
    threads: Threads = None,
    float_model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Float ONNX model to compare with.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", "--eval-data", metavar="PATH", help="Labelled images: adds top-1."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, metavar="N", help="Timed calls per engine.")] = 100,
    provider: Provider = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one line per engine and setting.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with plots.")
    ] = None,
    json: Json = False,
) -> None:
    """Time packages."""
    from dfqc.compiler.bench_sweep import describe_sweep, run_sweep, sweep_csv, sweep_html
    from dfqc.compiler.progress import reporter

    counts = _numbers("--threads", threads) if threads else [None]
    with only_results_on_stdout():
        result = run_sweep(
            packages,
            batches=_numbers("--batch", batch),
            threads=counts,
            float_model=float_model,
            data=data,
            runs=runs,
            provider=provider,
            progress=reporter("bench"),
        )
    for path, text in ((csv, sweep_csv), (html, sweep_html)):
        if path is not None:
            write_text(path, text(result))
    emit(result, describe_sweep(result), as_json=json)


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


def _numbers(flag: str, text: str) -> list[int]:
    """Read `1,8,32`; repeated numbers count once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"{flag}: got {text!r}, expected positive numbers such as 1 or 1,8,32")
    return list(dict.fromkeys(map(int, words)))
