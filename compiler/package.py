"""The package folder: a manifest and its files in, one folder that is whole or absent out.

Every file is listed with its SHA-256, in `manifest.json` for programs and in `SHA256SUMS` for
`sha256sum -c`. Reading it needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqc.compiler.artifact import hash_file
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import EnvironmentFault, LoadError, UsageError

SCHEMA = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
MODEL = "model.onnx"
FLOAT_MODEL = "float.onnx"
GOLDEN = "golden.npz"

_REQUIRED = ("dfqc", "target", "image", "files")


@dataclass(frozen=True)
class Package:
    """An opened package: its manifest, and where its files are."""

    folder: Path
    manifest: Mapping[str, Any]
    image: ImageSpec

    @property
    def target(self) -> str:
        """Name of the back end that runs it."""
        return str(self.manifest["target"])

    @property
    def name(self) -> str:
        """Name of the folder, for tables."""
        return self.folder.resolve().name

    @property
    def engine(self) -> Path:
        """The file that the target's runner opens."""
        return self.folder / str(self.manifest.get("engine", MODEL))

    @property
    def float_model(self) -> Path | None:
        """The unquantized model, where the package brings it."""
        path = self.folder / FLOAT_MODEL
        return path if path.is_file() else None


def write_package(
    folder: Path, manifest: Mapping[str, Any], contents: Mapping[str, Path | bytes]
) -> dict[str, Any]:
    """Write a package and return its final manifest, `files` filled in.

    It is written beside `folder` and renamed, so that nobody sees a half-written package; an
    earlier package at `folder` is replaced. Equal contents are stored once (hard links).

    Args:
        folder: where the package goes; its parent need not exist.
        manifest: everything but `files`; numbers that are not finite become null.
        contents: relative path -> file to copy, or bytes.

    Raises:
        UsageError: `folder` holds something that is no package; it is left alone.
        EnvironmentFault: the folder cannot be written.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 (a link at the end must stay a link)
    _check_replaceable(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed here
        partial.mkdir(parents=True)
        files = _write_contents(partial, contents)
        complete = {**manifest, "files": files}
        (partial / MANIFEST).write_text(to_json(complete) + "\n", encoding="utf-8")
        sums = {name: entry["sha256"] for name, entry in files.items()}
        sums[MANIFEST] = hash_file(partial / MANIFEST)
        lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
        (partial / SUMS).write_text("".join(lines), encoding="utf-8")
        _move_into_place(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise EnvironmentFault(
            f"{folder}: the package cannot be written ({error.strerror or error}); "
            "expected a writable folder with enough space: choose another with -o"
        ) from error
    return complete


def open_package(folder: Path) -> Package:
    """Read the manifest of a package; `LoadError` if the folder is none, or of another schema."""
    if folder.is_file():
        raise LoadError(f"{folder}: this is a file, expected the folder that `dfqc build` wrote")
    manifest = read_manifest(folder)
    package = Package(folder, manifest, _image_spec(folder / MANIFEST, manifest["image"]))
    if not package.engine.is_file():
        raise LoadError(f"{package.engine}: missing from the package; copy or build it again")
    return package


def read_manifest(place: Path) -> dict[str, Any]:
    """Read the manifest of a package, or a `manifest.json` without its package."""
    path = place if place.is_file() else place / MANIFEST
    if not path.is_file():
        raise LoadError(f"{place}: this is no package, it has no {MANIFEST}; see `dfqc build -o`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{path}: this is no JSON ({error}); copy the package again") from error
    _check_manifest(path, manifest)
    return dict(manifest)


def to_json(value: object) -> str:
    """Return readable, strict JSON; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def file_faults(package: Package) -> list[str]:
    """Compare the files with both lists of checksums; an empty list means: all as written."""
    try:
        sums = _read_sums(package.folder / SUMS)
    except (OSError, ValueError) as error:
        return [f"{SUMS}: cannot be read ({error})"]
    listed = {name: entry["sha256"] for name, entry in package.manifest["files"].items()}
    faults = [
        f"{name}: {MANIFEST} and {SUMS} disagree"
        for name in sorted(listed.keys() | sums.keys() - {MANIFEST})
        if listed.get(name) != sums.get(name)
    ]
    for name, digest in sorted(sums.items()):
        path = package.folder / name
        if not path.is_file():
            faults.append(f"{name}: missing")
        elif hash_file(path) != digest:
            faults.append(f"{name}: changed since it was written")
    return faults


def _write_contents(root: Path, contents: Mapping[str, Path | bytes]) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = {}
    written: dict[str, Path] = {}
    for name, content in sorted(contents.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hash_file(content) if isinstance(content, Path) else _digest(content)
        if digest in written:
            _link(written[digest], path)
        elif isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_bytes(content)
        written.setdefault(digest, path)
        files[name] = {"sha256": digest, "bytes": path.stat().st_size}
    return files


def _link(existing: Path, path: Path) -> None:
    """Store a second copy as a hard link, or as a copy where the file system has no links."""
    try:
        path.hardlink_to(existing)
    except OSError:
        shutil.copyfile(existing, path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_replaceable(folder: Path) -> None:
    if not folder.exists() or (folder / MANIFEST).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UsageError(
            f"{folder}: exists and is no package, so it is not overwritten; "
            "expected a new or empty folder, or an earlier package: choose another with -o"
        )


def _move_into_place(partial: Path, folder: Path) -> None:
    previous = folder.with_name(f".{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def _check_manifest(path: Path, manifest: object) -> None:
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise LoadError(
            f"{path}: manifest schema {schema!r} is unknown, this dfqc reads schema {SCHEMA}; "
            "use the version of dfqc that wrote it"
        )
    assert isinstance(manifest, dict)
    missing = [name for name in _REQUIRED if name not in manifest]
    if missing:
        raise LoadError(f"{path}: the manifest lacks {', '.join(missing)}; build the package again")


def _image_spec(path: Path, raw: Mapping[str, Any]) -> ImageSpec:
    try:
        channels, height, width = (int(v) for v in raw["size"])
        return ImageSpec(
            (channels, height, width),
            tuple(float(v) for v in raw["mean"]),
            tuple(float(v) for v in raw["std"]),
            raw.get("resize"),
            bool(raw.get("assumed", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(
            f"{path}: `image` must have size [c, h, w], mean and std, got {raw!r}"
        ) from error


def _read_sums(path: Path) -> dict[str, str]:
    sums = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            raise ValueError(f"line {line!r} is no checksum")
        sums[name] = digest
    return sums


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
