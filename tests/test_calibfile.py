import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dfqc.compiler._calibfile import write_calib_file
from dfqc.compiler.contracts import CalibSet, ImageSpec
from dfqc.compiler.dataset import digest, open_dataset
from dfqc.compiler.errors import LoadError

IMAGE = ImageSpec((3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
OTHER = ImageSpec((3, 8, 8), (0.1, 0.2, 0.3), (1.0, 0.5, 0.25))


@pytest.fixture
def calib():
    rng = torch.Generator().manual_seed(0)
    return CalibSet(3 * torch.randn(70, 3, 8, 8, generator=rng), torch.arange(70) % 10, "zeroq")


@pytest.fixture
def path(calib, tmp_path):
    write_calib_file(calib, IMAGE, tmp_path / "set.safetensors")
    return tmp_path / "set.safetensors"


def read(path, image, **options):
    parts = list(open_dataset(path, image, **options).batches(32))
    images = np.concatenate([i for i, _ in parts])
    return torch.from_numpy(images), torch.from_numpy(np.concatenate([n for _, n in parts]))


def test_images_come_back_also_those_no_pixel_has(calib, path):
    images, labels = read(path, IMAGE)
    torch.testing.assert_close(images, calib.images, atol=1e-5, rtol=1e-5)
    assert torch.equal(labels, calib.labels)


def test_another_model_gets_them_in_its_own_normalization(calib, path):
    images, _ = read(path, OTHER)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGE.mean, IMAGE.std))
    other_mean, other_std = (torch.tensor(v).view(3, 1, 1) for v in (OTHER.mean, OTHER.std))
    expected = (calib.images * std + mean - other_mean) / other_std
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-4)


def test_what_was_made_for_a_model_is_neither_resized_nor_cropped(calib, path):
    images, _ = read(path, dataclasses.replace(IMAGE, resize=12))
    torch.testing.assert_close(images, calib.images, atol=1e-5, rtol=1e-5)


def test_a_model_of_another_size_is_refused(path):
    with pytest.raises(LoadError, match=r"image 0 of .*: is 3x8x8, made for .* takes 3x16x16"):
        read(path, ImageSpec((3, 16, 16)))


def test_labels_are_optional(calib, tmp_path):
    path = tmp_path / "unlabeled.safetensors"
    write_calib_file(CalibSet(calib.images, None, "noise"), IMAGE, path)
    assert len(open_dataset(path, IMAGE, need_labels=False)) == 70
    with pytest.raises(LoadError, match="without labels"):
        open_dataset(path, IMAGE)


def test_equal_sets_have_equal_bytes_and_digests(calib, path, tmp_path):
    again = tmp_path / "again.safetensors"
    write_calib_file(calib, IMAGE, again)
    assert again.read_bytes() == path.read_bytes()
    assert digest(again) == digest(path)
    write_calib_file(CalibSet(calib.images + 1, calib.labels, "zeroq"), IMAGE, again)
    assert digest(again) != digest(path)


ABOUT = json.dumps({"mean": [0.0] * 3, "std": [1.0] * 3})
GOOD = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("tensors", "about"),
    [
        ({"weight": torch.zeros(2)}, None),
        ({"images": GOOD}, None),
        ({"images": GOOD}, "[]"),
        ({"images": GOOD}, "{}"),
        ({"images": GOOD[:, :1]}, ABOUT),
        ({"images": GOOD[0]}, ABOUT),
        ({"images": GOOD.half()}, ABOUT),
        ({"images": GOOD[:0]}, ABOUT),
        ({"images": GOOD, "labels": torch.zeros(3, dtype=torch.int64)}, ABOUT),
        ({"images": GOOD, "labels": torch.zeros(2)}, ABOUT),
        (b"", None),
        (b"no tensors at all", None),
    ],
)
def test_other_files_are_refused(tensors, about, tmp_path):
    path = tmp_path / "other.safetensors"
    if isinstance(tensors, bytes):
        path.write_bytes(tensors)
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path,
                  metadata=about and {"dfqc": about})  # fmt: skip
    with pytest.raises(LoadError, match=r"other\.safetensors: is no file of calibration images"):
        open_dataset(path, IMAGE)
