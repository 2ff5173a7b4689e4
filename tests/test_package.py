import hashlib
import json
import shutil
import subprocess

import pytest

from dfqc.compiler import package
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import EnvironmentFault, LoadError, UsageError
from qdq_models import tiny_manifest, tiny_net, write_tiny_package


@pytest.fixture
def folder(tmp_path):
    write_tiny_package(tmp_path / "net")
    return tmp_path / "net"


def rewrite_manifest(folder, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def test_every_file_is_listed_with_its_digest(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == set(files) - {"manifest.json", "SHA256SUMS"}
    for name, entry in manifest["files"].items():
        data = files[name].read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert package.file_faults(package.open_package(folder)) == []


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="sha256sum is not installed")
def test_the_checksums_are_those_of_sha256sum(folder):
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count(": OK") == 4


def test_a_package_is_read_back(folder):
    opened = package.open_package(folder)
    assert opened.target == "ort"
    assert opened.name == "net"
    assert opened.image == ImageSpec((3, 8, 8), (0.5,) * 3, (0.25,) * 3, None)
    assert opened.engine.read_bytes() == tiny_net().data
    assert opened.float_model == folder / "float.onnx"


def test_the_written_manifest_is_returned_and_keeps_its_fields(tmp_path):
    manifest = tiny_manifest(metrics={"sqnr_db": 31.5})
    written = package.write_package(tmp_path / "p", manifest, {"a/b.txt": b"hello"})
    assert json.loads((tmp_path / "p/manifest.json").read_text()) == written
    assert written["metrics"] == {"sqnr_db": 31.5}
    assert written["files"]["a/b.txt"]["bytes"] == 5


def test_numbers_that_json_lacks_become_null(tmp_path):
    manifest = tiny_manifest(metrics={"sqnr_db": float("inf")}, rows=[float("nan"), (1.5,)])
    package.write_package(tmp_path / "p", manifest, {})
    read = json.loads((tmp_path / "p/manifest.json").read_text(), parse_constant=pytest.fail)
    assert read["metrics"] == {"sqnr_db": None}
    assert read["rows"] == [None, [1.5]]


def test_equal_contents_are_stored_once(tmp_path):
    contents = {"model.onnx": b"x" * 100, "triton/net/1/model.onnx": b"x" * 100, "other": b"y"}
    package.write_package(tmp_path / "p", tiny_manifest(), contents)
    first, second = tmp_path / "p/model.onnx", tmp_path / "p/triton/net/1/model.onnx"
    assert first.read_bytes() == second.read_bytes() == b"x" * 100
    assert first.samefile(second)


def test_an_earlier_package_is_replaced_whole(folder):
    package.write_package(folder, tiny_manifest(), {"model.onnx": b"new"})
    assert sorted(p.name for p in folder.iterdir()) == ["SHA256SUMS", "manifest.json", "model.onnx"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["net"]


def test_a_failed_write_leaves_the_earlier_package_alone(folder):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        package.write_package(
            folder, tiny_manifest(), {"a": b"written first", "b": folder.parent / "missing"}
        )
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["net"]


def test_what_a_killed_build_left_behind_does_no_harm(tmp_path):
    for name in (".net.partial", ".net.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").write_text("stale")
    write_tiny_package(tmp_path / "net")
    assert package.file_faults(package.open_package(tmp_path / "net")) == []
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_a_folder_that_is_no_package_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is no package, so it is not overwritten"):
        package.write_package(tmp_path, tiny_manifest(), {})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    package.write_package(tmp_path / "out", tiny_manifest(), {"model.onnx": b"m"})
    assert package.open_package(tmp_path / "out").engine.read_bytes() == b"m"


def test_a_place_that_cannot_be_written_is_an_environment_fault(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFault, match="choose another with -o"):
        package.write_package(tmp_path / "file" / "out", tiny_manifest(), {})


def test_a_folder_without_manifest_is_no_package(tmp_path):
    with pytest.raises(LoadError, match=r"no package, it has no manifest\.json"):
        package.open_package(tmp_path)


def test_a_file_is_no_package(folder):
    with pytest.raises(LoadError, match="expected the folder"):
        package.open_package(folder / "model.onnx")


def test_a_truncated_manifest_is_refused(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[:-40])
    with pytest.raises(LoadError, match="this is no JSON"):
        package.open_package(folder)


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_an_unknown_schema_is_refused(schema, folder):
    rewrite_manifest(folder, schema=schema)
    with pytest.raises(LoadError, match=r"reads schema 1"):
        package.open_package(folder)


@pytest.mark.parametrize("field", ["dfqc", "target", "image", "files"])
def test_a_missing_field_is_named(field, folder):
    rewrite_manifest(folder, **{field: None})
    with pytest.raises(LoadError, match=f"lacks {field}"):
        package.open_package(folder)


@pytest.mark.parametrize("image", [{}, {"size": [3, 8], "mean": [0], "std": [1]}, "3x8x8"])
def test_malformed_preprocessing_is_refused(image, folder):
    rewrite_manifest(folder, image=image)
    with pytest.raises(LoadError, match=r"`image` must have size \[c, h, w\]"):
        package.open_package(folder)


def test_a_package_without_its_model_is_refused(folder):
    (folder / "model.onnx").unlink()
    with pytest.raises(LoadError, match=r"model\.onnx: missing"):
        package.open_package(folder)


def test_changed_and_missing_files_are_found(folder):
    data = bytearray((folder / "float.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "float.onnx").write_bytes(data)
    (folder / "golden.npz").unlink()
    faults = package.file_faults(package.open_package(folder))
    assert faults == ["float.onnx: changed since it was written", "golden.npz: missing"]


def test_a_manifest_edited_by_hand_is_found(folder):
    rewrite_manifest(folder, bits="w2a2")
    faults = package.file_faults(package.open_package(folder))
    assert faults == ["manifest.json: changed since it was written"]


def test_a_file_swapped_together_with_one_list_is_found(folder):
    (folder / "float.onnx").write_bytes(b"other")
    old = json.loads((folder / "manifest.json").read_text())["files"]["float.onnx"]["sha256"]
    new = hashlib.sha256(b"other").hexdigest()
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(old, new))
    faults = package.file_faults(package.open_package(folder))
    assert faults == ["float.onnx: manifest.json and SHA256SUMS disagree"]


@pytest.mark.parametrize("text", [None, "no checksum here\n"])
def test_unreadable_checksums_are_found(text, folder):
    if text is None:
        (folder / "SHA256SUMS").unlink()
    else:
        (folder / "SHA256SUMS").write_text(text)
    (fault,) = package.file_faults(package.open_package(folder))
    assert fault.startswith("SHA256SUMS: cannot be read")
