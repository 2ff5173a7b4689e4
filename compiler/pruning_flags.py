"""What a recipe says about pruning: its texts in, numbers out, or why they contradict."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dfqc.compiler.errors import UsageError

if TYPE_CHECKING:
    from dfqc.compiler.recipe import Recipe

# Flags that say how channels are chosen, and mean nothing where none go.
_HOW = ("prune_criterion", "prune_residual", "channel_multiple")
_AMOUNTS = "--prune, --params, --macs or --prune-layer"


def parse_part(text: str) -> tuple[str, float]:
    """Read `GLOB=0.5`: layers, and the part of their output channels to remove."""
    pattern, sep, value = text.rpartition("=")
    try:
        part = float(value)
    except ValueError:
        part = -1.0
    if not sep or not pattern.strip() or not 0 <= part < 1:
        raise UsageError(
            f"--prune-layer: got {text!r}, expected GLOB=PART with a part from 0 to below 1, "
            "for example 'layer3.*=0.5'"
        )
    return pattern.strip(), part


def parse_sparsity(text: str) -> float | tuple[int, int]:
    """Read `2:4` (N of M) or `0.5` (that part of every layer's weights is zero)."""
    if match := re.fullmatch(r"(\d+):(\d+)", text.strip()):
        n, m = int(match[1]), int(match[2])
        if 1 <= n < m:
            return n, m
    else:
        try:
            if 0 < (part := float(text)) < 1:
                return part
        except ValueError:
            pass
    raise UsageError(
        f"--sparsity: got {text!r}, expected N:M with N below M, such as 2:4, or the part of the "
        "weights that becomes zero, such as 0.5"
    )


def read_amount(value: Any) -> Any:
    """Read the part of `--prune`: a number between 0 and 1, or `auto`."""
    if value in (None, "auto"):
        return value
    try:
        part = float(value)
    except (TypeError, ValueError):
        part = -1.0
    if not 0 < part < 1:
        raise UsageError(
            f"--prune: got {value}, expected a part above 0 and below 1, such as 0.3, or, with "
            "--size, --params or --macs, auto"
        )
    return part


def read_sparsity(value: Any) -> Any:
    """Undo what YAML makes of `2:4` without quotes: a number to the base of 60."""
    if isinstance(value, int) and not isinstance(value, bool) and value % 60 in (2, 4, 8, 16, 32):
        return f"{value // 60}:{value % 60}"
    return str(value) if isinstance(value, (int, float)) else value


def read_switch(value: Any) -> Any:
    """Undo what YAML makes of `on` and `off` without quotes."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def check_pruning(recipe: Recipe) -> None:
    """Refuse options of pruning that contradict each other, or that nothing follows from."""
    _check_amounts(recipe)
    if recipe.sparsity is not None:
        parse_sparsity(recipe.sparsity)
    for name in _HOW:
        default = type(recipe).model_fields[name].default
        if getattr(recipe, name) != default and not recipe.prunes:
            raise UsageError(
                f"--{name.replace('_', '-')} says which channels go, and none do; give one of "
                f"{_AMOUNTS}"
            )
    if recipe.restore != "patches" and not recipe.shrinks:
        raise UsageError(
            f"--restore {recipe.restore}: nothing is removed that could be restored; give one of "
            f"{_AMOUNTS}, or --sparsity"
        )
    if recipe.refit == "on" and not recipe.shrinks:
        raise UsageError(
            f"--refit on: fits what pruning left, and nothing is pruned; give one of {_AMOUNTS}, "
            "or --sparsity"
        )
    if recipe.quantizer == "udfc":
        _check_joint(recipe)


def _check_amounts(recipe: Recipe) -> None:
    auto = recipe.prune == "auto"
    given = [f"--{name}" for name in ("prune", "params", "macs") if getattr(recipe, name)]
    if len(given) > 1 and not auto:
        raise UsageError(f"{' and '.join(given)} both say how much is pruned: use one of them")
    if recipe.prune_by == "error" and recipe.prune is None:
        raise UsageError(
            "--prune-by error shares the channels of --prune out over the layers: give --prune "
            "(--params and --macs are always shared out so)"
        )
    if auto and not (recipe.size or recipe.params or recipe.macs):
        raise UsageError(
            "--prune auto: removes what limits ask for, and there is none: give --size, --params "
            "or --macs, or the part to remove, such as --prune 0.3"
        )
    if auto and recipe.prune_layer:
        raise UsageError(
            "--prune auto and --prune-layer both say how much is pruned: use one of them"
        )
    for text in recipe.prune_layer:
        parse_part(text)


def _check_joint(recipe: Recipe) -> None:
    """Refuse what the joint closed form would undo: it starts from the original itself."""
    if recipe.equalize != "none":
        raise UsageError(
            f"--quantizer udfc restores the original by its batch norms, and --equalize "
            f"{recipe.equalize} changes it: leave --equalize out, or use another quantizer"
        )
    if recipe.refit == "on":
        raise UsageError(
            "--refit on: --quantizer udfc restores the weights from the original itself and "
            "would not use what was fitted: leave --refit out, or use another quantizer"
        )
    if recipe.sparsity is not None and recipe.prunes:
        raise UsageError(
            "--sparsity: --quantizer udfc restores pruned channels and would fill the zeros "
            "again: prune or make sparse, not both, or use another quantizer"
        )
    fixed = recipe.quantizer_option.get("mean_fix", recipe.restore != "none")
    if fixed and recipe.bias_correction in ("analytic", "blend", "variance"):
        raise UsageError(
            f"--bias-correction {recipe.bias_correction}: --quantizer udfc has put the mean back "
            "by the batch norms already, and it would count twice: give auto, empirical or none"
        )
