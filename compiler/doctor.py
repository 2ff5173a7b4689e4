"""What this machine has and can do: versions, runtimes, abilities and the cache folder out."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from dfqc.compiler import machine, plugins
from dfqc.compiler.abilities import list_abilities
from dfqc.compiler.artifact import Store, default_root
from dfqc.compiler.errors import EnvironmentFault
from dfqc.compiler.units import format_size

CORE = ("numpy", "onnx", "onnxruntime", "pydantic", "rich", "typer")
COMPILE = (
    "torch",
    "torchvision",
    "timm",
    "onnxscript",
    "onnx-ir",
    "safetensors",
    "pillow",
    "pyyaml",
)


def examine(cache_dir: str | None = None) -> dict[str, Any]:
    """Return everything `dfqc doctor` says; `missing` lists what makes it exit with 8."""
    core, compiling = machine.versions(*CORE), machine.versions(*COMPILE)
    cache = _examine_cache(Path(cache_dir) if cache_dir else default_root())
    targets = describe_targets()
    missing = [name for name, version in core.items() if version is None]
    if cache["fault"]:
        missing.append("a usable cache folder")
    return {
        "dfqc": machine.version("dfqc"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": {
            "model": machine.cpu_model(),
            "cores": machine.cpu_count(),
            "integer_instructions": list(machine.integer_flags()),
        },
        "memory_bytes": machine.total_memory(),
        "versions": {"core": core, "compile": compiling},
        "targets": {name: t["runtime"] for name, t in targets.items()},
        "abilities": [dataclasses.asdict(a) for a in list_abilities(compiling, targets)],
        "can_build": all(compiling.values()),
        "cache": cache,
        "missing": missing,
    }


def describe_targets() -> dict[str, Any]:
    """Return every target's limits, and its runtime's version or why it cannot be used here."""
    found = {}
    for name in plugins.available("target"):
        backend = plugins.load("target", name)
        usable, detail = backend.available()
        runtime = {"available": usable, "runtime": detail}
        found[name] = dataclasses.asdict(backend.TARGET) | runtime
    return found


def describe(result: dict[str, Any]) -> list[str]:
    """Return the lines that people read."""
    cpu, cache = result["cpu"], result["cache"]
    flags = ", ".join(cpu["integer_instructions"]) or "none known"
    lines = [
        f"dfqc {result['dfqc']}, Python {result['python']}, {result['platform']}",
        f"cpu      {cpu['model']}, {cpu['cores']} cores; integer instructions: {flags}",
        f"memory   {format_size(result['memory_bytes'])}",
    ]
    for group, versions in result["versions"].items():
        shown = ", ".join(f"{name} {version or 'MISSING'}" for name, version in versions.items())
        lines.append(f"{group:<8} {shown}")
    lines.append(
        f"cache    {cache['folder']}: "
        + (cache["fault"] or f"{cache['entries']} entries, {_describe_space(cache)}")
    )
    for able in result["abilities"]:
        lines.append(f"{'yes' if able['available'] else 'no':<8} {able['name']}: {able['detail']}")
        lines += [f"         get it: {able['get']}"] if able["get"] else []
    lines.append(f"missing  {', '.join(result['missing'])}" if result["missing"] else "all well")
    return lines


def _describe_space(cache: dict[str, Any]) -> str:
    return f"{format_size(cache['size_bytes'])}, {format_size(cache['free_bytes'])} free"


def _examine_cache(root: Path) -> dict[str, Any]:
    try:
        store = Store(root)
    except EnvironmentFault as fault:
        return {
            "folder": str(root),
            "fault": str(fault),
            "entries": 0,
            "size_bytes": 0,
            "free_bytes": 0,
        }
    entries = list(store.entries())
    store.release()
    size = sum(artifact.size_bytes for artifact in entries)
    free = shutil.disk_usage(root).free
    about = {"folder": str(root), "fault": None, "entries": len(entries)}
    return about | {"size_bytes": size, "free_bytes": free}
