import csv
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.dataset import UNLABELED, digest, open_dataset
from dfqc.compiler.errors import LoadError, UsageError
from image_files import PLAIN, random_images, read_all, save_npz, save_png, save_table

ASSETS = Path(os.environ.get("DFQC_ASSETS", Path(__file__).parents[1] / "../shared/assets"))
needs_assets = pytest.mark.skipif(
    not (ASSETS / "data").is_dir(), reason=f"test assets are not at {ASSETS} (set DFQC_ASSETS)"
)


def test_npz_is_normalized_in_order(tmp_path):
    images, labels = random_images(7), np.arange(7)
    spec = ImageSpec((3, 8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    dataset = open_dataset(save_npz(tmp_path / "a.npz", images, labels), spec)
    x, y = read_all(dataset)
    expected = (images.astype(np.float64) / 255 - spec.mean) / spec.std
    assert (len(dataset), dataset.source, x.dtype, y.dtype) == (7, "a.npz", np.float32, np.int64)
    assert x.flags.c_contiguous
    np.testing.assert_allclose(x, expected.transpose(0, 3, 1, 2), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(y, labels)


def test_the_three_forms_give_the_same_images(tmp_path):
    images, labels = random_images(6), np.array([0, 0, 1, 1, 2, 2])
    npz = save_npz(tmp_path / "a.npz", images, labels)
    for i, pixels in enumerate(images):
        # The deeper folder and the upper-case suffix belong to what ImageFolder accepts.
        deep = "deeper/" if i == 3 else ""
        save_png(tmp_path / "folder" / "abc"[labels[i]] / f"{deep}{i}.PNG", pixels)
        save_png(tmp_path / "table" / f"{i}.png", pixels)
    save_table(
        tmp_path / "table", [(f"{i}.png", labels[i], "x") for i in range(6)], "file,label,no"
    )
    x, y = read_all(open_dataset(npz, PLAIN))
    for form in ("folder", "table"):
        x2, y2 = read_all(open_dataset(tmp_path / form, PLAIN))
        np.testing.assert_array_equal(x2, x)
        np.testing.assert_array_equal(y2, y)


def test_labels_csv_decides_the_order(tmp_path):
    images = random_images(3)
    for i, pixels in enumerate(images):
        save_png(tmp_path / "set" / f"{i}.png", pixels)
    save_table(tmp_path / "set", [("2.png", 5), ("0.png", 7)])
    dataset = open_dataset(tmp_path / "set", PLAIN)
    x, y = read_all(dataset)
    assert y.tolist() == [5, 7]
    assert dataset.name(0).endswith("2.png")
    np.testing.assert_array_equal(x[0], (images[2] / np.float32(255)).transpose(2, 0, 1))


def test_the_shorter_side_is_resized_and_the_center_cropped(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 47, 3), dtype=np.uint8)
    save_png(tmp_path / "set" / "a.png", pixels)
    save_table(tmp_path / "set", [("a.png", 0)])
    spec = ImageSpec((3, 16, 16), PLAIN.mean, PLAIN.std, resize=20)
    x, _ = read_all(open_dataset(tmp_path / "set", spec))
    resized = Image.fromarray(pixels).resize((47 * 20 // 30, 20), Image.Resampling.BILINEAR)
    expected = np.asarray(resized)[2:18, (31 - 16) // 2 : (31 - 16) // 2 + 16]
    np.testing.assert_array_equal(x[0].transpose(1, 2, 0), expected / np.float32(255))


@pytest.mark.parametrize("size", [(8, 12), (12, 8), (16, 16)])
def test_without_resize_images_just_cover_the_input(tmp_path, size):
    save_png(tmp_path / "set" / "a.png", np.full((*size, 3), 255, np.uint8))
    save_table(tmp_path / "set", [("a.png", 0)])
    spec = ImageSpec((3, 8, 12), PLAIN.mean, PLAIN.std)
    x, _ = read_all(open_dataset(tmp_path / "set", spec))
    np.testing.assert_array_equal(x, np.ones((1, 3, 8, 12), np.float32))


def test_npz_images_are_resized_like_files(tmp_path):
    images = random_images(2, size=32)
    spec = ImageSpec((3, 96, 96), PLAIN.mean, PLAIN.std, resize=96)
    x, _ = read_all(open_dataset(save_npz(tmp_path / "a.npz", images, np.zeros(2, int)), spec))
    for got, pixels in zip(x, images, strict=True):
        expected = Image.fromarray(pixels).resize((96, 96), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(
            got.transpose(1, 2, 0), np.asarray(expected) / np.float32(255)
        )


def test_color_and_gray_are_converted_to_what_the_model_takes(tmp_path):
    color, gray = random_images(1), random_images(1, channels=1, seed=1)
    gray_spec = ImageSpec((1, 8, 8), (0.0,), (1.0,))
    labels = np.zeros(1, int)
    x, _ = read_all(open_dataset(save_npz(tmp_path / "c.npz", color, labels), gray_spec))
    luma = np.asarray(Image.fromarray(color[0]).convert("L"))
    np.testing.assert_array_equal(x[0, 0], luma / np.float32(255))
    x, _ = read_all(open_dataset(save_npz(tmp_path / "g.npz", gray, labels), gray_spec))
    np.testing.assert_array_equal(x[0, 0], gray[0, ..., 0] / np.float32(255))
    save_png(tmp_path / "set" / "a.png", gray[0])
    save_table(tmp_path / "set", [("a.png", 0)])
    for path in (tmp_path / "g.npz", tmp_path / "set"):
        x, _ = read_all(open_dataset(path, PLAIN))
        for channel in x[0]:
            np.testing.assert_array_equal(channel, gray[0, ..., 0] / np.float32(255))


def test_limit_and_subset_take_the_images_they_say(tmp_path):
    path = save_npz(tmp_path / "a.npz", random_images(10), np.arange(10))
    x, _ = read_all(open_dataset(path, PLAIN))
    evenly = open_dataset(path, PLAIN, limit=4)
    assert evenly.labels.tolist() == [0, 2, 5, 7]
    np.testing.assert_array_equal(read_all(evenly)[0], x[[0, 2, 5, 7]])
    inner = evenly.subset([3, 1])
    np.testing.assert_array_equal(read_all(inner)[0], x[[2, 7]])
    assert inner.name(1).startswith("image 7 of")
    assert len(open_dataset(path, PLAIN, limit=99)) == 10
    with pytest.raises(UsageError, match="limit"):
        open_dataset(path, PLAIN, limit=0)


def test_an_archive_is_streamed(tmp_path):
    images = np.zeros((200, 64, 64, 3), np.uint8)
    dataset = open_dataset(save_npz(tmp_path / "a.npz", images, np.zeros(200, int)), PLAIN)
    tracemalloc.start()
    count = sum(len(x) for x, _ in dataset.batches(4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 200
    assert peak < images.nbytes / 2


def test_images_without_labels(tmp_path):
    for i, pixels in enumerate(random_images(3)):
        save_png(tmp_path / "flat" / f"{i}.png", pixels)
    (tmp_path / "flat" / "notes.txt").write_text("no image")
    save_png(tmp_path / "flat" / ".hidden.png", pixels)
    npz = save_npz(tmp_path / "a.npz", random_images(3))
    save_table(tmp_path / "table", [])
    save_png(tmp_path / "table" / "0.png", pixels)
    save_table(tmp_path / "table", [("0.png",)], "file")
    for path, count in ((tmp_path / "flat", 3), (npz, 3), (tmp_path / "table", 1)):
        with pytest.raises(LoadError, match="label"):
            open_dataset(path, PLAIN)
        dataset = open_dataset(path, PLAIN, need_labels=False)
        x, y = read_all(dataset)
        assert len(x) == len(dataset) == count
        assert not dataset.labeled
        assert set(y.tolist()) == {UNLABELED}


def test_torch_is_not_loaded(tmp_path):
    code = "import sys, dfqc.compiler.dataset; sys.exit(bool({'torch', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_the_digest_is_that_of_the_content(tmp_path):
    images = random_images(3)
    for name in ("one", "two"):
        for i, pixels in enumerate(images):
            save_png(tmp_path / name / f"{i}.png", pixels)
        save_table(tmp_path / name, [(f"{i}.png", i) for i in range(3)])
    first = digest(tmp_path / "one")
    assert len(first) == 64
    assert digest(tmp_path / "two") == first
    save_table(tmp_path / "two", [(f"{i}.png", 0) for i in range(3)])
    assert digest(tmp_path / "two") != first
    save_png(tmp_path / "one" / "1.png", images[0])
    assert digest(tmp_path / "one") != first
    npz = save_npz(tmp_path / "a.npz", images, np.arange(3))
    before = digest(npz)
    assert digest(npz.rename(tmp_path / "b.npz")) == before
    assert digest(save_npz(tmp_path / "b.npz", images, np.zeros(3, int))) != before


@needs_assets
def test_imagenet_assets_equal_their_own_pipeline():
    torch = pytest.importorskip("torch")
    folder = ASSETS / "data" / "imagenet" / "sample1000"
    spec = ImageSpec((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=236)
    x, y = read_all(open_dataset(folder, spec, limit=5), 2)
    with (folder / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))[::200]
    pictures = [Image.open(folder / row["file"]).convert("RGB") for row in rows]
    pictures = [p.resize((236, 236), Image.Resampling.BILINEAR) for p in pictures]
    pixels = np.stack([np.asarray(p.crop((6, 6, 230, 230))) for p in pictures])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    expected = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    np.testing.assert_array_equal(x, expected.numpy())
    assert y.tolist() == [int(row["label"]) for row in rows]


@needs_assets
def test_cifar_assets_equal_their_own_pipeline():
    torch = pytest.importorskip("torch")
    path = ASSETS / "data" / "cifar10" / "cifar10_test.npz"
    spec = ImageSpec((3, 96, 96), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize=96)
    x, y = read_all(open_dataset(path, spec).subset(range(6)), 4)
    data = np.load(path)
    pictures = [
        Image.fromarray(a).resize((96, 96), Image.Resampling.BILINEAR) for a in data["images"][:6]
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    expected = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    np.testing.assert_array_equal(x, expected.numpy())
    np.testing.assert_array_equal(y, data["labels"][:6])
