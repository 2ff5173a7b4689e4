"""`dfqc engine`: a package in, the same with its engine out; against the fake TensorRT."""

import dataclasses
import json

import numpy as np
import onnx
import pytest

import fake_trt
import quantized
import trt_files as files
from command import Workspace, build, run
from dfqc.backends import _trt_finish, _trt_run, trt
from dfqc.compiler import finish, package, verify_package
from dfqc.compiler.cli import main
from dfqc.compiler.errors import EnvironmentFault, UnsupportedError, UsageError
from dfqc.compiler.simulate import TorchRunner, simulated
from qdq_models import tiny_manifest, write_tiny_package

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


@pytest.fixture
def unfinished(tmp_path):
    """A package of the `trt` target as a build without TensorRT leaves it."""
    graph, state = files.state("w8a8")
    images = quantized.calib(6, seed=3).images.numpy()
    outputs = TorchRunner(simulated(graph, state)).infer(images)
    golden = tmp_path / "golden.npz"
    verify_package.write_golden(golden, verify_package.Golden(images, outputs, {}, {}, {}))
    manifest = tiny_manifest(
        target="trt",
        exit_code=8,
        status="failed",
        notes=["Not verified: no TensorRT here", "Preprocessing was assumed"],
        gates=[{"name": "rules", "value": 0, "limit": 0, "passed": True}],
        layers=[{"name": "inner", "op": "Conv2d", "executed": None}],
        metrics={"latency_ms": {"float": None, "engine": None}},
    )
    contents = {"model.onnx": files.written("w8a8"), "golden.npz": golden, "layers.csv": b"",
                "triton/net/config.pbtxt": b"", "triton/net/1/model.onnx": b""}  # fmt: skip
    package.write_package(tmp_path / "net", manifest, contents)
    return tmp_path / "net"


