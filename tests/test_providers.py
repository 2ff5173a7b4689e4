"""Execution providers of ONNX Runtime: a stand-in lists those that need a GPU, cpu is real."""

import csv
import io
import json

import numpy as np
import onnxruntime
import pytest

from dfqc.backends import ort
from dfqc.compiler import abilities
from dfqc.compiler.cli import main
from dfqc.compiler.errors import EnvironmentFault, UsageError
from dfqc.compiler.providers import opener, provider_of
from qdq_models import SIZE, tiny_net, write_tiny_package

CPU = "CPUExecutionProvider"
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"


class Session:
    """A real session on the CPU that calls itself otherwise, as one on a GPU would."""

    def __init__(self, world, source, options, names):
        self.real = world.real(source, options, providers=[CPU])
        self.world, self.names = world, names

    def get_providers(self):
        return self.names

    def get_inputs(self):
        return self.real.get_inputs()

    def get_outputs(self):
        return self.real.get_outputs()

    def run(self, names, feed):
        if self.world.fault:
            raise self.world.fault
        return self.real.run(names, feed)


class World:
    """onnxruntime-gpu: what it lists, what starts, and what was asked of it."""

    def __init__(self, listed):
        self.listed, self.dead = listed, set()
        self.asked, self.fault, self.refused = [], None, None
        self.real = onnxruntime.InferenceSession

    def open(self, source, options, *, providers, enable_fallback):
        assert enable_fallback == 0  # else the runtime itself goes on with the CPU
        self.asked.append(providers)
        if self.refused:
            raise self.refused
        return Session(self, source, options, [n for n, _ in providers if n not in self.dead])


