"""What is checked of a file whose engine is built elsewhere: lowered model in, verdict out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler.driver import Context
from dfqc.compiler.storage import MODEL, load_json, save_json

if TYPE_CHECKING:
    from dfqc.compiler.verify_package import Golden

CHECK = "check.json"


def check(context: Context) -> dict[str, Any]:
    """Hold the file against the target's rules, and run it where a stand-in for the engine is.

    Empty for a target without rules: its engine is here and is asked itself.
    """
    if not hasattr(context.settings.backend, "check"):
        return {}
    backend, model = context.settings.backend, context.path("lower", MODEL)
    findings = backend.check(model)
    golden: Golden = context.value("golden")
    outputs = backend.rehearse(model, golden.inputs)
    return {
        "errors": sum(row["severity"] == "error" for row in findings),
        "warnings": sum(row["severity"] == "warning" for row in findings),
        "findings": findings,
        "rehearsal": None if outputs is None else _compare(golden, outputs, backend.STAND_IN),
    }


def save_check(value: Mapping[str, Any], folder: Path) -> None:
    """Write the verdict."""
    save_json(dict(value), folder / CHECK)


def load_check(folder: Path) -> Any:
    """Read it."""
    return load_json(folder / CHECK)


def list_broken(checked: Mapping[str, Any] | None, limit: int = 5) -> list[str]:
    """Return a note per broken rule, the first few of them."""
    rows = checked["findings"] if checked else []
    notes = [
        f"Rule {row['rule']} is broken at {row['node']}: {row['message']}; {row['mend']}"
        for row in rows[:limit]
    ]
    return notes + [f"{len(rows) - limit} more broken rules"] * (len(rows) > limit)


def _compare(golden: Golden, outputs: Any, by: str) -> dict[str, Any]:
    """Return how far a stand-in is from the simulation."""
    import numpy as np

    equal = outputs.argmax(1) == golden.outputs.argmax(1)
    return {
        "by": by,
        "images": len(outputs),
        "max_abs": float(np.abs(outputs - golden.outputs).max()),
        "largest_output": float(np.abs(golden.outputs).max()),
        "argmax_agreement": 100 * float(equal.mean()),
    }
