"""Imports point one way: calib and backends to compiler, a runtime only into its own backend."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("compiler", "calib", "backends")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

MAY_IMPORT = {
    "compiler": {"compiler"},  # plug-ins are found by file name, never imported
    "calib": {"compiler", "calib"},
    "backends": {"compiler", "backends"},
}
RUNTIME_HOME = {
    "tensorrt": "backends/_trt_api.py",
    "onnxruntime": "backends/ort.py",
    "openvino": "backends/openvino.py",
}
# What a device without PyTorch imports.
TORCH_FREE = ("cli", "spec", "contracts", "artifact")


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (level, dotted name) of every import, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = f"{node.module}." if node.module else ""
            yield from ((node.level, prefix + alias.name) for alias in node.names)


def faults(source: str, place: str) -> list[str]:
    """List what the file at `place` (relative to the repository) must not import."""
    found = []
    for level, name in imported_names(ast.parse(source)):
        top, _, rest = name.partition(".")
        package = rest.partition(".")[0]
        if level:
            found.append(f"relative import of {name}")
        elif top in FOLDERS:
            found.append(f"{name} instead of dfqc.{name}: loads the module a second time")
        elif top == "dfqc" and package not in MAY_IMPORT[place.partition("/")[0]]:
            found.append(f"{name}: against the direction of imports")
        elif place != RUNTIME_HOME.get(top, place):
            found.append(f"{name}: belongs to {RUNTIME_HOME[top]} alone")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    assert faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("from dfqc.calib import zeroq", "compiler/pipeline.py"),
        ("from dfqc import backends", "compiler/pipeline.py"),
        ("import dfqc.backends.ort", "calib/noise.py"),
        ("from dfqc.calib.noise import synthesize", "backends/ort.py"),
        ("from . import spec", "compiler/pipeline.py"),
        ("from ..compiler.spec import Plan", "calib/noise.py"),
        ("from compiler.spec import Plan", "calib/noise.py"),
        ("import backends", "backends/ort.py"),
        ("def run():\n    import onnxruntime as ort", "compiler/evaluate.py"),
        ("import onnxruntime", "backends/_qdq.py"),
        ("from tensorrt import Builder", "backends/ort.py"),
        ("import openvino.properties", "backends/ort.py"),
    ],
)
def test_a_forbidden_import_is_found(source, place):
    assert len(faults(source, place)) == 1


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("from dfqc.compiler.spec import Plan", "compiler/passes/fold.py"),
        ("from dfqc.calib import _bns\nimport dfqc.compiler.graph", "calib/zeroq.py"),
        ("import numpy, onnx, torch", "backends/_qdq.py"),
        ("import openvino as ov", "backends/openvino.py"),
        ("import onnxruntime", "backends/ort.py"),
    ],
)
def test_an_allowed_import_passes(source, place):
    assert faults(source, place) == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_the_core_does_not_load_torch(module, tmp_path):
    code = f"import sys, dfqc.compiler.{module}; sys.exit('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr or f"dfqc.compiler.{module} imports torch"
