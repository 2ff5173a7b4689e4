"""The forms in which images lie on disk: a path in, raw images by index and their labels out.

`dataset.py` preprocesses what is read here. Imports no torch, and Pillow only to open image files.
"""

from __future__ import annotations

import csv
import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dfqc.compiler import _calibfile
from dfqc.compiler.errors import EnvironmentFault, LoadError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8] | NDArray[np.float32]  # (h, w, c), 0..255
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
UNLABELED = -1
_SPLITS = {"test", "train", "val", "valid", "validation"}
_CHUNK = 1 << 20


class ImageSource(Protocol):
    """Images by index; `read` is given ascending indices, so that an archive can be streamed."""

    def name(self, index: int) -> str: ...

    def read(self, indices: Sequence[int], mode: str) -> Iterator[Pixels | Image]: ...

    def hash_into(self, total: Any, labels: Sequence[int]) -> None: ...


def find_images(path: Path, need_labels: bool) -> tuple[ImageSource, NDArray[np.int64]]:
    """Return the images under `path` and their labels, `UNLABELED` where they have none."""
    if path.is_file():
        if path.suffix == _calibfile.SUFFIX:
            return _open_tensors(path, need_labels)
        if path.suffix != ".npz":
            raise LoadError(
                f"{path}: got a file, expected an .npz file, a .safetensors of `dfqc synth` or a "
                "folder of images"
            )
        return _open_archive(path, need_labels)
    if not path.is_dir():
        raise LoadError(f"{path}: no such file or folder; expected images: an .npz or a folder")
    import_pillow()
    with _naming(path):
        if (path / "labels.csv").is_file():
            return _open_table(path, need_labels)
        return _open_folder(path, need_labels)


