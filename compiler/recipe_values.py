"""How the recipe's values may be written: what a flag or a YAML file gives in, typed values out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from dfqc.compiler.pruning_flags import read_amount, read_sparsity, read_switch


def _split_size(value: Any) -> Any:
    return value.lower().split("x") if isinstance(value, str) else value


def _split_numbers(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


def _split_names(value: Any) -> Any:
    return [v.strip() for v in value.split(",")] if isinstance(value, str) else value


def _as_rules(value: Any) -> Any:
    """Accept `{pattern: bits}` beside the list of `pattern=bits` that the flag gives."""
    return [f"{k}={v}" for k, v in value.items()] if isinstance(value, Mapping) else value


Numbers = Annotated[tuple[float, ...], BeforeValidator(_split_numbers)]
Size = Annotated[tuple[int, int, int], BeforeValidator(_split_size)]
Rules = Annotated[tuple[str, ...], BeforeValidator(_as_rules)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split_names)]
Sparsity = Annotated[str | None, BeforeValidator(read_sparsity)]
Amount = Annotated[float | Literal["auto"] | None, BeforeValidator(read_amount)]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(read_switch)]