@pytest.fixture
def gpu(monkeypatch):
    world = World([TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: world.listed)
    monkeypatch.setattr(onnxruntime, "InferenceSession", world.open)
    return world


@pytest.fixture
def folder(tmp_path):
    write_tiny_package(tmp_path / "net")
    return tmp_path / "net"


@pytest.fixture
def data(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, *SIZE[1:], 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=pixels, labels=np.zeros(8, np.int64))
    return tmp_path / "data.npz"


def test_the_cpu_is_the_default_and_is_executed(store):
    net = tiny_net()
    for runner in (opener("ort", None)(store(net)), opener("ort", "cpu")(store(net))):
        assert provider_of(runner) == "cpu"
        np.testing.assert_allclose(runner.infer(net.images), net.outputs, rtol=0, atol=1e-6)
        runner.close()


@pytest.mark.parametrize(
    ("provider", "chain"),
    [("cpu", [CPU]), ("cuda", [CUDA, CPU]), ("tensorrt", [TENSORRT, CUDA, CPU])],
)
def test_the_chosen_one_comes_first_and_the_cpu_last(provider, chain, gpu, store):
    net = tiny_net()
    runner = ort.open_runner(store(net), threads=1, provider=provider)
    runner.codes(net.images, list(net.taps.values()))  # its second session is on the same
    assert [[name for name, _ in asked] for asked in gpu.asked] == [chain, chain]
    options = dict(gpu.asked[0])
    assert options.get(TENSORRT, {"trt_int8_enable": "1"}) == {"trt_int8_enable": "1"}
    assert provider_of(runner) == provider


def test_behind_tensorrt_comes_only_what_is_there(gpu, store):
    gpu.listed = [TENSORRT, CPU]
    ort.open_runner(store(tiny_net()), provider="tensorrt")
    assert [name for name, _ in gpu.asked[0]] == [TENSORRT, CPU]


def test_a_provider_that_is_not_there_says_which_are(store):
    with pytest.raises(EnvironmentFault, match="pip install onnxruntime-gpu") as fault:
        ort.open_runner(store(tiny_net()), provider="cuda")
    assert f"has no {CUDA} here, only {', '.join(ort.providers())};" in str(fault.value)


def test_a_provider_that_does_not_start_is_no_silent_cpu(gpu, store):
    gpu.dead = {CUDA}
    with pytest.raises(EnvironmentFault, match=f"did not start, the session has {CPU}"):
        ort.open_runner(store(tiny_net()), provider="cuda")
    gpu.dead = {TENSORRT}
    with pytest.raises(EnvironmentFault, match=f"the session has {CUDA}, {CPU}"):
        ort.open_runner(store(tiny_net()), provider="tensorrt")


def test_a_provider_that_fails_is_told_with_its_reason(gpu, store):
    runner = ort.open_runner(store(tiny_net()), provider="tensorrt")
    gpu.fault = RuntimeError("EP_FAIL: could not build engine")
    with pytest.raises(EnvironmentFault, match="tensorrt: EP_FAIL: could not build engine"):
        runner.infer(tiny_net().images)
    gpu.refused = RuntimeError("CUDA failure 35")
    with pytest.raises(EnvironmentFault, match="cuda: CUDA failure 35"):
        ort.open_runner(store(tiny_net()), provider="cuda")


@pytest.mark.parametrize("target", ["openvino", "trt"])
def test_other_targets_have_none_to_choose_from(target):
    with pytest.raises(UsageError, match=f"target '{target}', expected one of target 'ort'"):
        opener(target, "cpu")


def test_a_name_that_is_none_is_refused():
    with pytest.raises(UsageError, match="got 'gpu', expected one of cpu, cuda, tensorrt"):
        opener("ort", "gpu")


def test_verify_says_where_it_ran_and_names_no_kernels_of_another(folder, gpu, capsys):
    assert main(["verify", str(folder), "--provider", "cuda", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["provider"], result["kernels"], result["other_kernels"]) == ("cuda", {}, {})
    assert {asked[0][0] for asked in gpu.asked} == {CUDA}
    assert main(["verify", str(folder), "--provider", "cuda"]) == 0
    assert "provider cuda, kernels not known" in capsys.readouterr().out


def test_verify_on_the_cpu_names_kernels(folder, capsys):
    assert main(["verify", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["provider"] == "cpu"
    assert result["kernels"]["head"] == "QGemm"
    assert main(["verify", str(folder), "--provider", "cuda"]) == 8
    assert "onnxruntime-gpu" in capsys.readouterr().err


def test_eval_says_where_it_ran(folder, data, gpu, capsys):
    arguments = ["eval", str(folder), "--data", str(data)]
    assert main([*arguments, "--provider", "cuda", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["provider"] == "cuda"
    assert [asked[0][0] for asked in gpu.asked] == [CUDA, CUDA]  # the float model beside it too
    assert main(arguments) == 0
    assert "ran on  cpu" in capsys.readouterr().out


def test_bench_says_where_it_ran(folder, capsys, tmp_path):
    table = tmp_path / "bench.csv"
    arguments = ["bench", str(folder), "--threads", "1", "--runs", "3", "--provider"]
    assert main([*arguments, "cpu", "--csv", str(table), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["provider"] for row in result["engines"]} == {"cpu"}
    assert {row["provider"] for row in csv.DictReader(io.StringIO(table.read_text()))} == {"cpu"}
    assert main([*arguments, "tensorrt"]) == 8
    assert "Traceback" not in capsys.readouterr().err


def test_bench_refuses_the_flag_beside_packages_of_other_targets(folder, tmp_path, capsys):
    write_tiny_package(tmp_path / "other", manifest={"target": "openvino"})
    assert main(["bench", str(folder), str(tmp_path / "other"), "--provider", "cpu"]) == 2
    assert "target 'openvino'" in capsys.readouterr().err


@pytest.mark.parametrize("listed", [[CPU], [CUDA, CPU]])
def test_doctor_lists_the_providers(listed, gpu):
    gpu.listed = listed
    targets = {"ort": {"available": True, "runtime": "1.31"}}
    found = {able.name: able for able in abilities.list_abilities({}, targets)}
    able = found["ONNX Runtime on a GPU (--provider)"]
    assert able.available == (CUDA in listed)
    assert all(name in able.detail for name in listed)
    assert bool(able.get) != able.available
