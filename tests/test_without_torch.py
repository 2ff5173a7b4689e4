"""The verbs for devices, in processes where nothing of the compile extra can be imported."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from qdq_models import CLASSES, SIZE, tiny_net, write_tiny_package

BLOCKED = (
    *("torch", "torchvision", "timm", "safetensors", "onnxscript", "onnx_ir"),
    *("matplotlib", "PIL", "yaml", "psutil"),
)
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Run `dfqc` as on a device; processes that it starts are on the device too."""
    folder = tmp_path_factory.mktemp("device")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("packages") / "net"
    write_tiny_package(path, weight=4, act=4)
    return path


def dfqc(device, *arguments, code=0):
    done = device("-m", "dfqc.compiler", *arguments, "--json")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", BLOCKED)
def test_the_compile_extra_is_really_out_of_reach(module, device):
    done = device("-c", f"import {module}")
    assert done.returncode == 1
    assert "(blocked)" in done.stderr


def test_verify(device, folder):
    result = dfqc(device, "verify", folder)
    assert result["failures"] == []
    assert result["parity"]["argmax_agreement"] == 100


def test_verify_tells_tampering_by_exit_code_3(device, tmp_path):
    write_tiny_package(tmp_path / "net")
    (tmp_path / "net" / "float.onnx").write_bytes(b"something else")
    result = dfqc(device, "verify", tmp_path / "net", code=3)
    assert "float.onnx: changed since it was written" in result["error"]


def test_verify_tells_another_engine_by_exit_code_7(device, tmp_path):
    net = tiny_net(seed=2)
    write_tiny_package(tmp_path / "net")
    # A whole package again, checksums and all, around a model with other weights.
    from dfqc.compiler.package import open_package, write_package

    golden = (tmp_path / "net" / "golden.npz").read_bytes()
    manifest = dict(open_package(tmp_path / "net").manifest)
    write_package(tmp_path / "net", manifest, {"model.onnx": net.data, "golden.npz": golden})
    result = dfqc(device, "verify", tmp_path / "net", code=7)
    assert any("first to diverge" in failure for failure in result["failures"])


def test_inspect(device, folder):
    assert dfqc(device, "inspect", folder)["operators"]["Conv"] == 3
    assert dfqc(device, "inspect", folder / "float.onnx")["bytes"]["float"] > 0


def test_bench(device, folder):
    result = dfqc(device, "bench", folder, "--runs", "5", "--threads", "1")
    assert [row["name"] for row in result["engines"]] == ["float", "net"]
    assert all(row["latency_ms"]["median_ms"] > 0 for row in result["engines"])


def test_bench_over_batches_with_table_and_page(device, folder, tmp_path):
    files = (tmp_path / "b.csv", tmp_path / "b.html")
    words = ("--batch", "1,2", "--runs", "5", "--threads", "1")
    result = dfqc(device, "bench", folder, *words, "--csv", files[0], "--html", files[1])
    assert [setting["batch"] for setting in result["settings"]] == [1, 2]
    assert all(file.stat().st_size > 0 for file in files)


def test_report(device, folder, tmp_path):
    page = tmp_path / "page.html"
    assert dfqc(device, "report", folder, "-o", page) == {"report": str(page)}
    assert page.read_text().startswith("<!doctype html>")
    dfqc(device, "report", folder / "manifest.json", "-o", page)
    dfqc(device, "report", folder, "-o", tmp_path / "missing" / "page.html", code=8)


def test_diff(device, folder):
    assert dfqc(device, "diff", folder, folder)["layers"]["changed"] == []


def test_eval(device, folder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, *SIZE[1:], 3), dtype=np.uint8)
    images = ((pixels / 255 - 0.5) / 0.25).astype(np.float32).transpose(0, 3, 1, 2)
    predicted = tiny_net(float32=True, images=images).outputs.argmax(1)
    labels = np.where(np.arange(24) < 18, predicted, (predicted + 1) % CLASSES)
    np.savez(tmp_path / "data.npz", images=pixels, labels=labels.astype(np.int64))
    result = dfqc(device, "eval", folder, "--data", tmp_path / "data.npz")
    assert result["top1"]["float"]["percent"] == 75.0
    assert result["top1"]["float"]["images"] == 24
    assert result["drop"] == pytest.approx(75.0 - result["top1"]["engine"]["percent"])
    assert 0 < result["agreement"] <= 100


def test_a_folder_that_is_no_package_is_told_by_exit_code_3(device, tmp_path):
    assert "is no package" in dfqc(device, "verify", tmp_path, code=3)["error"]
    assert "is no package" in dfqc(device, "bench", tmp_path, code=3)["error"]


def test_engine_needs_no_torch(device, folder):
    assert dfqc(device, "engine", folder)["target"] == "ort"
    modules = ", ".join(f"dfqc.backends._trt_{name}" for name in ("finish", "rules", "inspect"))
    done = device("-c", f"import {modules}")
    assert done.returncode == 0, done.stderr
