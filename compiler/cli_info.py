"""The verbs that tell what there is: `targets`, `list` and `doctor`."""

from __future__ import annotations

import typer

from dfqc.compiler import plugins
from dfqc.compiler.output import Json, emit, table


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("targets", help="The engines that can be built for, and their limits.")(targets)
    app.command("list", help="Synthesizers, quantizers and targets, one line each.")(list_plugins)
    app.command("doctor", help="What this machine can do, and what is missing (exit 8).")(doctor)


def targets(json: Json = False) -> None:
    """Print every target with its limits."""
    from dfqc.compiler.doctor import describe_targets

    result = describe_targets()
    rows = [
        (name, _span(t["weight_bits"]), _span(t["act_bits"]), t["runtime"], t["description"])
        for name, t in result.items()
    ]
    emit(
        {"targets": result},
        table(("target", "weight bits", "activation bits", "runtime here", "what it is"), rows),
        as_json=json,
    )


def list_plugins(json: Json = False) -> None:
    """Print every plug-in with the first line of its file."""
    result = {
        kind: {name: plugins.summary(kind, name) for name in plugins.available(kind)}
        for kind in plugins.KINDS
    }
    rows = [(kind, name, text) for kind, found in result.items() for name, text in found.items()]
    emit(result, table(("kind", "name", "what it does"), rows), as_json=json)


def doctor(
    cache_dir: str | None = typer.Option(None, help="The cache folder to look at.", metavar="DIR"),
    json: Json = False,
) -> None:
    """Check the installation."""
    from dfqc.compiler.doctor import describe, examine

    result = examine(cache_dir)
    emit(result, describe(result), as_json=json)
    if result["missing"]:
        raise typer.Exit(8)


def _span(bits: list[int]) -> str:
    return ",".join(map(str, bits))
