"""What a cached result depends on, as data: key fields, the digest of source code, differences.

In: stage options and module names. Out: plain dictionaries whose SHA-256 is the cache key.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from dfqc.compiler import plugins


def code_digest(modules: Iterable[str], alone: Iterable[str] = ()) -> str:
    """SHA-256 of the source of these modules and of everything of ours that they import.

    A changed algorithm thus never meets its old results, and an edit elsewhere costs nothing.
    Modules in `alone` count without what they import.
    """
    seen: set[str] = set()
    pending = list(modules)
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending.extend(_source(module)[1])
    seen.update(module for module in alone if module.startswith("dfqc."))
    joined = "".join(f"{module} {_source(module)[0]}\n" for module in sorted(seen))
    return hashlib.sha256(joined.encode()).hexdigest()


@functools.cache
def _source(module: str) -> tuple[str, tuple[str, ...]]:
    """Return (digest of the module's source, our modules it imports)."""
    path = plugins.find_source(module)
    if path is None:
        raise ModuleNotFoundError(f"{module} has no source file")
    text = path.read_bytes()
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            # `from package import name`: the name may be a module or a thing inside one.
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    ours = sorted(n for n in names if n.startswith("dfqc.") and plugins.find_source(n))
    return hashlib.sha256(text).hexdigest(), tuple(ours)


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one level of dotted names."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say field by field what differs, for example `options.samples: 64 -> 128`."""
    before, after = flatten(old), flatten(new)
    absent = object()
    return [
        f"{name}: {_show(before.get(name, '-'))} -> {_show(after.get(name, '-'))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, absent) != after.get(name, absent)
    ]


def _show(value: object) -> str:
    text = str(value)
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:12] if is_digest else text
