"""`dfqc bench` over batch sizes and threads: one comparison, a table and a page."""

import csv
import io
import json

import numpy as np
import pytest

from dfqc.compiler.bench_sweep import describe_sweep, run_sweep, sweep_csv, sweep_html
from dfqc.compiler.cli import main
from dfqc.compiler.errors import UsageError
from pages import Page
from qdq_models import CLASSES, SIZE, tiny_net, write_tiny_package


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    write_tiny_package(folder / "w8a8")
    write_tiny_package(folder / "w4a4", weight=4, act=4)
    return [folder / "w8a8", folder / "w4a4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (24, *SIZE[1:], 3), dtype=np.uint8)
    images = ((pixels / 255 - 0.5) / 0.25).astype(np.float32).transpose(0, 3, 1, 2)
    predicted = tiny_net(float32=True, images=images).outputs.argmax(1)
    labels = np.where(np.arange(24) < 18, predicted, (predicted + 1) % CLASSES)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, images=pixels, labels=labels.astype(np.int64))
    return path


@pytest.fixture(scope="module")
def result(packages, data):
    return run_sweep(packages, batches=(1, 4), threads=(1,), data=data, runs=6)


def test_every_pair_is_measured_and_the_first_is_the_result(result):
    assert [(s["batch"], s["threads"]) for s in result["settings"]] == [(1, 1), (4, 1)]
    assert result["batch"] == 1
    assert result["engines"] == result["settings"][0]["engines"]
    for setting in result["settings"]:
        assert [row["name"] for row in setting["engines"]] == ["float", "w8a8", "w4a4"]
        for row in setting["engines"]:
            latency = row["latency_ms"]
            assert latency["median_ms"] <= latency["p90_ms"] <= latency["p99_ms"]
            assert row["top1"]["images"] == 24
    assert result["engines"][0]["top1"]["percent"] == 75.0


def test_the_table_is_read_back(result):
    rows = list(csv.DictReader(io.StringIO(sweep_csv(result))))
    assert [(row["engine"], row["batch"]) for row in rows] == [
        (name, batch) for batch in ("1", "4") for name in ("float", "w8a8", "w4a4")
    ]
    last = result["settings"][1]["engines"][2]
    assert float(rows[5]["p50_ms"]) == last["latency_ms"]["median_ms"]
    assert float(rows[5]["speedup"]) == last["speedup"]["median"]
    assert float(rows[0]["top1"]) == 75.0
    assert None not in rows[0]


def test_the_page_stands_alone_and_has_every_engine(result):
    reader = Page(sweep_html(result))
    text = "\n".join(reader.text)
    assert reader.references == []
    assert reader.tags.count("svg") == 3  # throughput, and latency at each setting
    for word in ("w8a8", "w4a4", "float", "batch size", "75.00 ± 17.32", result["energy"]):
        assert word in text
    assert any(line.startswith("energy: ") for line in describe_sweep(result))


def test_one_setting_has_no_throughput_over_batches(packages):
    single = run_sweep(packages[:1], threads=(1,), runs=5)
    assert Page(sweep_html(single)).tags.count("svg") == 1
    assert "top-1" not in "\n".join(describe_sweep(single))


def test_the_command_writes_both_files(packages, tmp_path, capsys):
    files = [tmp_path / "b.csv", tmp_path / "b.html"]
    words = ["bench", str(packages[0]), "--batch", "1,2", "--threads", "1", "--runs", "5"]
    assert main([*words, "--csv", str(files[0]), "--html", str(files[1]), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["settings"]) == 2
    assert files[0].read_text().count("\n") == 5
    Page(files[1].read_text())
    words[3] = "1"
    assert main([*words, "--csv", str(tmp_path / "missing" / "b.csv")]) == 8


@pytest.mark.parametrize("batch", ["0", "1,", "a", "1,-2", ""])
def test_a_malformed_list_is_a_usage_error(batch, packages, capsys):
    assert main(["bench", str(packages[0]), "--batch", batch]) == 2
    assert "expected positive numbers" in capsys.readouterr().err


def test_top1_of_packages_that_preprocess_in_other_ways_is_refused(packages, data, tmp_path):
    image = {"size": list(SIZE), "mean": [0.1] * 3, "std": [0.25] * 3}
    write_tiny_package(tmp_path / "other", manifest={"image": image})
    with pytest.raises(UsageError, match="preprocess images in other ways"):
        run_sweep([packages[0], tmp_path / "other"], data=data, runs=5)
