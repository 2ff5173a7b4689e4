"""What a model is, as a sha256: file bytes, or zoo name with versions; importing needs no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path

from dfqc.compiler.errors import EnvironmentFault, LoadError

ZOOS = ("timm", "torchvision")
_BLOCK = 1 << 20


def model_digest(source: str, arch: str | None, pretrained: bool, seed: int) -> str:
    """Return the cache identity of a model: equal digests load equal models.

    Files count by their bytes, zoo names by name and package version; the seed counts only where
    weights are drawn at random. Raises `LoadError` for a missing file.
    """
    identity: list[object] = [_identify_source(source, pretrained)]
    if arch is not None:
        identity.append(_identify_arch(arch))
    if is_zoo(source) and not pretrained:
        identity.append([importlib.metadata.version("torch"), seed])
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise LoadError(
            f"{path}: cannot be read ({error.strerror}); expected a model file "
            "(.pt2, .pt, .pth, .safetensors), timm:NAME or torchvision:NAME"
        ) from error
    return digest.hexdigest()


def is_zoo(text: str) -> bool:
    """Report whether `text` names a zoo model, `timm:NAME` or `torchvision:NAME`."""
    return text.partition(":")[0] in ZOOS and ":" in text


def split_factory(arch: str) -> tuple[Path, str]:
    """Split `path/to/file.py:factory`; raises `LoadError` for anything else."""
    path, sep, factory = arch.rpartition(":")
    if not sep or not path.endswith(".py") or not factory.isidentifier():
        raise LoadError(
            f"--arch {arch!r}: expected timm:NAME, torchvision:NAME or path/to/file.py:factory"
        )
    return Path(path), factory


def _identify_source(source: str, pretrained: bool) -> list[object]:
    if is_zoo(source):
        return [*_identify_zoo(source), pretrained]
    return ["file", file_sha256(Path(source))]


def _identify_arch(arch: str) -> list[object]:
    if is_zoo(arch):
        return _identify_zoo(arch)
    path, factory = split_factory(arch)
    return ["factory", file_sha256(path), factory]


def _identify_zoo(name: str) -> list[object]:
    package = name.partition(":")[0]
    try:
        return [name, importlib.metadata.version(package)]
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentFault(
            f"{name}: {package} is not installed; install it: pip install 'dfqc[compile]'"
        ) from error
