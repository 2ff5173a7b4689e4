"""Calibration images in one `.safetensors` file: what `dfqc synth` writes and `--calib-data` reads.

`images` are float32 (n, c, h, w) as the model reads them, `labels` int64 (n,) where there are any;
the header says how they were normalized, so that another model can have them its own way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dfqc.compiler.artifact import hash_file
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import LoadError

if TYPE_CHECKING:
    from dfqc.compiler.contracts import CalibSet

SUFFIX = ".safetensors"


def write_calib_file(calib: CalibSet, image: ImageSpec, path: Path) -> None:
    """Write a calibration set with its normalization; equal sets give equal bytes."""
    from safetensors.numpy import save_file

    arrays = {"images": calib.images.numpy()}
    if calib.labels is not None:
        arrays["labels"] = calib.labels.numpy()
    about = {"mean": list(image.mean), "std": list(image.std), "source": calib.source}
    save_file(arrays, path, metadata={"dfqc": json.dumps(about)})


@dataclass(frozen=True)
class TensorImages:
    """Its images as pixels of 0..255 that are not rounded, and not clipped."""

    path: Path
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    def name(self, index: int) -> str:
        return f"image {index} of {self.path}"

    def read(self, indices: Sequence[int], mode: str) -> Iterator[NDArray[np.float32]]:
        from safetensors import safe_open

        with safe_open(self.path, framework="np") as file:
            images = file.get_slice("images")
            for index in indices:
                image = images[index : index + 1][0].transpose(1, 2, 0)
                yield (image * self.std + self.mean) * np.float32(255)

    def hash_into(self, total: Any, labels: Sequence[int]) -> None:
        total.update(hash_file(self.path).encode())  # the labels are inside


def open_calib_file(path: Path) -> tuple[TensorImages, NDArray[np.int64] | None, int]:
    """Return the images, their labels and their number.

    Raises:
        LoadError: no such file, or one that `dfqc synth` did not write.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {})["dfqc"])
            mean, std = (np.asarray(about[name], np.float32) for name in ("mean", "std"))
            images = file.get_slice("images")
            count = images.get_shape()[0]
            labels = file.get_tensor("labels") if "labels" in file.keys() else None  # noqa: SIM118
        _check(images.get_dtype(), images.get_shape(), labels, mean.shape, std.shape)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise LoadError(
            f"{path}: is no file of calibration images ({type(error).__name__}: {error}); expected "
            "what `dfqc synth MODEL -o FILE.safetensors` writes, an .npz or a folder of images"
        ) from error
    return TensorImages(path, mean, std), labels, count


def _check(
    dtype: str,
    shape: Sequence[int],
    labels: NDArray[Any] | None,
    *normalization: tuple[int, ...],
) -> None:
    """Raise ValueError for tensors that are no images of ours."""
    if dtype != "F32" or len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"`images` is {dtype} {list(shape)}, expected F32 (n, c, h, w)")
    if labels is not None and (labels.shape != (shape[0],) or labels.dtype.kind not in "iu"):
        raise ValueError(f"`labels` is {labels.dtype} {labels.shape} for {shape[0]} images")
    if any(found != (shape[1],) for found in normalization):
        raise ValueError(f"mean and std are not of {shape[1]} channels")