def test_without_tensorrt_it_says_what_is_missing(unfinished, capsys):
    before = (unfinished / "manifest.json").read_bytes()
    assert main(["engine", str(unfinished)]) == 8
    said = capsys.readouterr().err
    assert "tensorrt is not installed" in said
    assert "Traceback" not in said
    assert (unfinished / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("version", fake_trt.VERSIONS)
def test_a_package_is_finished_in_place(unfinished, capsys, monkeypatch, version, tmp_path):
    fake_trt.install(monkeypatch, version)
    code = main(["engine", str(unfinished), "--batch", "1,8", "--cache-dir", str(tmp_path),
                 "--json"])  # fmt: skip
    streams = capsys.readouterr()
    assert code == 0, streams.err
    manifest = json.loads(streams.out)
    assert manifest == json.loads((unfinished / "manifest.json").read_text())
    assert (manifest["engine"], manifest["status"], manifest["exit_code"]) == (
        "model.plan", "passed", 0
    )  # fmt: skip
    assert manifest["build"]["profiles"] == [[1, 1, 1], [2, 8, 8]]
    assert set(manifest["build"]["latency_ms"]) == {"1", "8"}
    assert manifest["build"]["layer_ms"]["inner"] == 0.25
    assert (unfinished / "layers.csv").read_text().splitlines()[1].endswith(",0.25")
    assert "profiled at batch 1" in (unfinished / "report.html").read_text()
    (layer,) = manifest["layers"]
    assert layer["executed"].startswith("CaskConvolution int8 -> int8")
    assert manifest["parity"]["passed"] is True
    assert manifest["metrics"]["latency_ms"]["engine"] > 0
    assert manifest["notes"] == ["Preprocessing was assumed"]
    opened = package.open_package(unfinished)
    assert package.file_faults(opened) == []
    assert {"model.plan", "engine.layers.json", "triton/net/1/model.plan"} <= set(manifest["files"])
    assert "triton/net/1/model.onnx" not in manifest["files"]
    served = (unfinished / "triton" / "net" / "config.pbtxt").read_text()
    assert 'platform: "tensorrt_plan"' in served
    found = trt.open_runner(opened.engine).infer(np.zeros((1, 3, 16, 16), np.float32))
    assert found.shape == (1, 10)


def test_an_engine_that_computes_something_else_fails_the_parity_gate(
    unfinished, capsys, monkeypatch, tmp_path
):
    fake_trt.install(monkeypatch, fake_trt.VERSIONS[0])
    honest = _trt_run.Runner.infer
    monkeypatch.setattr(_trt_run.Runner, "infer", lambda self, images: -honest(self, images))
    assert main(["engine", str(unfinished), "--cache-dir", str(tmp_path), "--json"]) == 7
    manifest = json.loads(capsys.readouterr().out)
    assert (manifest["status"], manifest["exit_code"]) == ("failed", 7)
    assert [g["passed"] for g in manifest["gates"] if g["name"] == "parity"] == [False]
    assert (unfinished / "model.plan").is_file()


def test_a_speed_gate_stays_open_without_a_float_control(unfinished, monkeypatch, tmp_path):
    fake_trt.install(monkeypatch, fake_trt.VERSIONS[1])
    opened = package.open_package(unfinished)
    gate = {"name": "min_speedup", "value": None, "limit": 1.5, "passed": False}
    manifest = {k: v for k, v in opened.manifest.items() if k != "files"} | {"gates": [gate]}
    contents = {name: unfinished / name for name in opened.manifest["files"]}
    package.write_package(tmp_path / "gated", manifest, contents)
    done = finish.run_engine(tmp_path / "gated", finish.EngineOptions(cache_dir=tmp_path))
    assert (done["status"], done["exit_code"]) == ("failed", 8)
    assert gate in done["gates"]


@pytest.fixture
def controlled(unfinished, tmp_path):
    """The same with its float model, and a gate that only a measured speed-up closes."""

    def make(limit):
        opened = package.open_package(unfinished)
        gate = {"name": "min_speedup", "value": None, "limit": limit, "passed": False}
        kept = {k: v for k, v in opened.manifest.items() if k != "files"} | {"gates": [gate]}
        kept["metrics"] = {"latency_ms": {"pruned": 2.0, "pruned_speedup": 1.3}}  # of the build
        contents = {name: unfinished / name for name in opened.manifest["files"]}
        graph, _ = files.state("w8a8")
        contents["float.onnx"] = trt.lower_float(graph)
        package.write_package(tmp_path / "controlled", kept, contents)
        return tmp_path / "controlled"

    return make


@pytest.mark.parametrize("version", fake_trt.VERSIONS)
@pytest.mark.parametrize(("limit", "code"), [(1e-6, 0), (1e6, 6)])
def test_the_float_model_is_timed_in_both_precisions(
    controlled, capsys, monkeypatch, version, limit, code, tmp_path
):
    world = fake_trt.install(monkeypatch, version)
    folder = controlled(limit)
    said = main(["engine", str(folder), "--batch", "1,4", "--cache-dir", str(tmp_path), "--json"])
    streams = capsys.readouterr()
    assert said == code, streams.err
    manifest = json.loads(streams.out)
    assert (manifest["exit_code"], manifest["status"]) == (code, "failed" if code else "passed")
    controls = manifest["build"]["controls"]
    assert {name: set(rows) for name, rows in controls.items()} == {
        "float": {"1", "4"}, "fp16": {"1", "4"}
    }  # fmt: skip
    latency = manifest["metrics"]["latency_ms"]
    assert latency["float"] == controls["float"]["1"]["median_ms"]
    assert latency["half"] == controls["fp16"]["1"]["median_ms"]
    assert latency["half_precision"] == "fp16"
    engine = manifest["build"]["latency_ms"]["1"]["median_ms"]
    assert latency["speedup"] == pytest.approx(latency["float"] / engine)
    assert latency["half_speedup"] == pytest.approx(latency["half"] / engine)
    (gate,) = [g for g in manifest["gates"] if g["name"] == "min_speedup"]
    assert (gate["value"], gate["passed"]) == (latency["speedup"], code == 0)
    assert "fp16 " in "\n".join(finish.describe_engine(manifest))
    assert ("too slow" in streams.err) == (code == 6)
    models = [onnx.load_from_string(a[0]) for a in world.called("OnnxParser.parse")]
    types = [{i.data_type for i in m.graph.initializer} & {FLOAT, HALF} for m in models]
    assert types == [{FLOAT}, {FLOAT}, {HALF}]
    # every buffer was freed
    import cuda.bindings.runtime

    assert not cuda.bindings.runtime.held


def test_what_is_built_is_told_on_the_way(controlled, monkeypatch, tmp_path):
    fake_trt.install(monkeypatch, fake_trt.VERSIONS[0])
    told = []
    options = finish.EngineOptions(cache_dir=tmp_path)
    finish.run_engine(controlled(1e-6), options, lambda *step: told.append(step))
    assert [note for _, _, note in told] == [
        "engine", "float control", "fp16 control", "timing", "timing"
    ]  # fmt: skip
    assert [done for done, _, _ in told] == [0, 1, 2, 3, 4]


def test_controls_can_be_left_out(controlled, monkeypatch, tmp_path):
    world = fake_trt.install(monkeypatch, fake_trt.VERSIONS[0])
    options = finish.EngineOptions(cache_dir=tmp_path, controls=False)
    done = finish.run_engine(controlled(1.5), options)
    assert (done["exit_code"], done["build"]["controls"]) == (8, {})
    assert len(world.called("OnnxParser.parse")) == 1


def test_a_second_run_forgets_the_first_ones_controls(controlled, monkeypatch, tmp_path):
    fake_trt.install(monkeypatch, fake_trt.VERSIONS[0])
    folder = controlled(1e6)
    options = finish.EngineOptions(cache_dir=tmp_path)
    assert finish.run_engine(folder, options)["exit_code"] == 6
    done = finish.run_engine(folder, dataclasses.replace(options, controls=False))
    latency = done["metrics"]["latency_ms"]
    assert [latency[n] for n in ("float", "speedup", "half", "half_speedup")] == [None] * 4
    assert latency["engine"] > 0
    assert (latency["pruned"], latency["pruned_speedup"]) == (None, 1.3)
    (gate,) = [g for g in done["gates"] if g["name"] == "min_speedup"]
    assert (gate["value"], gate["passed"], done["exit_code"]) == (None, False, 8)


def test_parity_that_holds_again_mends_the_exit_code(controlled, monkeypatch, tmp_path):
    fake_trt.install(monkeypatch, fake_trt.VERSIONS[0])
    folder, options = controlled(1e-6), finish.EngineOptions(cache_dir=tmp_path)
    honest = _trt_run.Runner.infer
    with monkeypatch.context() as patch:
        patch.setattr(_trt_run.Runner, "infer", lambda self, images: -honest(self, images))
        assert finish.run_engine(folder, options)["exit_code"] == 7
    done = finish.run_engine(folder, options)
    assert (done["status"], done["exit_code"]) == ("passed", 0)


@pytest.mark.parametrize("fault", [UnsupportedError, EnvironmentFault])
def test_a_control_that_is_refused_costs_nothing_else(controlled, monkeypatch, fault, tmp_path):
    fake_trt.install(monkeypatch, fake_trt.VERSIONS[1])

    def refuse(model):
        raise fault("no float16 here")

    monkeypatch.setattr(_trt_finish, "half_model", refuse)
    done = finish.run_engine(controlled(1e-6), finish.EngineOptions(cache_dir=tmp_path))
    assert done["exit_code"] == 0
    assert set(done["build"]["controls"]) == {"float"}
    assert done["build"]["controls_refused"] == {"fp16": "no float16 here"}
    assert done["metrics"]["latency_ms"].get("half") is None


def test_the_float16_control_computes_what_the_float_model_does(monkeypatch, tmp_path):
    fake_trt.install(monkeypatch, fake_trt.VERSIONS[0])
    graph, _ = files.state("w8a8")
    path = tmp_path / "float.onnx"
    path.write_bytes(trt.lower_float(graph))
    images = quantized.calib(4, seed=3).images.numpy()
    name, half = trt.open_half(path)
    whole = trt.open_runner(path)
    found, expected = half.infer(images), whole.infer(images)
    assert name == "fp16"
    assert found.dtype == np.float32
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < 5e-3  # it is float16, and no other model
    half.close()
    whole.close()


def test_a_changed_package_is_not_finished(unfinished, capsys, monkeypatch):
    fake_trt.install(monkeypatch, fake_trt.VERSIONS[0])
    (unfinished / "layers.csv").write_text("changed")
    assert main(["engine", str(unfinished)]) == 3
    assert "layers.csv: changed" in capsys.readouterr().err


def test_only_a_version_compatible_plan_may_bring_code(unfinished, monkeypatch, tmp_path):
    world = fake_trt.install(monkeypatch, fake_trt.VERSIONS[1])
    for wanted in (False, True):
        options = finish.EngineOptions(cache_dir=tmp_path, version_compatible=wanted)
        finish.run_engine(unfinished, options)
        world.calls.clear()
        trt.open_runner(unfinished / "model.plan").close()
        assert world.called("Runtime.engine_host_code_allowed") == [(wanted,)]


def test_a_target_that_runs_the_model_has_nothing_to_build(tmp_path, capsys):
    write_tiny_package(tmp_path / "tiny", manifest={"gates": []})
    before = (tmp_path / "tiny" / "manifest.json").read_bytes()
    assert main(["engine", str(tmp_path / "tiny")]) == 0
    assert "there is no engine to build" in capsys.readouterr().out
    assert (tmp_path / "tiny" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "0", "1,x", "-1", "1,,2"])
