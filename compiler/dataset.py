"""A path of real images in, preprocessed batches of them out; imports no torch.

Three forms: an `.npz` file (`images` uint8 N x H x W x C, `labels` integers), a folder of class
folders, a folder with `labels.csv` (`file,label,...`). Where no labels are needed, also a flat
folder of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dfqc.compiler._imagefiles import (
    UNLABELED,
    ImageSource,
    Pixels,
    find_images,
    import_pillow,
)
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import LoadError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class ImageSet:
    """The `Dataset` that `open_dataset` returns; it decodes per batch and keeps no image."""

    labels: NDArray[np.int64]  # all of them `UNLABELED` where the set has none
    image: ImageSpec
    source: str
    _images: ImageSource
    _indices: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._indices)

    @property
    def labeled(self) -> bool:
        """True if the images have labels."""
        return bool(np.any(self.labels != UNLABELED))

    def name(self, position: int) -> str:
        """Return what to call an image in a message."""
        return self._images.name(int(self._indices[position]))

    def subset(self, positions: Sequence[int] | NDArray[np.int64]) -> ImageSet:
        """Keep the images at `positions`, in the order of the set."""
        kept = np.sort(np.asarray(positions, dtype=np.int64))
        return replace(self, labels=self.labels[kept], _indices=self._indices[kept])

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Yield normalized float32 (n, c, h, w) and int64 labels (n,)."""
        mean = np.asarray(self.image.mean, dtype=np.float32)
        std = np.asarray(self.image.std, dtype=np.float32)
        pixels = self._pixels()
        for start in range(0, len(self), size):
            labels = self.labels[start : start + size]
            batch = np.stack([next(pixels) for _ in labels]).astype(np.float32)
            batch = (batch / np.float32(255) - mean) / std
            yield np.ascontiguousarray(batch.transpose(0, 3, 1, 2)), labels

    def _pixels(self) -> Iterator[Pixels]:
        pictures = self._images.read(self._indices.tolist(), _mode(self.image))
        for position, picture in enumerate(pictures):
            yield _prepare(picture, self.image, self.name(position))


def open_dataset(
    path: Path, image: ImageSpec, *, need_labels: bool = True, limit: int | None = None
) -> ImageSet:
    """Open the images under `path` for a model with the preprocessing `image`.

    The shorter side is resized to `image.resize` (bilinear), then the center is cropped to
    `image.size`. Without `resize`, images of the input's size stay as they are and others are
    resized until they just cover it. `limit` keeps that many, evenly spaced over the set.

    Raises:
        LoadError: nothing there, another form, unreadable files, labels missing or miscounted.
        EnvironmentFault: Pillow is needed and not installed.
    """
    if image.size[0] not in (1, 3):
        raise LoadError(f"{path}: the model takes {image.size[0]} channels; images have 1 or 3")
    if limit is not None and limit < 1:
        raise UsageError(f"limit: got {limit}, expected at least 1 image")
    source, labels = find_images(path, need_labels)
    count = len(labels)
    dataset = ImageSet(labels, image, path.resolve().name, source, np.arange(count))
    if limit is None or limit >= count:
        return dataset
    return dataset.subset(np.arange(limit) * count // limit)


def check_labels(dataset: ImageSet, classes: int) -> None:
    """Refuse labels outside 0..classes-1, naming the first image that has one."""
    wrong = np.flatnonzero((dataset.labels < 0) | (dataset.labels >= classes))
    if len(wrong):
        first = int(wrong[0])
        raise LoadError(
            f"{dataset.name(first)}: label {dataset.labels[first]} is out of range: the model has "
            f"{classes} outputs, so labels must be 0..{classes - 1} ({len(wrong)} of "
            f"{len(dataset)} are not); is this the data set of this model?"
        )


def digest(path: Path) -> str:
    """Return the sha256 of what `path` holds: the bytes, names and labels of all images."""
    source, labels = find_images(path, need_labels=False)
    total = hashlib.sha256()
    source.hash_into(total, labels.tolist())
    return total.hexdigest()


def _mode(image: ImageSpec) -> str:
    return "L" if image.size[0] == 1 else "RGB"


def _prepare(picture: Pixels | Image, image: ImageSpec, name: str) -> Pixels:
    """Resize and crop one picture to (h, w, c); images that were made for a model stay as made."""
    channels, height, width = image.size
    if isinstance(picture, np.ndarray) and picture.dtype != np.uint8:
        if picture.shape == (height, width, channels):
            return picture
        made = "x".join(str(picture.shape[i]) for i in (2, 0, 1))
        raise LoadError(
            f"{name}: is {made}, made for another model than one that takes "
            f"{channels}x{height}x{width}: make them for this model with `dfqc synth`"
        )
    found = _size(picture)
    size = _resized(found, image)
    if isinstance(picture, np.ndarray) and size == found and picture.shape[2] == channels:
        pixels = picture  # needs no Pillow: a device may not have it
    else:
        pixels = _redraw(picture, size, image)
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    if min(top, left) < 0:
        raise LoadError(
            f"{name}: {size[0]}x{size[1]} after resizing the shorter side to {image.resize}, "
            f"smaller than the input {width}x{height}: give a larger --resize"
        )
    return pixels[top : top + height, left : left + width]


def _redraw(picture: Pixels | Image, size: tuple[int, int], image: ImageSpec) -> Pixels:
    pillow = import_pillow()
    if isinstance(picture, np.ndarray):
        gray = picture.shape[2] == 1
        drawn = pillow.fromarray(picture[:, :, 0] if gray else picture).convert(_mode(image))
    else:
        drawn = picture
    if drawn.size != size:
        drawn = drawn.resize(size, pillow.Resampling.BILINEAR)
    return np.asarray(drawn, dtype=np.uint8).reshape(size[1], size[0], image.size[0])


def _size(picture: Pixels | Image) -> tuple[int, int]:
    """Return (width, height)."""
    if isinstance(picture, np.ndarray):
        return picture.shape[1], picture.shape[0]
    return picture.size


def _resized(found: tuple[int, int], image: ImageSpec) -> tuple[int, int]:
    """Return (width, height) after the resize; the longer side is rounded down."""
    _, height, width = image.size
    if image.resize is None:
        scale = max(width / found[0], height / found[1])
        return max(width, int(found[0] * scale)), max(height, int(found[1] * scale))
    short = min(found)
    return found[0] * image.resize // short, found[1] * image.resize // short
