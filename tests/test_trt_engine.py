"""Engine build and runner against the API of TensorRT 10 and 11; no engine has been built for real.

The fake has the names of the two versions and nothing else (`fixtures/trt_api.json`).
"""

import ast
import types
from pathlib import Path

import numpy as np
import pytest

import fake_trt
import quantized
import trt_files as files
from dfqc.backends import _trt_api, _trt_engine, _trt_run, trt
from dfqc.compiler.errors import EnvironmentFault, LoadError, UnsupportedError
from dfqc.compiler.finish import EngineOptions

BACKENDS = Path(trt.__file__).parent

each_version = pytest.mark.parametrize("version", fake_trt.VERSIONS)


@pytest.fixture
def world(request, monkeypatch):
    return fake_trt.install(monkeypatch, request.param)


both = pytest.mark.parametrize("world", fake_trt.VERSIONS, indirect=True)


# --- names


def used_names():
    """Every `trt.X.y` in the backends, as far as it goes."""
    found = set()
    for path in sorted(BACKENDS.glob("_trt_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = chain(node)
            if parts and parts[0] == "trt":
                found.add(tuple(parts[1:]))
            if parts and parts[:2] == ["self", "_trt"] and len(parts) > 2:
                found.add(tuple(parts[2:]))
    return {tuple(p for p in names if not p.startswith("__")) for names in found} - {()}


def chain(node):
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) and parts else []


def resolves(api, names):
    first, *rest = names
    if first not in api["names"]:
        return False
    if not rest:
        return True
    known = api["enums"].get(first) or api["classes"].get(first, {})
    if rest[0] not in known:
        return False
    return len(rest) == 1 or rest[1] in api["enums"].get(f"{first}.{rest[0]}", ())


@each_version
def test_every_name_exists(version):
    names = used_names()
    assert {("BuilderFlag", n) for n in ("VERSION_COMPATIBLE", "SPARSE_WEIGHTS")} <= names
    assert ("ILogger", "Severity", "ERROR") in names
    assert len(names) > 15
    missing = [n for n in names if not resolves(fake_trt.API[version], n)]
    assert missing == []


@each_version
@pytest.mark.parametrize(
    "names", [("BuilderFlag", "INT9"), ("IInt8Calibrator2",), ("DataType", "DOUBLE")]
)
def test_a_name_that_does_not_exist_is_noticed(version, names):
    assert not resolves(fake_trt.API[version], names)


def test_names_that_eleven_removed_are_noticed():
    old, new = (fake_trt.API[v] for v in fake_trt.VERSIONS)
    for names in (("BuilderFlag", "INT8"), ("BuilderFlag", "FP16"), ("IInt8Calibrator",)):
        assert resolves(old, names)
        assert not resolves(new, names)


@both
def test_the_fake_refuses_what_a_version_has_not(world):
    import tensorrt

    config = tensorrt.IBuilderConfig()
    with pytest.raises(AttributeError):
        config.set_precision(8)
    with pytest.raises(AttributeError):
        config.max_batch_size = 8
    with pytest.raises(TypeError):
        config.set_flag(1, 2, 3)


# --- build


def options(tmp_path, **changes):
    return EngineOptions(**{"batches": (8, 1, 32), "cache_dir": tmp_path} | changes)


@both
def test_a_build_makes_the_documented_calls(world, tmp_path):
    import tensorrt

    wanted = options(
        tmp_path, workspace=2**30, level=5, version_compatible=True, hardware="ampere-plus"
    )
    assert _trt_engine.build_plan(files.written(), wanted)
    typed = int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert world.called("Builder.create_network") == [(1 << typed,)]
    assert world.called("IBuilderConfig.set_flag") == [(tensorrt.BuilderFlag.VERSION_COMPATIBLE,)]
    assert world.called("IBuilderConfig.hardware_compatibility_level") == [
        (tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS,)
    ]
    assert world.called("IBuilderConfig.profiling_verbosity") == [
        (tensorrt.ProfilingVerbosity.DETAILED,)
    ]
    limit = (tensorrt.MemoryPoolType.WORKSPACE, 2**30)
    assert world.called("IBuilderConfig.set_memory_pool_limit") == [limit]
    assert world.called("IBuilderConfig.builder_optimization_level") == [(5,)]
    shapes = world.called("IOptimizationProfile.set_shape")
    assert [(a[0], *(d[0] for d in a[1:])) for a in shapes] == [
        ("input", 1, 1, 1),
        ("input", 2, 8, 8),
        ("input", 9, 32, 32),
    ]
    assert {a[1][1:] for a in shapes} == {(3, 16, 16)}


@both
def test_other_gpus_are_asked_for_by_name_only(world, tmp_path, monkeypatch):
    """Early versions 10 do not have all levels: what nobody asks for is not looked up."""
    import tensorrt

    monkeypatch.setattr(tensorrt, "HardwareCompatibilityLevel", types.SimpleNamespace())
    assert _trt_engine.build_plan(files.written(), options(tmp_path))
    assert world.called("IBuilderConfig.hardware_compatibility_level") == []
    with pytest.raises(UnsupportedError, match=r"--hardware same-compute: TensorRT .* no such"):
        _trt_engine.build_plan(files.written(), options(tmp_path, hardware="same-compute"))


@both
@pytest.mark.parametrize(
    ("sparsity", "allowed"), [("2:4", True), ("4:8", False), ("0.5", False), (None, False)]
)
def test_zeros_of_two_in_four_may_be_skipped(world, tmp_path, sparsity, allowed):
    import tensorrt

    model = files.written(sparsity=sparsity)
    _trt_engine.build_plan(model, options(tmp_path))
    flags = [(tensorrt.BuilderFlag.SPARSE_WEIGHTS,)] if allowed else []
    assert world.called("IBuilderConfig.set_flag") == flags
    world.calls.clear()
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    trt.open_runner(path).close()  # built in memory
    assert world.called("IBuilderConfig.set_flag") == flags
    plan = tmp_path / "model.plan"
    about, _ = trt.build_engine(path, plan, options(tmp_path))
    assert about["sparse_weights"] is allowed


@both
def test_measured_kernels_are_kept_by_gpu_and_version(world, tmp_path):
    path = _trt_engine.timing_cache_file(tmp_path, fake_trt.DRIVER.gpu, world.version)
    assert path.name == f"nvidia-fake-4090-{world.version}.timing"
    for _ in range(2):
        _trt_engine.build_plan(files.written(), options(tmp_path))
    assert [a[0] for a in world.called("IBuilderConfig.create_timing_cache")] == [b"", b"measured;"]
    assert path.read_bytes() == b"measured;measured;"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@both
def test_a_stale_timing_cache_is_replaced(world, tmp_path):
    path = _trt_engine.timing_cache_file(tmp_path, fake_trt.DRIVER.gpu, world.version)
    path.parent.mkdir()
    path.write_bytes(b"of another driver")
    world.stale_cache = True
    _trt_engine.build_plan(files.written(), options(tmp_path))
    assert path.read_bytes() == b"measured;"
    assert all(not ignore for _, ignore in world.called("IBuilderConfig.set_timing_cache"))


@both
def test_what_the_parser_refuses_names_the_node(world, tmp_path):
    world.parse_errors = [("layer1.conv", "Conv", "weights of type X"), ("", "Einsum", "no")]
    with pytest.raises(UnsupportedError, match=r"layer1\.conv: weights of type X; Einsum: no"):
        _trt_engine.build_plan(files.written(), options(tmp_path))


@both
def test_what_the_builder_says_is_in_the_fault(world, tmp_path):
    world.build_fails = True
    with pytest.raises(UnsupportedError, match="no implementation for node conv"):
        _trt_engine.build_plan(files.written(), options(tmp_path))


@pytest.mark.parametrize(
    ("batches", "expected"),
    [((1,), [(1, 1, 1)]), ((8,), [(1, 8, 8)]), ((4, 1, 4), [(1, 1, 1), (2, 4, 4)])],
)
def test_profiles_leave_no_gap(batches, expected):
    assert _trt_engine.ranges(batches) == expected


# --- run


@pytest.fixture
def plan(world, tmp_path):
    """A package's two files."""
    (tmp_path / "model.onnx").write_bytes(files.written())
    path = tmp_path / "model.plan"
    path.write_bytes(_trt_engine.build_plan(files.written(), options(tmp_path, batches=(1, 4))))
    return path


@both
def test_a_runner_feeds_pieces_to_the_profile_that_takes_them(world, plan, tmp_path):
    images = quantized.calib(9, seed=3).images.numpy()
    runner = trt.open_runner(plan)
    found = runner.infer(images)
    expected = trt.rehearse(tmp_path / "model.onnx", images)
    assert np.abs(found - expected).max() < 1e-6  # float sums depend on the batch
    chosen = [a[0] for a in world.called("IExecutionContext.set_optimization_profile_async")]
    assert chosen == [1, 0]  # 4 + 4 + 1
    assert world.called("Runtime.engine_host_code_allowed") == [(False,)]
    runner.close()
    import cuda.bindings.runtime

    assert not cuda.bindings.runtime.held  # every buffer was freed


@both
def test_inner_codes_come_from_an_engine_that_has_them_as_outputs(world, plan, tmp_path):
    images = quantized.calib(2, seed=3).images.numpy()
    model = files.good()
    tap = files.input_q(model, "inner").output[0]
    runner = trt.open_runner(plan)
    values = runner.codes(images, [tap])
    expected = files.quantized.ort.open_runner(
        tmp_path / "model.onnx", threads=1, as_written=True
    ).codes(images, [tap])
    assert values[tap].dtype == np.int8
    assert np.array_equal(values[tap], expected[tap])
    assert np.array_equal(values["output"], expected["output"])
    with pytest.raises(UnsupportedError, match="no values nowhere"):
        runner.codes(images, ["nowhere"])
    runner.close()


@both
def test_times_are_taken_without_copies_and_per_layer(world, plan):
    runner = trt.open_runner(plan)
    assert len(runner.latencies(4, warmup=1, runs=5)) == 5
    assert runner.layer_times(1, runs=3)["inner"] == 0.25
    with pytest.raises(LoadError, match="its profiles take 1 to 1, 2 to 4"):
        runner.latencies(5)
    runner.close()


@both
def test_a_plan_of_another_version_is_a_fault_with_a_mend(world, plan):
    plan.write_bytes(b"not a plan")
    with pytest.raises(LoadError, match=r"magic tag does not match.*run dfqc engine PACKAGE here"):
        trt.open_runner(plan)


@both
def test_what_executes_a_layer_is_read_from_the_engine(world, plan):
    found = trt.executed(plan, {"inner": "inner", "gone": "gone"})
    assert found == {
        "inner": "CaskConvolution int8 -> int8, sm80_xmma_fprop_i8",
        "gone": "not found in the engine",
    }


# --- what is missing


def test_without_tensorrt_nothing_is_available():
    usable, reason = trt.available()
    assert (usable, reason) == (False, "tensorrt is not installed")


@both
def test_with_tensorrt_and_a_driver_it_is(world):
    assert trt.available() == (True, f"TensorRT {world.version}, NVIDIA Fake 4090, CUDA 12.8")


@both
def test_without_a_driver_nothing_is_deserialized(world, plan, monkeypatch):
    monkeypatch.setattr(_trt_api, "probe", lambda: (None, "no NVIDIA driver"))
    with pytest.raises(EnvironmentFault, match=r"no NVIDIA driver.*dfqc engine PACKAGE"):
        _trt_run.open_runner(plan)
    assert world.called("Runtime.deserialize_cuda_engine") == []
    assert trt.available()[0] is False


@both
def test_an_unknown_version_is_refused(world, monkeypatch):
    import tensorrt

    monkeypatch.setattr(tensorrt, "__version__", "8.6.1")
    usable, reason = trt.available()
    assert not usable
    assert "got TensorRT 8.6.1, expected a full 10 or 11.x" in reason


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "asking the NVIDIA driver crashed (signal 11)"),
        ("raise SystemExit('the NVIDIA driver knows no GPU')", "the NVIDIA driver knows no GPU"),
    ],
)
def test_a_driver_that_crashes_takes_nobody_down(monkeypatch, code, reason):
    monkeypatch.setattr(_trt_api, "_PROBE", code)
    assert _trt_api.probe.__wrapped__() == (None, reason)


def test_a_driver_that_answers_is_read(monkeypatch):
    answer = '{"gpu": "A", "capability": "8.6", "cuda": "12.8"}'
    monkeypatch.setattr(_trt_api, "_PROBE", f"print('{answer}')")
    assert _trt_api.probe.__wrapped__() == (_trt_api.Driver("A", "8.6", "12.8"), "")


def test_the_question_to_the_driver_is_sound():
    """It runs to its end on this machine, with a driver or without one."""
    driver, reason = _trt_api.probe.__wrapped__()
    assert (driver is None) == bool(reason)
    assert "Traceback" not in reason
    assert driver is not None or "NVIDIA driver" in reason
