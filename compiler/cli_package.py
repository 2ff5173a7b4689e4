"""The verbs on one package: `eval`, `verify`, `report`, `engine`, `inspect`; none needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfqc.compiler.errors import ParityGateError, SpeedGateError
from dfqc.compiler.output import Json, emit, only_results_on_stdout, write_text

Folder = Annotated[Path, typer.Argument(metavar="PACKAGE", help="Folder that `dfqc build` wrote.")]
Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads of the engine.")]
Provider = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of target ort: cpu (default), cuda, tensorrt.")
]
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="Images per call.")]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("eval", help="Top-1 of a package on labelled images.")(evaluate)
    app.command("verify", help="Is a package whole, and does it compute here what it must?")(verify)
    app.command("report", help="Write the report of a package or manifest as a page.")(report)
    app.command("engine", help="Build a package's engine on the device that will run it.")(engine)
    app.command("inspect", help="What is in a package or an ONNX file.")(inspect)


def evaluate(
    package: Folder,
    data: Annotated[
        Path,
        typer.Option(
            "--data", "--eval-data", metavar="PATH", help=".npz, ImageFolder or labels.csv folder."
        ),
    ],
    batch: Batch = 64,
    threads: Threads = None,
    provider: Provider = None,
    json: Json = False,
) -> None:
    """Evaluate a package."""
    from dfqc.compiler.evaluate import describe_eval, run_eval
    from dfqc.compiler.progress import reporter

    with only_results_on_stdout():
        result = run_eval(
            *(package, data),
            batch=batch,
            threads=threads,
            provider=provider,
            progress=reporter("eval"),
        )
    emit(result, describe_eval(result), as_json=json)


def verify(
    package: Folder, threads: Threads = None, provider: Provider = None, json: Json = False
) -> None:
    """Check a package."""
    from dfqc.compiler.verify_package import describe_verify, run_verify

    with only_results_on_stdout():
        result = run_verify(package, threads=threads, provider=provider)
    emit(result, describe_verify(result), as_json=json)
    if result["failures"]:  # the object on stdout names them; a second one would be no JSON
        typer.echo(f"dfqc: {'; '.join(result['failures'])}", err=True)
        raise typer.Exit(ParityGateError.exit_code)


def report(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="Or its manifest.json.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Page to write.")
    ] = Path("report.html"),
    json: Json = False,
) -> None:
    """Write the report of a package again."""
    from dfqc.compiler.package import read_manifest
    from dfqc.compiler.report import report_html

    manifest = read_manifest(package)
    sheet = package / "calib" / "contact_sheet.png"
    text = report_html(manifest, sheet.read_bytes() if sheet.is_file() else None)
    write_text(output, text)
    emit({"report": str(output)}, [f"{output}: open it in a browser"], as_json=json)


def engine(
    package: Folder,
    batch: Annotated[
        str, typer.Option(metavar="N,N", help="Batches to tune for, for example 1,8,32.")
    ] = "1",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Runs on later versions too, slower.")
    ] = False,
    hardware: Annotated[
        str, typer.Option(metavar="NAME", help="Other GPUs: none, ampere-plus, same-compute.")
    ] = "none",
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, metavar="0-5", help="How long to search.")
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(metavar="4g", help="Device memory that kernels may use.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where measured kernels are kept.")
    ] = None,
    controls: Annotated[
        bool, typer.Option(help="Time the float model in float32 and float16 beside it.")
    ] = True,
    json: Json = False,
) -> None:
    """Finish a package."""
    from dfqc.compiler.finish import describe_engine, is_too_slow, read_options, run_engine
    from dfqc.compiler.progress import reporter

    options = read_options(
        batch,
        hardware=hardware,
        version_compatible=version_compatible,
        level=optimization_level,
        workspace=workspace,
        cache_dir=cache_dir,
        controls=controls,
    )
    with only_results_on_stdout():
        result = run_engine(package, options, reporter("engine"))
    emit(result, describe_engine(result), as_json=json)
    failed = [gate["name"] for gate in result.get("gates", ()) if not gate["passed"]]
    if result.get("build") and "parity" in failed:
        typer.echo("dfqc: the engine is built, and computes something else (parity)", err=True)
        raise typer.Exit(ParityGateError.exit_code)
    if result.get("build") and is_too_slow(result.get("gates", ())):
        typer.echo("dfqc: the engine is built, and too slow (gate min_speedup)", err=True)
        raise typer.Exit(SpeedGateError.exit_code)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Package folder or ONNX file.")],
    json: Json = False,
) -> None:
    """Describe a package."""
    from dfqc.compiler.inspection import describe_inspect, run_inspect

    result = run_inspect(path)
    emit(result, describe_inspect(result), as_json=json)
