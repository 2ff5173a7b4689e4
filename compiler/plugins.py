"""Find and load plug-ins by file name: one file in a plug-in package is one plug-in.

In: a kind and a name, for example ("synthesizer", "zeroq"). Out: the module, or the known names.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from typing import Any

from dfqc.compiler.errors import UsageError

# kind -> (package, the attribute every plug-in of that kind has)
KINDS = {
    "synthesizer": ("dfqc.calib", "synthesize"),
    "quantizer": ("dfqc.compiler.quantize", "quantize"),
    "target": ("dfqc.backends", "TARGET"),
}


@functools.cache
def available(kind: str) -> tuple[str, ...]:
    """Names of all plug-ins of a kind; a leading underscore marks a shared helper.

    Only targets are opened to tell them apart from other backends: they import no runtime.
    """
    package, attribute = KINDS[kind]
    folder = importlib.import_module(package).__path__
    files = sorted(m.name for m in pkgutil.iter_modules(folder) if not m.name.startswith("_"))
    names = [name.replace("_", "-") for name in files]
    if kind != "target":
        return tuple(names)
    return tuple(n for n in names if hasattr(importlib.import_module(f"{package}.{n}"), attribute))


def load(kind: str, name: str) -> Any:
    """Return the plug-in module; an unknown name is answered with the names there are."""
    check_name(kind, name)
    attribute = KINDS[kind][1]
    module = importlib.import_module(module_name(kind, name))
    if not hasattr(module, attribute):
        raise TypeError(f"{module.__name__} is no {kind}: it has no `{attribute}`")
    return module


def module_name(kind: str, name: str) -> str:
    """Return the full name of a plug-in's module: `genie-m` lives in `genie_m.py`."""
    return f"{KINDS[kind][0]}.{name.replace('-', '_')}"


def check_name(kind: str, name: str) -> None:
    """Refuse a name that is no plug-in of that kind, without loading it (exit 2)."""
    names = available(kind)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"unknown {kind} {name!r}: {hint}expected one of {', '.join(names) or 'none'}")


def summary(kind: str, name: str) -> str:
    """First line of a plug-in's docstring, read from its source: loading it may load torch."""
    source = find_source(module_name(kind, name))
    text = source.read_text(encoding="utf-8") if source else ""
    return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]


@functools.cache
def constant(kind: str, name: str, attribute: str) -> Any:
    """Return a constant of a plug-in, read from its source: loading it may load torch.

    None where it is not assigned at the top of the file, as a literal.
    """
    source = find_source(module_name(kind, name))
    tree = ast.parse(source.read_text(encoding="utf-8") if source else "")
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == attribute for target in node.targets
        ):
            return ast.literal_eval(node.value)
    return None


def find_source(module: str) -> Path | None:
    """Path of the source of one of our modules, found without importing it; None if there is none.

    (`importlib.util.find_spec` imports the parent, which may be a module that loads torch.)
    """
    _, top, *rest = module.split(".")
    spec = importlib.util.find_spec(f"dfqc.{top}")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]).joinpath(*rest)
    candidates = (path / "__init__.py", path.parent / f"{path.name}.py")
    return next((c for c in candidates if c.is_file()), None)
