"""The verb `distill`: a teacher and the name of a student in, a trained student in a file out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dfqc.compiler.cli_build import make_listener
from dfqc.compiler.flags import DEFAULTS, with_recipe_flags
from dfqc.compiler.output import Json, emit, only_results_on_stdout
from dfqc.compiler.units import format_duration

_PANEL = "Student"
# Flags of a build that say something of the teacher, its images or the run.
_FLAGS = (
    *("arch", "pretrained", "unsafe_load", "input_size", "resize", "mean", "std"),
    *("effort", "synth", "synth_option", "zoo", "calib_data", "samples", "eval_data"),
    *("seed", "device", "budget", "memory", "cache_dir"),
)
_DEFAULTS = {  # the other methods make images of their own, and refuse both flags
    "synth": "zeroq, with --method images",
    "samples": "256, 1024, 4096 by --effort, with --method images; of --calib-data all",
}
StudentName = Annotated[
    str,
    typer.Option(
        metavar="ARCH",
        help="timm:NAME, torchvision:NAME or path/to/file.py:factory",
        rich_help_panel=_PANEL,
    ),
]
Method = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="images: a fixed set; dafl: a generator beside the student; mix: judged by a zoo too",
        rich_help_panel=_PANEL,
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="teacher: take over blocks that are alike; random",
        rich_help_panel=_PANEL,
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--distill-option",
        metavar="NAME=VALUE",
        help="an option of the training (repeatable)",
        rich_help_panel=_PANEL,
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="The student, a .pt2.")
]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("distill", help="Train a smaller network to answer as a model does, without data.")(
        with_recipe_flags(distill, _FLAGS, DEFAULTS | _DEFAULTS)
    )


def distill(
    flags: Mapping[str, Any],
    student: StudentName,
    method: Method = "images",
    init: Init = None,
    distill_option: Options = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="YAML with the flags of teacher and images."),
    ] = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Distill."""
    from dfqc.compiler.distill import Wish, run_distill

    wish = Wish(student, method, init, tuple(distill_option or ()), str(output) if output else None)
    with only_results_on_stdout():
        result = run_distill(flags, recipe, wish, make_listener())
    emit(result, _describe(result), as_json=json)
    if result["exit_code"]:
        typer.echo(f"dfqc: the training was stopped: {result['stopped']}", err=True)
        raise typer.Exit(result["exit_code"])


def _describe(result: Mapping[str, Any]) -> list[str]:
    nets = result["teacher"], result["student"]
    steps, agreement, last = result["steps"], result["agreement"], result["curve"][-1]
    sizes = [f"{n['params']:,} parameters, {n['macs'] / 1e6:.1f} M multiply-adds" for n in nets]
    done = f"{steps['done']} of {steps['planned']} steps in {format_duration(last['seconds'])}"
    lines = [
        f"teacher    {sizes[0]}",
        f"student    {sizes[1]}",
        f"training   {done}; {len(result['taken_over'])} blocks from the teacher",
        f"agreement  {agreement['held_out']:.2f} % of {agreement['images']} held-out images",
    ]
    if top1 := result["top1"]:
        lines.append(
            f"top-1      {top1['student']:.2f} %, teacher {top1['teacher']:.2f} % "
            f"({top1['images']} images); they agree on {agreement['evaluation']:.2f} %"
        )
    return [*lines, f"curve      {result['curve_file']}", f"written    {result['file']}"]
