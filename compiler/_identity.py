"""What a model is, as a sha256: file bytes, or zoo name with versions; importing needs no torch."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
from pathlib import Path

from dfqc.compiler.errors import EnvironmentFault, LoadError

ZOOS = ("timm", "torchvision")
_FRAMEWORKS = ("timm", "torch", "torchvision")  # whose layers a factory is built from
_BLOCK = 1 << 20


def model_digest(source: str, arch: str | None, pretrained: bool, seed: int) -> str:
    """Return the cache identity of a model: equal digests load equal models.

    Files count by their bytes, a factory with the modules beside it that it imports, zoo names by
    name and package version; the seed counts only where weights are drawn at random. Raises
    `LoadError` for a missing file.
    """
    identity: list[object] = [_identify_source(source, pretrained)]
    if arch is not None:
        identity.append(_identify_arch(arch))
    if is_zoo(source) and not pretrained:
        identity.append([importlib.metadata.version("torch"), seed])
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def arch_digest(arch: str, seed: int) -> str:
    """Return the cache identity of an architecture with weights drawn at random under `seed`."""
    identity = [_identify_arch(arch), importlib.metadata.version("torch"), seed]
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
    if not path.is_file():
        raise LoadError(
            f"--arch {arch!r}: there is no file {path}; expected a Python file with {factory}(), "
            "which returns the network"
        )
    files, packages = _imports(path)
    # The file's own name does not count, that of a module beside it does: it is imported by name.
    inner = [[name, file_sha256(found)] for name, found in sorted(files.items())]
    versions = [_identify_zoo(name) for name in sorted(packages)]
    return ["factory", file_sha256(path), factory, inner, versions]


def _imports(path: Path) -> tuple[dict[str, Path], set[str]]:
    """Return what a factory file imports, transitively: files of its folder, and frameworks."""
    files: dict[str, Path] = {}
    packages: set[str] = set()
    root, todo = path.resolve().parent, [path.resolve()]
    while todo:
        file = todo.pop()
        for parts in _imported_names(file, root):
            if parts[0] in _FRAMEWORKS:
                packages.add(parts[0])
            for found in _module_files(root, parts):
                name = found.relative_to(root).as_posix()
                if name not in files and found != path.resolve():
                    files[name] = found
                    todo.append(found)
    return files, packages


def _imported_names(file: Path, root: Path) -> list[list[str]]:
    """Return the dotted names that a file imports; of `from a import b` also `a.b`."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []  # loading it says what is wrong
    names: list[list[str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                package = file.relative_to(root).parent.parts
                base = [*package[: len(package) - node.level + 1], *base]
            names += [[*base, *alias.name.split(".")] for alias in node.names]
    return [parts for parts in names if parts]


def _module_files(root: Path, parts: list[str]) -> list[Path]:
    """Return the files that an import of a dotted name runs, packages on the way included."""
    found = []
    for count in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:count])
        found += [place.with_name(f"{place.name}.py"), place / "__init__.py"]
    return [file for file in found if file.is_file()]


def _identify_zoo(name: str) -> list[object]:
    package = name.partition(":")[0]
    try:
        return [name, importlib.metadata.version(package)]
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentFault(
            f"{name}: {package} is not installed; install it: pip install 'dfqc[compile]'"
        ) from error
