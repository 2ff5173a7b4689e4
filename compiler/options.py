"""A plug-in's options: defaults, the effort's preset and what the user gave in, a value out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from dfqc.compiler.errors import UsageError


def plugin_options(plugin: Any, name: str, effort: str, overrides: Mapping[str, Any]) -> Any:
    """Return a plug-in's options: its defaults, the preset of the effort, what the user gave.

    A plug-in whose choices leave options without effect says so in `check_given(options, names)`,
    which is asked about the names of those that the user gave other values than their defaults.

    Raises:
        UsageError: an option that the plug-in does not have, does not read or cannot take.
    """
    options: type[BaseModel] = plugin.Options
    unknown = [key for key in overrides if key not in options.model_fields]
    if unknown:
        known = ", ".join(sorted(options.model_fields))
        raise UsageError(f"{name} has no option {unknown[0]!r}; it has: {known or 'none'}")
    preset = dict(getattr(plugin, "PRESETS", {}).get(effort, {}))
    try:
        chosen = options(**(preset | dict(overrides)))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise UsageError(
            f"{name}: option {where}: got {fault['input']!r}; {fault['msg'].lower()}"
        ) from None
    if hasattr(plugin, "check_given"):
        fields = options.model_fields
        plugin.check_given(
            chosen, [key for key in overrides if getattr(chosen, key) != fields[key].default]
        )
    return chosen
