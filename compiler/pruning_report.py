"""What is said of pruning: a finished build in, the manifest's section out; that in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfqc.compiler._html import ABSENT, pairs, table
from dfqc.compiler.storage import load_json

if TYPE_CHECKING:
    from pathlib import Path

    from dfqc.compiler.pipeline import Build

PRUNING, REFIT = "pruning.json", "refit.json"  # files of the stages `prune` and `refit`


def describe_pruning(build: Build) -> dict[str, Any] | None:
    """Return what was removed and what came of it; None: nothing was asked for."""
    about = build.data("prune", PRUNING)["about"]
    if not about:
        return None
    shown = {name: value for name, value in about.items() if name != "layers"}
    if build.job.recipe.quantizer == "udfc" and build.job.recipe.prunes:
        way = build.job.recipe.quantizer_option.get("method", about["restored_by"])
        shown["restored_by"] = f"udfc ({way})"
    return shown | {"refit": build.data("refit", REFIT) or None}


def list_widths(path: Path) -> dict[str, list[int]]:
    """Return the output channels of each layer before and after; empty without pruning."""
    widths: dict[str, list[int]] = load_json(path)["about"].get("layers", {})
    return widths


def summarize(about: Mapping[str, Any]) -> str:
    """Return one line: how much is left, and which way it was restored."""
    groups = [g for g in about["groups"] if g["channels_after"] < g["channels_before"]]
    parts = []
    if groups:
        before, after = (sum(g[f"channels_{when}"] for g in groups) for when in ("before", "after"))
        parts.append(f"{before - after} of {before} channels of {len(groups)} groups removed")
    elif about.get("budget"):
        parts.append("no channel removed: the limits are met without, at less cost")
    if sparsity := about["sparsity"]:
        share = f"{100 * sparsity['fraction']:.0f} % of the weights"
        parts.append(f"{share} of {len(sparsity['layers'])} layers zero ({sparsity['pattern']})")
    if layers := about.get("not_restored"):
        parts.append(f"{len(layers)} layers not restored")
    parts += [
        f"{label} {about[f'{key}_before']:,} -> {about[f'{key}_after']:,}"
        for key, label in (("params", "parameters"), ("macs", "MACs"))
        if about[f"{key}_before"] != about[f"{key}_after"]
    ]
    if refit := about.get("refit"):
        parts.append(f"kept {refit['kept']}")
    return "; ".join(parts)


def pruning_html(manifest: Mapping[str, Any]) -> str:
    """Return the section of the report; empty without pruning."""
    about = manifest.get("pruning")
    if not about:
        return ""
    facts = {
        "parameters": _shrunk(about, "params"),
        "multiply-adds per image": _shrunk(about, "macs"),
        "shared out by": about["method"],
        "channels chosen by": about["criterion"],
        "restored by": about["restored_by"],
        **_describe_gaps(about.get("not_restored")),
        **_describe_refit(about.get("refit")),
        **_describe_sparsity(about["sparsity"]),
        **_describe_outcome(manifest, about),
    }
    rows = [
        [row["name"], row["channels_before"], row["channels_after"], ", ".join(row["layers"])]
        for row in about["groups"]
    ]
    header = ("group", "channels before", "after", "layers")
    body = pairs(facts) + (table(header, rows, numeric=(1, 2)) if rows else "")
    body += _trade_offs(about.get("budget"))
    left = [[row["name"], row["reason"]] for row in about["left"]]
    return body + (table(("left alone", "why"), left) if left else "")


def _trade_offs(budget: Mapping[str, Any] | None) -> str:
    """Return the points that were tried for the limits; those worth having are marked."""
    if not budget:
        return ""
    chosen, limits = budget["chosen"], budget["limits"]
    rows = [
        [
            _mark(point, chosen),
            "yes" if point["front"] else "",
            f"{100 * point['part']:.1f} % of the {point['share']}" if point["share"] else "nothing",
            ABSENT if point["bits"] is None else f"w{point['bits']}",
            ABSENT if point["bytes"] is None else f"{point['bytes']:,}",
            f"{point['params']:,}",
            f"{point['macs']:,}",
            f"{point['distance']:.4g}",
        ]
        for point in sorted(budget["points"], key=lambda p: [p[name] for name in limits])
    ]
    header = ("", "Pareto front", "removed", "weights", "bytes", "parameters", "MACs")
    asked = {f"limit: {name}": f"{limit:,}" for name, limit in limits.items()}
    asked["Pareto front of"] = ", ".join([*limits, "divergence"])
    return pairs(asked) + table((*header, "divergence"), rows, numeric=(2, 4, 5, 6, 7))


def _mark(point: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    if all(point[name] == value for name, value in chosen.items()):
        return "chosen"
    return "" if point["within"] else "beyond"


def _shrunk(about: Mapping[str, Any], key: str) -> str:
    before, after = about[f"{key}_before"], about[f"{key}_after"]
    return f"{before:,} → {after:,} ({100 * after / max(before, 1):.1f} %)"


def _describe_gaps(layers: Sequence[str] | None) -> dict[str, str]:
    """Name the layers that do not make up for what they no longer read."""
    return {"not restored": ", ".join(layers)} if layers else {}


def _describe_refit(refit: Mapping[str, Any] | None) -> dict[str, str]:
    if not refit:
        return {"refit on images": "no"}
    scores = ", ".join(f"{name} {score:.4g}" for name, score in refit["scores"].items())
    return {
        "refit on images": f"kept {refit['kept']} (divergence from the original: {scores}; "
        f"{refit['images']} images)"
    }


def _describe_sparsity(about: Mapping[str, Any] | None) -> dict[str, str]:
    if not about:
        return {}
    share = f"{100 * about['fraction']:.1f} % of the weights of {len(about['layers'])} layers"
    left = "; ".join(f"{row['name']}: {row['reason']}" for row in about["left"])
    return {f"zeros ({about['pattern']})": share, "left dense": left or ABSENT}


def _describe_outcome(manifest: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, str]:
    """Say what pruning alone costs and brings, and how much of the saved work is saved time."""
    metrics = manifest.get("metrics", {})
    found: dict[str, str] = {}
    top1 = (metrics.get("top1") or {}).get("pruned")
    if top1 is not None:
        found["top-1 in float, pruned"] = f"{top1:.2f} %"
    speedup = (metrics.get("latency_ms") or {}).get("pruned_speedup")
    if speedup is not None:
        fewer = about["macs_before"] / max(about["macs_after"], 1)
        found["speed-up in float, pruned"] = (
            f"{speedup:.2f}× for {fewer:.2f}× fewer multiply-adds (ratio {speedup / fewer:.2f})"
        )
    return found
