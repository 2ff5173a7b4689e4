"""A model file in, its kind out; and proof that reading a .pt2 archive will execute nothing.

`torch.export.load` unpickles some members without restriction and evaluates size expressions as
Python. Every such member is checked first: pickles must pass torch's own restricted unpickler,
expressions must consist of known names only.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dfqc.compiler.errors import LoadError

EXPORT, TORCHSCRIPT, TORCH, SAFETENSORS = "export", "torchscript", "torch", "safetensors"

PREPROCESSING = "preprocessing.json"  # an extra file: how the model's images are prepared

_SYMBOL = re.compile(r"'[a-z]+\d*'")
_NAME = re.compile(r"[^\W\d]\w*")
_ALLOWED_CHARACTERS = re.compile(r"[\w\s(),=+\-*/<>.~&|]*")
_EXPRESSION_NAMES = frozenset(
    {
        *("Symbol", "Integer", "Float", "Rational", "Half", "One", "Zero", "NegativeOne"),
        *("positive", "nonnegative", "nonzero", "integer", "real", "precision"),
        *("Add", "Mul", "Pow", "Mod", "Abs", "Max", "Min", "oo", "int_oo"),
        *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Piecewise"),
        *("Equality", "Unequality", "LessThan", "StrictLessThan"),
        *("GreaterThan", "StrictGreaterThan", "True", "False", "true", "false"),
        # torch.utils._sympy.functions
        *("FloorDiv", "CeilDiv", "CleanDiv", "IntTrueDiv", "FloatTrueDiv", "ModularIndexing"),
        *("PythonMod", "Where", "PowByNatural", "FloatPow", "ToFloat", "RoundToInt"),
        *("CeilToInt", "FloorToInt", "TruncToInt", "TruncToFloat", "RoundDecimal", "Identity"),
    }
)


def sniff(path: Path) -> str:
    """Tell `export`, `torchscript`, `torch` (pickled) and `safetensors` apart by content.

    Raises `LoadError` if the file is missing, empty, truncated or none of these.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
        size = path.stat().st_size
    except OSError as error:
        raise LoadError(
            f"{path}: cannot be read ({error.strerror}); expected a model file "
            "(.pt2, .pt, .pth, .safetensors), timm:NAME or torchvision:NAME"
        ) from error
    if head.startswith(b"PK"):
        return _sniff_zip(path)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return SAFETENSORS
    if head.startswith(b"\x80"):
        return TORCH
    what = "is empty" if not size else "is no model file, or is damaged"
    raise LoadError(
        f"{path}: {what}; expected what torch.export.save, torch.save or safetensors writes"
    )


def check_archive(path: Path) -> None:
    """Raise `LoadError` if reading this .pt2 archive could execute code that is stored in it."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) != len(names):
            raise _unsafe(path, "two members have the same name")
        for name in names:
            if "/aotinductor/" in name or "custom_obj" in name or "opaque_obj" in name:
                raise _unsafe(path, f"{name} holds compiled code or a pickled object")
            if name.endswith(".pt"):
                _check_pickle(path, name, archive.read(name))
            elif name.endswith(".json"):
                _check_json(path, name, archive)


def read_preprocessing(path: Path) -> dict[str, Any]:
    """Return what a .pt2 archive says of its images (`ImageSpec` as data); empty if nothing."""
    with zipfile.ZipFile(path) as archive:
        inside = [n for n in archive.namelist() if n.endswith(f"/extra/{PREPROCESSING}")]
        if not inside:
            return {}
        try:
            facts = json.loads(archive.read(inside[0]))
            values = [*facts["mean"], *facts["std"], facts["resize"] or 1]
            if not all(isinstance(value, int | float) for value in values):
                raise TypeError("numbers expected")
        except (ValueError, KeyError, TypeError) as error:
            raise LoadError(
                f"{path}: {PREPROCESSING} is damaged ({error}); make the file again, or give "
                "--mean, --std and --resize with a plain export"
            ) from error
    return dict(facts)


def _sniff_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise LoadError(
            f"{path}: is truncated or damaged ({error}); expected a complete archive: copy it again"
        ) from error
    if any(n.startswith("models/") or n == "serialized_exported_program.json" for n in names):
        return EXPORT
    if "constants.pkl" in names and any(n.startswith("code/") for n in names):
        return TORCHSCRIPT
    if "data.pkl" in names:
        return TORCH
    raise LoadError(f"{path}: is a zip file without a model; expected a .pt2 or .pt archive")


def _check_json(path: Path, name: str, archive: zipfile.ZipFile) -> None:
    try:
        content = json.loads(archive.read(name))
    except ValueError as error:
        raise LoadError(f"{path}: {name} is damaged ({error}); export the model again") from error
    folder = name.rpartition("/")[0]
    for item in _objects(content):
        expression = item.get("expr_str")
        if expression is not None and not is_plain_expression(expression):
            raise _unsafe(path, f"{name} holds the expression {expression!r}")
        if item.get("use_pickle"):
            member = f"{folder}/{item.get('path_name')}"
            _check_pickle(path, member, archive.read(member))


def is_plain_expression(text: Any) -> bool:
    """Report whether `text` is arithmetic on size symbols: safe to give to sympy, which evals."""
    if not isinstance(text, str) or "__" in text or re.search(r"\.\s*[^\W\d]", text):
        return False  # no attribute is ever needed
    bare = _SYMBOL.sub("s", text)
    names = set(_NAME.findall(bare))
    known = all(n in _EXPRESSION_NAMES or re.fullmatch(r"[suzf]\d*", n) for n in names)
    return known and _ALLOWED_CHARACTERS.fullmatch(bare) is not None


def _check_pickle(path: Path, name: str, content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:
        raise _unsafe(path, f"{name} is a pickle that needs code") from error


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every JSON object inside `value`."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner)


def _unsafe(path: Path, what: str) -> LoadError:
    return LoadError(
        f"{path}: {what}; reading it could run code stored in the file, so nothing was read. "
        "If you trust where it comes from, pass --unsafe-load; else export the model again with "
        "torch.export.save, or pass its state_dict with --arch"
    )
