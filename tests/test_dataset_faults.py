import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.dataset import check_labels, open_dataset
from dfqc.compiler.errors import EnvironmentFault, LoadError
from image_files import PLAIN, random_images, read_all, save_npz, save_png, save_table


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