@dataclass(frozen=True)
class _Files:
    root: Path
    files: tuple[str, ...]  # relative to root, with forward slashes

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])

    def read(self, indices: Sequence[int], mode: str) -> Iterator[Image]:
        for index in indices:
            yield _decode(self.root / self.files[index], mode)

    def hash_into(self, total: Any, labels: Sequence[int]) -> None:
        for file, label in zip(self.files, labels, strict=True):
            content = hashlib.sha256()
            _hash_file(self.root / file, content)
            line = f"{label} {content.hexdigest()} {file}\0"
            total.update(line.encode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class _Archive:
    path: Path
    shape: tuple[int, int, int, int]

    def name(self, index: int) -> str:
        return f"image {index} of {self.path}"

    def read(self, indices: Sequence[int], mode: str) -> Iterator[Pixels]:
        """Stream the rows through: an archive may be larger than memory."""
        size = int(np.prod(self.shape[1:]))
        position = 0
        with (
            _naming(self.path),
            zipfile.ZipFile(self.path) as members,
            members.open("images.npy") as stream,
        ):
            _read_header(stream)
            for index in indices:
                for _ in range(index - position):
                    _read_bytes(stream, size)
                row = np.frombuffer(_read_bytes(stream, size), np.uint8)
                yield row.reshape(self.shape[1:])
                position = index + 1

    def hash_into(self, total: Any, labels: Sequence[int]) -> None:
        _hash_file(self.path, total)  # the labels are inside


def _open_archive(path: Path, need_labels: bool) -> tuple[_Archive, NDArray[np.int64]]:
    with _naming(path), zipfile.ZipFile(path) as members:
        keys = [name.removesuffix(".npy") for name in members.namelist()]
        missing = {"images", "labels" if need_labels else "images"} - set(keys)
        if missing:
            raise LoadError(
                f"{path}: got the arrays {', '.join(keys) or 'none'}; {', '.join(sorted(missing))} "
                "missing (expected `images` uint8 N x H x W x C and `labels` int64)"
            )
        with members.open("images.npy") as stream:
            shape, fortran, dtype = _read_header(stream)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran:
            order = " in Fortran order" if fortran else ""
            raise LoadError(
                f"{path}: `images` is {dtype} {shape}{order}, expected uint8 (N, H, W, 1 or 3), "
                "C-contiguous"
            )
        labels = None
        if "labels" in keys:
            with members.open("labels.npy") as stream:
                labels = np.lib.format.read_array(stream, allow_pickle=False)
    if shape[0] == 0:
        raise LoadError(f"{path}: `images` is empty")
    if labels is None:
        return _Archive(path, shape), _no_labels(shape[0])
    if labels.dtype.kind not in "iu" or labels.shape != shape[:1]:
        raise LoadError(
            f"{path}: `labels` is {labels.dtype} {labels.shape}, expected one integer for each of "
            f"the {shape[0]} images"
        )
    return _Archive(path, shape), labels.astype(np.int64)


def _open_tensors(path: Path, need_labels: bool) -> tuple[ImageSource, NDArray[np.int64]]:
    source, labels, count = _calibfile.open_calib_file(path)
    if labels is None and need_labels:
        raise LoadError(f"{path}: holds images without labels, which are needed here")
    return source, _no_labels(count) if labels is None else labels.astype(np.int64)


def _open_table(root: Path, need_labels: bool) -> tuple[_Files, NDArray[np.int64]]:
    table = root / "labels.csv"
    files, labels = [], []
    with _naming(table), table.open(newline="", encoding="utf-8-sig") as stream:
        rows = csv.DictReader(stream)
        columns = rows.fieldnames or []
        labeled = need_labels or "label" in columns
        if "file" not in columns or (labeled and "label" not in columns):
            raise LoadError(f"{table}: got the columns {', '.join(columns)}; expected file,label")
        for row in rows:
            where = f"{table}, line {rows.line_num}"
            if not row["file"] or not (root / row["file"]).is_file():
                raise LoadError(f"{where}: there is no file {row['file']!r} in {root}")
            files.append(row["file"])
            labels.append(_read_label(row["label"], where) if labeled else UNLABELED)
    if not files:
        raise LoadError(f"{table}: lists no images")
    return _Files(root, tuple(files)), np.array(labels, dtype=np.int64)


def _read_label(text: str | None, where: str) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise LoadError(f"{where}: label {text!r}, expected an integer") from None


def _open_folder(root: Path, need_labels: bool) -> tuple[_Files, NDArray[np.int64]]:
    """A folder per class, sorted by name; or, where no labels are needed, a flat folder."""
    entries = [p for p in sorted(root.iterdir()) if not p.name.startswith(".")]
    flat = tuple(p.name for p in entries if _is_image(p))
    classes = {p.name: _images_below(p, root) for p in entries if p.is_dir()}
    nested = tuple(file for files in classes.values() for file in files)
    if not flat and not nested:
        raise LoadError(f"{root}: no images here (looked for {', '.join(SUFFIXES)})")
    if flat and nested:
        raise LoadError(f"{root}: images both here and in subfolders; expected either alone")
    if flat and need_labels:
        raise LoadError(
            f"{root}: {len(flat)} images without labels; expected labels.csv (file,label) beside "
            "them, or one subfolder per class"
        )
    if flat:
        return _Files(root, flat), _no_labels(len(flat))
    if {name.lower() for name in classes} <= _SPLITS:
        raise LoadError(f"{root}: holds {', '.join(classes)}; give one of these folders instead")
    if empty := [name for name, files in classes.items() if not files]:
        raise LoadError(
            f"{root / empty[0]}: no images; every subfolder counts as a class, in sorted order: "
            "remove those that are none, or list the images in labels.csv"
        )
    labels = [i for i, files in enumerate(classes.values()) for _ in files]
    return _Files(root, nested), np.array(labels, dtype=np.int64)


def _images_below(folder: Path, root: Path) -> list[str]:
    inside = (p for p in folder.rglob("*") if _is_image(p) and not p.name.startswith("."))
    return sorted(p.relative_to(root).as_posix() for p in inside)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _no_labels(count: int) -> NDArray[np.int64]:
    return np.full(count, UNLABELED, dtype=np.int64)


def _decode(path: Path, mode: str) -> Image:
    pillow = import_pillow()
    try:
        with pillow.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise LoadError(f"{path}: {picture.mode} pixels, expected 8 bits per channel")
            image: Image = picture.convert(mode)
            return image
    # Pillow reports broken files by all of these.
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise LoadError(
            f"{path}: cannot be read as an image ({error}); remove or replace it"
        ) from error


def import_pillow() -> Any:
    """Return `PIL.Image`; torch-free machines may lack it."""
    try:
        import PIL.Image
    except ImportError as error:
        raise EnvironmentFault(
            "image files are read and resized by Pillow, which is not installed: "
            "pip install pillow (or give an .npz of images of the model's input size)"
        ) from error
    return PIL.Image


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in the faults of the libraries that read it."""
    try:
        yield
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
        csv.Error,
    ) as error:
        raise LoadError(f"{path}: cannot be read ({error})") from error


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, fortran order, dtype) of an array in the .npy format."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _read_bytes(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError("it ends within an image")
    return data


def _hash_file(path: Path, total: Any) -> None:
    with _naming(path), path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            total.update(chunk)