def test_batches_that_are_none_are_refused(text):
    with pytest.raises(UsageError, match="for example 1,8,32"):
        finish.parse_batches(text)


def test_options_of_the_command_line():
    options = finish.read_options("8, 1,8", hardware="same-compute", workspace="1g", level=3)
    assert (options.batches, options.hardware, options.level) == ((1, 8), "same-compute", 3)
    assert options.workspace == 2**30
    with pytest.raises(UsageError, match="none, ampere-plus, same-compute"):
        finish.read_options("1", hardware="blackwell")


# --- whole builds


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("trt"))


def test_a_build_without_tensorrt_delivers_a_checked_file_and_the_next_step(shared, capsys):
    manifest = build(capsys, shared, "--target", "trt", "--trt-base", "fp16", output="half")
    folder = shared.root / "half"
    assert (manifest["status"], manifest["exit_code"]) == ("passed", 0)
    assert manifest["target_check"]["findings"] == []
    assert {"name": "rules", "value": 0, "limit": 0, "passed": True} in manifest["gates"]
    rehearsal = manifest["target_check"]["rehearsal"]
    assert rehearsal["max_abs"] < 0.02 * rehearsal["largest_output"]
    assert f"dfqc engine {folder}" in manifest["notes"][0]
    assert manifest["recipe"]["trt-base"] == "fp16"
    report = (folder / "report.html").read_text()
    assert "Rules of the target" in report
    assert "every rule holds" in report
    assert run(capsys, shared, "engine", folder).code == 8
    done = run(capsys, shared, "verify", folder)
    assert (done.code, "dfqc engine" in done.user_fault) == (8, True)


