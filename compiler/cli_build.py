"""The verbs that start from a model: `build`, `plan` and `synth`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfqc.compiler.choice_text import describe_choice
from dfqc.compiler.flags import with_recipe_flags
from dfqc.compiler.output import Json, emit, only_results_on_stdout, table
from dfqc.compiler.pruning_report import summarize
from dfqc.compiler.units import format_duration, format_size

if TYPE_CHECKING:
    from dfqc.compiler.build import Listener
    from dfqc.compiler.driver import StageRecord

RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="YAML with these flags as keys.")
]
Compare = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="Nearest neighbors among these images of yours."),
]
Explain = Annotated[bool, typer.Option("--explain", help="Say which stages are stored, and why.")]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("build", help="Compile a model into a verified package.")(with_recipe_flags(build))
    app.command("plan", help="What each layer will get, and what it will cost; does no work.")(
        with_recipe_flags(plan)
    )
    app.command("synth", help="Make calibration images only.")(with_recipe_flags(synth))


def build(flags: Mapping[str, Any], recipe: RecipeFile = None, json: Json = False) -> None:
    """Build a package."""
    from dfqc.compiler.build import run_build
    from dfqc.compiler.job import output_folder
    from dfqc.compiler.manifest import verdict
    from dfqc.compiler.recipe import make_recipe

    with only_results_on_stdout():
        manifest = run_build(flags, recipe, make_listener())
    folder = output_folder(make_recipe(flags, recipe))
    emit(manifest, [f"package    {folder}", *_describe_build(manifest)], as_json=json)
    if manifest["exit_code"]:
        # The object on stdout says it too; a second one would be no JSON.
        typer.echo(f"dfqc: the package is written, but {verdict(manifest)}", err=True)
        raise typer.Exit(manifest["exit_code"])


def plan(
    flags: Mapping[str, Any],
    recipe: RecipeFile = None,
    explain: Explain = False,
    json: Json = False,
) -> None:
    """Show a plan."""
    from dfqc.compiler.build import run_plan

    with only_results_on_stdout():
        result = run_plan(flags, recipe, make_listener())
    lines = _describe_plan(result)
    if explain:
        lines += ["", *_describe_stages(result["stages"])]
    emit(result, lines, as_json=json)


def synth(
    flags: Mapping[str, Any],
    recipe: RecipeFile = None,
    compare: Compare = None,
    json: Json = False,
) -> None:
    """Make images."""
    from dfqc.compiler.build import run_synth

    with only_results_on_stdout():
        result = run_synth(flags, recipe, make_listener(), compare=compare)
    lines = [f"{result['file']}: {result['images']} images by {result['method']}"]
    if result["score"] is not None:
        lines.append(
            f"distance to the batch norms' statistics {result['score']:.3f} (0 is a match)"
        )
    lines += [f"warning: {text}" for text in result["quality"]["warnings"]]
    if result["compare"]:
        from dfqc.compiler.privacy import describe

        lines += describe(result["compare"])
        lines.append(f"closest pairs: {result['compare']['pairs']} (shows your images)")
    emit(result, lines, as_json=json)


def make_listener() -> Listener:
    """Return who tells the user what happens."""
    from dfqc.compiler.build import Listener
    from dfqc.compiler.progress import reporter

    return Listener(reporter, _announce)


def _announce(record: StageRecord) -> None:
    what = "stored" if record.cached else format_duration(record.seconds)
    typer.echo(f"  {record.name:<11} {what}", err=True)


def _describe_build(manifest: Mapping[str, Any]) -> list[str]:
    metrics, size, parity = manifest["metrics"], manifest["size"], manifest["parity"]
    top1, latency = metrics["top1"], metrics["latency_ms"]
    ratio = size["float_bytes"] / size["model_bytes"]
    sizes = f"{format_size(size['model_bytes'])}, float {format_size(size['float_bytes'])}"
    lines = [f"size       {sizes} ({ratio:.1f} x smaller)"]
    if pruning := manifest["pruning"]:
        lines.append(f"pruning    {summarize(pruning)}")
    if chosen := manifest["allocation"]:
        lines.append(f"bits       {chosen['avg_bits']:.2f} on average under {chosen['limit']}")
    if manifest["sensitivity"]:
        lines.append(f"sensitive  {_most_sensitive(manifest['layers'])}")
    if kept := describe_choice(manifest["quantization"]):
        lines.append(f"rounding   {kept}")
    if tuned := manifest["autotune"]:
        left = ", ".join(tuned["in_float"]) or "no layer"
        lines.append(f"autotune   {left} in float ({len(tuned['trials'])} engines tried)")
    if top1["images"]:
        built = top1["simulated"] if top1["engine"] is None else top1["engine"]
        lines.append(
            f"top-1      {built:.2f} %, float {top1['float']:.2f} % ({top1['images']} images)"
        )
    shares = ", ".join(
        f"{name} {metrics['agreement'][name]:.2f} %"
        for name in ("simulated", "engine")
        if metrics["agreement"][name] is not None
    )
    images = metrics["agreement"]["images"]
    lines.append(f"as float   {shares} of predictions ({images} held-out synthetic images)")
    if parity["argmax_agreement"] is not None:
        lines.append(
            f"parity     {parity['argmax_agreement']:.2f} % of predictions equal between "
            f"simulation and engine ({parity['images']} images)"
        )
    if latency["engine"] is not None:
        lines.append(
            f"latency    {latency['engine']:.3f} ms, float {latency['float']:.3f} ms "
            f"({latency['speedup']:.2f} x; batch {latency['batch']}, {latency['threads']} threads)"
        )
    if latency["half"] is not None:
        lines.append(
            f"           float in {latency['half_precision']} {latency['half']:.3f} ms "
            f"({latency['half_speedup']:.2f} x of that)"
        )
    if manifest["target_check"] is not None and not manifest["exit_code"]:
        lines += [f"note       {note}" for note in manifest["notes"][:1]]
    return lines + [
        f"gate       {gate['name']}: {'passed' if gate['passed'] else 'FAILED'}"
        for gate in manifest["gates"]
    ]


def _most_sensitive(layers: Sequence[Mapping[str, Any]]) -> str:
    """Name the layers whose weights, rounded alone to their bits, change the output most."""
    alone: dict[str, float] = {}
    for row in layers:
        bits = row["exported"][1:].partition("a")[0]
        found = (row["sensitivity"] or {}).get(bits, {}).get("sqnr_db")
        if found is not None:
            alone[f"{row['name']} (w{bits}, {found:.1f} dB)"] = found
    most = sorted(alone, key=lambda name: alone[name])[:3]
    return "; ".join([", ".join(most), "all in layers.csv"] if most else ["see layers.csv"])


def _describe_plan(result: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            row["name"],
            row["op"],
            _bits(row["asked"]),
            _bits(row["exported"]),
            row["input"] or "float",
            row["reason"],
        )
        for row in result["layers"]
    ]
    lines = table(("layer", "op", "asked", "exported", "input grid", "why"), rows)
    if pruning := result["pruning"]:
        lines = [f"pruning: {summarize(pruning)}", *_describe_groups(pruning), "", *lines]
    if result["chosen_later"]:
        count = len(result["chosen_later"])
        lines.append(
            f"the weight bits of {count} layers will be chosen under {result['weight_limit']}, "
            "once there are images to measure on: until then the table shows those of --bits"
        )
    quantizers = [
        (q["name"], f"{'s' if q['scheme']['signed'] else 'u'}{q['scheme']['bits']}", _feeds(q))
        for q in result["quantizers"]
    ]
    lines += ["", *table(("quantizer", "grid", "feeds"), quantizers)]
    costs = [
        (
            row["stage"],
            "stored" if row["stored"] else format_duration(row["seconds"]),
            format_size(row["peak_bytes"]),
        )
        for row in result["estimate"]
    ]
    lines += ["", *table(("stage", "time", "peak memory"), costs)]
    lines.append(
        f"estimate: {format_duration(result['seconds'])}, peak {format_size(result['peak_bytes'])}"
        " (within a factor of about two)"
    )
    return lines


def _describe_groups(pruning: Mapping[str, Any]) -> list[str]:
    rows = [
        (row["name"], str(row["channels_before"]), str(row["channels_after"]), "")
        for row in pruning["groups"]
    ]
    rows += [(row["name"], "", "", f"left alone: {row['reason']}") for row in pruning["left"]]
    return table(("group", "channels", "kept", "why"), rows) if rows else []


def _describe_stages(stages: list[dict[str, Any]]) -> list[str]:
    rows = [
        (row["name"], row["status"], (row["key"] or "-")[:12], "; ".join(row["reasons"]))
        for row in stages
    ]
    return table(("stage", "store", "key", "why"), rows)


def _feeds(quantizer: Mapping[str, Any]) -> str:
    tied = f" (grid of {quantizer['tied']})" if quantizer["tied"] else ""
    return ", ".join(quantizer["consumers"]) + tied


def _bits(raw: Mapping[str, int]) -> str:
    return f"w{raw['weight']}a{raw['act']}"
