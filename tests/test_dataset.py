import csv
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.dataset import UNLABELED, check_labels, digest, open_dataset
from dfqc.compiler.errors import EnvironmentFault, LoadError, UsageError

PLAIN = ImageSpec((3, 8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
ASSETS = Path(os.environ.get("DFQC_ASSETS", Path(__file__).parents[1] / "../shared/assets"))
needs_assets = pytest.mark.skipif(
    not (ASSETS / "data").is_dir(), reason=f"test assets are not at {ASSETS} (set DFQC_ASSETS)"
)


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


def test_labels_out_of_range_name_the_first_image(tmp_path):
    path = save_npz(tmp_path / "a.npz", random_images(4), np.array([0, 9, 10, -1]))
    dataset = open_dataset(path, PLAIN)
    with pytest.raises(LoadError, match=r"image 2 of .*a\.npz: label 10 .* 0\.\.9 \(2 of 4"):
        check_labels(dataset, 10)
    with pytest.raises(LoadError, match=r"image 3 of .*: label -1"):
        check_labels(dataset, 11)
    check_labels(dataset.subset([0, 1, 2]), 11)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "got the arrays x; images, labels missing"),
        ({"images": random_images(2)}, "labels missing"),
        ({"images": random_images(2) / 255, "labels": [0, 1]}, "`images` is float64"),
        ({"images": random_images(2).transpose(0, 3, 1, 2), "labels": [0, 1]}, r"\(2, 3, 8, 8\)"),
        ({"images": random_images(2).T, "labels": [0] * 3}, "Fortran order"),
        ({"images": random_images(2), "labels": [0, 1, 2]}, r"`labels` is int64 \(3,\)"),
        ({"images": random_images(2), "labels": [0.0, 1.0]}, "`labels` is float64"),
        ({"images": random_images(0), "labels": np.zeros(0, int)}, "empty"),
        ({"images": random_images(1), "labels": np.array([None])}, r"a\.npz: cannot be read"),
    ],
)
def test_a_wrong_npz_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(LoadError, match=message):
        open_dataset(tmp_path / "a.npz", PLAIN)


def test_a_broken_npz_is_refused(tmp_path):
    path = save_npz(tmp_path / "a.npz", random_images(50), np.zeros(50, int))
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(LoadError, match=r"a\.npz: cannot be read"):
        open_dataset(path, PLAIN)
    path.write_bytes(b"no archive")
    with pytest.raises(LoadError, match=r"a\.npz: cannot be read"):
        open_dataset(path, PLAIN)
    broken = bytearray(whole)
    broken[3000:3100] = bytes(100)  # the directory at the end is whole, the data are not
    path.write_bytes(broken)
    with pytest.raises(LoadError, match=r"a\.npz: cannot be read"):
        read_all(open_dataset(path, PLAIN))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"no array")
        archive.writestr("labels.npy", b"no array")
    with pytest.raises(LoadError, match=r"a\.npz: cannot be read"):
        open_dataset(path, PLAIN)


def test_a_wrong_path_is_refused(tmp_path):
    with pytest.raises(LoadError, match="nowhere: no such file"):
        open_dataset(tmp_path / "nowhere", PLAIN)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(LoadError, match=r"a\.txt: got a file"):
        open_dataset(tmp_path / "a.txt", PLAIN)
    with pytest.raises(LoadError, match="2 channels"):
        open_dataset(tmp_path, ImageSpec((2, 8, 8), (0.0,) * 2, (1.0,) * 2))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no images here"),
        (["a.png"], "1 images without labels"),
        (["a.png", "dog/b.png"], "images both here and in subfolders"),
        (["train/dog/b.png", "val/dog/b.png"], "give one of these folders"),
        (["cat/", "dog/b.png"], "cat: no images"),
    ],
)
def test_a_wrong_folder_is_refused(tmp_path, files, message):
    for file in files:
        if file.endswith("/"):
            (tmp_path / file).mkdir()
        else:
            save_png(tmp_path / file, random_images(1)[0])
    with pytest.raises(LoadError, match=message):
        open_dataset(tmp_path, PLAIN)


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("file;label", ("0.png;1",), "got the columns file;label; expected file,label"),
        ("file,class", ("0.png", 1), "got the columns file, class"),
        ("file,label", (), "lists no images"),
        ("file,label", ("1.png", 1), "line 2: there is no file '1.png'"),
        ("file,label", ("0.png", "dog"), "line 2: label 'dog', expected an integer"),
        ("file,label", ("0.png",), "line 2: label None"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, header, row, message):
    save_png(tmp_path / "0.png", random_images(1)[0])
    save_table(tmp_path, [row] if row else [], header)
    with pytest.raises(LoadError, match=message):
        open_dataset(tmp_path, PLAIN)


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_an_unreadable_image_is_named(tmp_path, content):
    for i, pixels in enumerate(random_images(2, size=64)):
        save_png(tmp_path / f"{i}.png", pixels)
    broken = tmp_path / "1.png"
    broken.write_bytes(broken.read_bytes()[:2000] if content is None else content)
    save_table(tmp_path, [("0.png", 0), ("1.png", 0)])
    with pytest.raises(LoadError, match=r"1\.png: cannot be read as an image"):
        read_all(open_dataset(tmp_path, PLAIN))


def test_pixels_of_more_than_8_bits_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "0.png")
    save_table(tmp_path, [("0.png", 0)])
    with pytest.raises(LoadError, match=r"0\.png: I;16 pixels, expected 8 bits"):
        read_all(open_dataset(tmp_path, PLAIN))


def test_an_image_smaller_than_the_crop_is_refused(tmp_path):
    path = save_npz(tmp_path / "a.npz", random_images(1, size=32), np.zeros(1, int))
    spec = ImageSpec((3, 16, 16), PLAIN.mean, PLAIN.std, resize=12)
    with pytest.raises(LoadError, match=r"image 0 of .* 12x12 .* smaller than the input 16x16"):
        read_all(open_dataset(path, spec))


def test_pillow_is_asked_for_only_where_it_is_needed(tmp_path, monkeypatch):
    path = save_npz(tmp_path / "a.npz", random_images(2), np.zeros(2, int))
    save_png(tmp_path / "set" / "0.png", random_images(1)[0])
    save_table(tmp_path / "set", [("0.png", 0)])
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert len(read_all(open_dataset(path, PLAIN))[0]) == 2
    with pytest.raises(EnvironmentFault, match="pip install pillow"):
        open_dataset(tmp_path / "set", PLAIN)
    with pytest.raises(EnvironmentFault, match="pip install pillow"):
        read_all(open_dataset(path, ImageSpec((3, 4, 4), PLAIN.mean, PLAIN.std)))


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
