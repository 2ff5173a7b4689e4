"""Small image sets on disk in every form that `dataset` reads."""

from pathlib import Path

import numpy as np
from PIL import Image

from dfqc.compiler.contracts import ImageSpec

PLAIN = ImageSpec((3, 8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def random_images(count: int, size: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (count, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_npz(path: Path, images: np.ndarray, labels: np.ndarray | None = None) -> Path:
    arrays = {"images": images} if labels is None else {"images": images, "labels": labels}
    np.savez_compressed(path, **arrays)
    return path


def save_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]).save(path)


def save_table(folder: Path, rows: list[tuple[object, ...]], header: str = "file,label") -> Path:
    folder.mkdir(exist_ok=True)
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def read_all(dataset, size=3):
    batches = list(dataset.batches(size))
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])