def test_a_build_that_requires_an_engine_fails_without(shared, capsys):
    manifest = build(capsys, shared, "--target", "trt", "--require-engine", output="needed", code=8)
    assert (shared.root / "needed" / "model.onnx").is_file()
    assert (manifest["status"], manifest["exit_code"]) == ("failed", 8)


def test_a_speed_gate_needs_an_engine(shared, capsys):
    build(capsys, shared, "--target", "trt", "--min-speedup", "1.5", output="fast", code=8)


def test_a_file_that_breaks_a_rule_fails_and_is_kept(shared, capsys, monkeypatch):
    row = {"rule": "int4-conv", "node": "layer1.conv1", "message": "got INT4", "mend": "store int8",
           "severity": "error"}  # fmt: skip
    monkeypatch.setattr(trt, "check", lambda model: [row])
    manifest = build(
        capsys, shared, "--target", "trt", "--bits", "w8a8", "--seed", "3", output="bad", code=4
    )
    assert [g["passed"] for g in manifest["gates"] if g["name"] == "rules"] == [False]
    assert any("layer1.conv1" in note and "store int8" in note for note in manifest["notes"])
    assert (shared.root / "bad" / "model.onnx").is_file()
    assert "layer1.conv1" in (shared.root / "bad" / "report.html").read_text()


def test_the_base_goes_with_its_target(shared, capsys):
    done = run(capsys, shared, "build", *shared.weights(), "--trt-base", "fp16")
    assert done.code == 2
    assert "--target trt" in done.user_fault
