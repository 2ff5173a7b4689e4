import os

import numpy as np
import pytest

from dfqc.backends import ort
from dfqc.compiler import bench
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import EnvironmentFault, LoadError, UsageError
from qdq_models import SIZE, tiny_net, write_tiny_package

IMAGES = np.zeros((2, 3, 4, 4), np.float32)


class Clock:
    """Time that passes only while an engine runs."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def engine(self, name, seconds):
        clock = self

        class Engine:
            def infer(self, images):
                clock.calls.append(name)
                clock.now += seconds(clock.calls.count(name)) if callable(seconds) else seconds

        return Engine()


def test_samples_are_the_milliseconds_of_each_call():
    clock = Clock()
    engines = {"a": clock.engine("a", 0.002), "b": clock.engine("b", 0.004)}
    samples = bench.sample(engines, IMAGES, runs=20, warmup=3, seconds=60, clock=clock)
    np.testing.assert_allclose(samples["a"], np.full(20, 2.0))
    np.testing.assert_allclose(samples["b"], np.full(20, 4.0))


def test_engines_take_turns_and_each_begins_as_often():
    clock = Clock()
    engines = {name: clock.engine(name, 0.1) for name in ("a", "b", "c")}
    bench.sample(engines, IMAGES, runs=6, warmup=1, seconds=60, clock=clock)
    assert "".join(clock.calls) == "abc" + "abcbcacab" * 2


def test_the_first_call_of_a_turn_is_not_counted_where_calls_are_short():
    clock = Clock()
    cold = clock.engine("a", lambda call: 0.5 if (call - 4) % 11 == 0 else 0.001)
    samples = bench.sample({"a": cold}, IMAGES, runs=30, warmup=3, seconds=60, clock=clock)
    np.testing.assert_allclose(samples["a"], np.full(30, 1.0))
    assert len(clock.calls) == 3 + 30 + 3  # warm-up, timed, one uncounted call for each turn


def test_time_limits_slow_engines_but_not_below_a_few_turns():
    clock = Clock()
    slow = {"a": clock.engine("a", 10.0)}
    assert len(bench.sample(slow, IMAGES, runs=100, seconds=1, clock=clock)["a"]) == 5
    assert len(bench.sample(slow, IMAGES, runs=100, seconds=75, clock=clock)["a"]) == 8


def test_summary_is_of_the_samples():
    samples = np.arange(1.0, 102.0)
    latency = bench.summarize(samples, batch=4, threads=2, warmup=7)
    assert (latency.median_ms, latency.p90_ms, latency.mean_ms) == (51.0, 91.0, 51.0)
    assert (latency.batch, latency.threads, latency.runs, latency.warmup) == (4, 2, 101, 7)


def test_measure_makes_one_input_for_all():
    clock, made = Clock(), []
    engines = {"a": clock.engine("a", 0.1), "b": clock.engine("b", 0.1)}

    def make(batch):
        made.append(batch)
        return np.zeros((batch, 3, 4, 4), np.float32)

    result = bench.measure(engines, make, batch=8, threads=3, runs=5, warmup=1)
    assert made == [8]
    assert {(r.batch, r.threads, r.runs) for r in result.values()} == {(8, 3, 5)}


def test_speedup_by_medians_and_by_best_calls():
    ratio = bench.speedup(np.array([4.0, 8.0, 9.0]), np.array([1.0, 2.0, 3.0]))
    assert ratio == {"median": 4.0, "best": 4.0}
    # One disturbed reference: the medians still see it, the best calls do not.
    ratio = bench.speedup(np.array([4.0, 80.0, 90.0]), np.array([1.0, 2.0, 3.0]))
    assert ratio == {"median": 40.0, "best": 4.0}


def test_random_images_are_normalized_pixels_and_always_the_same():
    spec = ImageSpec((3, 16, 16), (0.4, 0.5, 0.6), (0.1, 0.2, 0.5))
    images = bench.random_images(spec, 8)
    assert images.shape == (8, 3, 16, 16)
    assert images.dtype == np.float32
    pixels = images * np.array(spec.std).reshape(3, 1, 1) + np.array(spec.mean).reshape(3, 1, 1)
    assert -1e-6 <= pixels.min() < 0.01
    assert 0.99 < pixels.max() <= 1 + 1e-6
    np.testing.assert_array_equal(images, bench.random_images(spec, 8))


def test_nothing_to_time_is_an_error():
    with pytest.raises(UsageError, match="nothing to time"):
        bench.sample({}, IMAGES)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    write_tiny_package(folder / "w8a8")
    write_tiny_package(folder / "w4a4", weight=4, act=4)
    return folder


def test_packages_are_compared_with_the_float_model(packages):
    folders = [packages / "w8a8", packages / "w4a4"]
    result = bench.run_bench(folders, batch=2, threads=1, runs=6)
    rows = {row["name"]: row for row in result["engines"]}
    assert list(rows) == ["float", "w8a8", "w4a4"]
    assert (result["reference"], result["batch"], result["threads"]) == ("float", 2, 1)
    for row in rows.values():
        latency = row["latency_ms"]
        assert latency["runs"] >= 6
        assert 0 < latency["best_ms"] <= latency["median_ms"] <= latency["p90_ms"]
        assert row["images_per_second"] == pytest.approx(2000 / latency["median_ms"])
        reference = rows["float"]["latency_ms"]
        assert row["speedup"]["median"] == pytest.approx(
            reference["median_ms"] / latency["median_ms"]
        )
        assert row["load_ms"] > 0
        assert 0 <= row["engine_bytes"] < row["peak_rss_bytes"]
        assert row["model_bytes"] == os.path.getsize(row["model"])  # noqa: PTH202
        assert row["top1"] is None
    lines = bench.describe_bench(result)
    assert len(lines) == 3 + len(rows)
    assert "1.00 (1.00)" in lines[3]


def test_the_float_model_in_half_precision_is_a_row_of_its_own(tmp_path):
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("OpenVINO has no bfloat16 kernels on this processor")
    write_tiny_package(tmp_path / "net", manifest={"target": "openvino"})
    result = bench.run_bench([tmp_path / "net"], threads=1, runs=5)
    assert [row["name"] for row in result["engines"]] == ["float", "float bf16", "net"]
    half = result["engines"][1]
    assert half["model"] == result["engines"][0]["model"]
    assert half["load_ms"] > 0
    assert half["speedup"]["median"] == pytest.approx(
        result["engines"][0]["latency_ms"]["median_ms"] / half["latency_ms"]["median_ms"]
    )


def test_half_precision_that_cannot_be_had_costs_its_row_only(packages, monkeypatch, caplog):
    def refuse(model, *, threads=None):
        raise EnvironmentFault("no onnx-ir here")

    monkeypatch.setattr(ort, "open_half", refuse)
    result = bench.run_bench([packages / "w8a8"], threads=1, runs=5)
    assert [row["name"] for row in result["engines"]] == ["float", "w8a8"]
    assert "half precision: no onnx-ir here" in caplog.text


def test_without_a_float_model_the_first_package_is_the_reference(packages, tmp_path):
    folder = tmp_path / "alone"
    write_tiny_package(folder)
    (folder / "float.onnx").unlink()
    result = bench.run_bench([folder, packages / "w4a4"], threads=1, runs=5)
    assert [row["name"] for row in result["engines"]] == ["alone", "w4a4"]
    assert result["reference"] == "alone"


def test_packages_of_one_name_are_told_apart(packages, tmp_path):
    twin = tmp_path / "w8a8"
    write_tiny_package(twin)
    result = bench.run_bench([packages / "w8a8", twin], threads=1, runs=5)
    names = [row["name"] for row in result["engines"]]
    assert names == ["float", str(packages / "w8a8"), str(twin)]


def test_packages_of_other_input_sizes_are_refused(packages, tmp_path):
    image = {"size": [3, 9, 9], "mean": [0.5] * 3, "std": [0.5] * 3}
    write_tiny_package(tmp_path / "other", manifest={"image": image})
    with pytest.raises(UsageError, match=r"\(3, 9, 9\)"):
        bench.run_bench([packages / "w8a8", tmp_path / "other"], runs=1)


def test_an_engine_that_cannot_run_is_an_environment_fault(tmp_path):
    image = {"size": [3, 9, 9], "mean": [0.5] * 3, "std": [0.5] * 3}
    write_tiny_package(tmp_path / "broken", manifest={"image": image})
    with pytest.raises(EnvironmentFault, match=r"expected n×3×8×8"):
        bench.run_bench([tmp_path / "broken"], runs=1)


def test_a_missing_float_model_is_refused(packages, tmp_path):
    with pytest.raises(LoadError, match="no such file"):
        bench.run_bench([packages / "w8a8"], float_model=tmp_path / "none.onnx", runs=1)


def test_no_packages_is_a_usage_error():
    with pytest.raises(UsageError, match="no packages"):
        bench.run_bench([])


def test_the_float_model_can_be_given(packages, tmp_path):
    control = tmp_path / "control.onnx"
    control.write_bytes(tiny_net(float32=True, seed=9).data)
    result = bench.run_bench([packages / "w8a8"], float_model=control, threads=1, runs=5)
    assert result["engines"][0]["model"] == str(control)
    assert result["input"] == list(SIZE)


def test_the_provider_reaches_the_process_that_measures_load_and_memory(packages):
    result = bench.run_bench([packages / "w8a8"], threads=1, runs=5, provider="cpu")
    assert [row["provider"] for row in result["engines"]] == ["cpu", "cpu"]
    assert "ONNX Runtime on cpu" in bench.describe_bench(result)[0]
    # no runner is opened in this process before: the fault is that of the other one
    with pytest.raises(EnvironmentFault, match=r"images: --provider cuda: ONNX Runtime .* has no"):
        bench.run_bench([packages / "w8a8"], threads=1, runs=5, provider="cuda")
