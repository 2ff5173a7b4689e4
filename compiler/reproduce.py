"""A resolved recipe in, the shortest `dfqc build` command that says the same out."""

from __future__ import annotations

import shlex
from typing import Any

from dfqc.compiler.recipe import SAMPLES, Recipe
from dfqc.compiler.spec import default_ends


def build_command(recipe: Recipe) -> str:
    """Return the command, quoted for a POSIX shell; where to write and to cache is left out."""
    bare = Recipe.model_validate({"model": recipe.model})
    ends = str(default_ends(recipe.asked_bits))
    usual = bare.model_copy(update={"samples": SAMPLES[recipe.effort], "ends": ends})
    # Bits and target are what the command is about: they are always said.
    defaults = usual.saved() | {"bits": None, "target": None}
    words = ["dfqc", "build", recipe.model]
    for name, value in recipe.saved().items():
        if name != "model" and value != defaults[name]:
            words += _flag(name, value)
    return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if name in ("mean", "std", "zoo"):
        return [f"--{name}={','.join(map(str, value))}"]  # `=`: a mean may begin with a minus
    if isinstance(value, dict):
        return [word for key, one in value.items() for word in (f"--{name}", f"{key}={_yaml(one)}")]
    if isinstance(value, list):
        return [word for one in value for word in (f"--{name}", str(one))]
    return [f"--{name}", str(value)]


def _yaml(value: Any) -> str:
    """Return an option's value as the command line reads it, which is as YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
