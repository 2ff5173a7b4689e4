"""The OpenVINO target, run by OpenVINO; where it is missing, what is said of that."""

import dataclasses
import importlib.metadata
import importlib.util
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import models
import quantized
from command import Workspace, build, run
from dfqc.backends import _ov_census
from dfqc.backends import openvino as target
from dfqc.compiler.baking import bake_preprocessing, compare_baked
from dfqc.compiler.contracts import QParams
from dfqc.compiler.parity import check_parity
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.simulate import TorchRunner, simulated
from qdq_models import CLASSES, sample_images, tiny_net

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,
    reason="openvino is not installed: pip install 'dfqc[openvino]'",
)
IMAGES = models.images(40, seed=21)
# Pinned first layers aside, one net per kind of kernel and of join.
NETS = ("plain", "residual", "concat", "depthwise", "squeeze_excite", "pre_activation", "attention")


def lowered(net, bits, path):
    """Quantize and lower a tiny net; return graph, state and name maps."""
    graph = quantized.folded(net)
    state = quantized.quantize(graph, quantized.plan(graph, bits, target=target.TARGET))
    result = target.lower(graph, state, metadata={"dfqc": "test"})
    path.write_bytes(result.model)
    return graph, state, result


@needs_openvino
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w4a4"])
def test_the_engine_computes_what_is_simulated_on_integer_kernels(net, bits, tmp_path):
    path = tmp_path / "model.onnx"
    graph, state, result = lowered(net, bits, path)
    runner = target.open_runner(path, threads=1)
    report = check_parity(graph, state, result, runner, IMAGES)
    assert report.passed
    assert report.argmax_agreement == 100
    # As a whole, without looking inside: a residual that is added with other rounding shows here.
    assert report.max_abs < 1e-5
    kernels = target.executed(path, result.layers)
    planned = [name for name, layer in state.plan.layers.items() if layer.input is not None]
    assert set(planned) == set(kernels)
    assert all(_ov_census.is_integer(kernel) for kernel in kernels.values()), kernels


@needs_openvino
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("net", ["plain", "depthwise"])
def test_without_adds_every_code_is_the_simulated_one(net, bits, tmp_path):
    path = tmp_path / "model.onnx"
    graph, state, result = lowered(net, bits, path)
    report = check_parity(graph, state, result, target.open_runner(path, threads=1), IMAGES)
    assert [layer.max_steps for layer in report.layers] == [0] * len(state.acts)


@needs_openvino
@pytest.mark.parametrize("mean", [0.5, 0.485])
@pytest.mark.parametrize("levels", [255, 256])
def test_pixels_between_two_codes_go_where_the_engine_puts_them(mean, levels, tmp_path):
    graph = quantized.folded("residual")  # as a snippet, the quantizer decides otherwise
    state = quantized.quantize(graph, quantized.plan(graph, "w8a8", target=target.TARGET))
    scale = np.float32(2 / levels)  # of 256 levels: every pixel is a tie
    image = QParams(float(scale), round(2 * mean / scale))
    state = dataclasses.replace(state, acts={**state.acts, "x.a8": image})
    result = target.lower(graph, state, metadata={})
    path = tmp_path / "model.onnx"
    path.write_bytes(result.model)
    pixels = np.arange(768, dtype=np.float32).reshape(1, 3, 16, 16) % 256
    images = (pixels / np.float32(255) - np.float32(mean)) / np.float32(0.5)
    found = target.open_runner(path, threads=1).codes(images, [result.taps["x.a8"]])
    expected = TorchRunner(simulated(graph, state)).codes(images, ["x.a8"])
    np.testing.assert_array_equal(found[result.taps["x.a8"]], expected["x.a8"])


@needs_openvino
def test_weights_below_eight_bits_are_unpacked_once_at_load(tmp_path):
    path = tmp_path / "model.onnx"
    lowered("residual", "w4a4", path)
    stored = onnx.load(path).graph.initializer
    assert sum(t.data_type == onnx.TensorProto.INT4 for t in stored) > 1
    counts = target.census(path)
    assert not any(kernel.startswith("Convert") for kernel in counts)
    constants = [n for n in target.compiled_nodes(path) if n["layerType"] == "Const"]
    assert not any(n["outputPrecisions"] in ("i4", "u4") for n in constants)


@needs_openvino
def test_a_global_mean_is_one_integer_kernel_as_it_was_exported(tmp_path):
    path = tmp_path / "model.onnx"
    _, _, result = lowered("depthwise", "w8a8", path)
    assert "mean.a8" in result.taps
    written = [node.op_type for node in onnx.load(path).graph.node]
    assert "ReduceMean" in written
    assert "Flatten" not in written  # behind a pool on codes; a change of layout here
    (mean,) = [n for n in target.compiled_nodes(path) if n["layerType"] == "Reduce"]
    assert mean["outputPrecisions"] == "u8"


@needs_openvino
def test_a_residual_add_is_no_kernel_of_its_own(tmp_path):
    path = tmp_path / "model.onnx"
    lowered("residual", "w8a8", path)
    nodes = [n["originalLayersNames"].split(",") for n in target.compiled_nodes(path)]
    (projected,) = (names for names in nodes if "relu_4.a8" in names)
    assert "layer2.conv2" in projected
    (identity,) = (names for names in nodes if "relu_2.a8" in names)
    assert "layer1.conv2" in identity


@needs_openvino
@pytest.mark.parametrize(("net", "kernels"), [("residual", 0), ("attention", 1), ("plain", 1)])
def test_snippets_are_left_out_where_residuals_are_added(net, kernels, tmp_path):
    path = tmp_path / "model.onnx"
    lowered(net, "w8a8", path)
    found = [n for n in target.compiled_nodes(path) if n["layerType"] == "Subgraph"]
    assert min(len(found), 1) == kernels


@needs_openvino
def test_a_leaky_relu_is_rounded_once_behind_it(tmp_path):
    path = tmp_path / "model.onnx"
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.LeakyReLU(0.1), torch.nn.Conv2d(8, 4, 3)
    )
    torch.manual_seed(0)
    graph = quantized.fold_module(net)
    state = quantized.quantize(graph, quantized.plan(graph, "w8a8", target=target.TARGET))
    result = target.lower(graph, state, metadata={})
    path.write_bytes(result.model)
    report = check_parity(
        graph, state, result, target.open_runner(path, threads=1), IMAGES, layer_images=4
    )
    assert report.passed
    # The image and the input of the second convolution; nothing between convolution and ReLU.
    assert len(state.plan.quantizers) == 3 - (len(result.taps) == 2)


@needs_openvino
def test_weight_only_layers_are_float_layers(tmp_path):
    path = tmp_path / "model.onnx"
    graph, state, result = lowered("plain", "w4a16", path)
    kernels = target.executed(path, result.layers)
    assert all(kernel.endswith("(float32)") for kernel in kernels.values())
    report = check_parity(graph, state, result, target.open_runner(path, threads=1), IMAGES)
    assert report.max_abs < 1e-5


@needs_openvino
def test_the_float_control_computes_in_float32(tmp_path):
    graph = quantized.folded("residual")
    path = tmp_path / "float.onnx"
    path.write_bytes(target.lower_float(graph))
    images = IMAGES.numpy()
    expected = TorchRunner(fold(models.trace_tiny("residual"))).infer(images)
    output = target.open_runner(path, threads=1).infer(images)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)


@needs_openvino
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_precision_are_those_asked_for(threads, store):
    runner = target.open_runner(store(tiny_net()), threads=threads)
    model = runner.compiled(1)
    assert model.get_property("INFERENCE_NUM_THREADS") == threads
    assert model.get_property("NUM_STREAMS") == 1
    assert model.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert model.get_property("ENABLE_CPU_PINNING") is False


@needs_openvino
def test_an_output_is_not_overwritten_by_the_next_call(store):
    runner = target.open_runner(store(tiny_net()), threads=1)
    first = runner.infer(sample_images(2, seed=1))
    kept = first.copy()
    assert not np.array_equal(runner.infer(sample_images(2, seed=2)), kept)
    np.testing.assert_array_equal(first, kept)


@needs_openvino
def test_few_compiled_models_are_kept(store):
    runner = target.open_runner(store(tiny_net()), threads=1)
    for count in (1, 2, 3, 4, 5, 6, 2):
        assert runner.infer(sample_images(count)).shape == (count, CLASSES)
    assert len(runner._compiled) <= 4


@needs_openvino
def test_pixels_in_give_the_outputs_of_normalized_images(tmp_path):
    plain, baked = tmp_path / "model.onnx", tmp_path / "model.uint8.onnx"
    # At 8 bits: OpenVINO divides by multiplying, which moves 2 % of this image's codes by one.
    graph, _, result = lowered("residual", "w8a8", plain)
    model = bake_preprocessing(onnx.load_from_string(result.model), graph.image)
    baked.write_bytes(model.SerializeToString())
    found = compare_baked(target.open_runner, plain, baked, IMAGES.numpy(), graph.image)
    assert found["passed"]
    assert found["images"] == len(IMAGES)


def test_a_layer_without_a_trace_is_missing():
    stored = tiny_net().model
    assert _ov_census.kernels(stored, [], {"stem": "stem"}) == {"stem": _ov_census.MISSING}


def test_without_the_runtime_a_build_ends_with_exit_code_8(monkeypatch, shared, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    manifest = build(capsys, shared, "--target", "openvino", output="unverified", code=8)
    assert manifest["notes"][0].startswith("Not verified: the runtime of target 'openvino'")
    assert "pip install 'dfqc[openvino]'" in manifest["notes"][0]
    assert (shared.root / "unverified" / "model.onnx").is_file()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with a built package, and the run that built it."""
    workspace = Workspace(tmp_path_factory.mktemp("openvino"))
    done = workspace.dfqc(
        "build", *workspace.weights(), "--samples", "8", "--effort", "quick", "--threads", "1",
        "--bits", "w8a8", "--target", "openvino", "--bake-preprocessing",
        "--eval-data", workspace.images(), "-o", workspace.root / "package", "--json",
    )  # fmt: skip
    return workspace, done


@needs_openvino
def test_a_build_is_verified_timed_and_says_its_engine(package):
    import openvino

    _, done = package
    assert done.code == 0, done.err
    manifest = done.json
    assert manifest["target"] == "openvino"
    assert manifest["environment"]["openvino"] == importlib.metadata.version("openvino")
    assert manifest["environment"]["runtime"].startswith(manifest["environment"]["openvino"])
    assert manifest["parity"]["argmax_agreement"] == 100
    assert all(row["executed"].endswith("(int8)") for row in manifest["layers"])
    latency = manifest["metrics"]["latency_ms"]
    assert latency["engine"] > 0
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert latency["half_precision"] == next(
        (p.lower() for p in ("BF16", "FP16") if p in able), None
    )
    assert (latency["half"] or 1) > 0 < (latency["half_speedup"] or 1)
    assert manifest["preprocessing"]["baked"]["passed"]


@needs_openvino
def test_a_package_is_verified_and_timed_without_torch(package, capsys):
    workspace, _ = package
    folder = workspace.root / "package"
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from dfqc.compiler.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    for words in (
        ("verify", folder),
        ("bench", folder, "--runs", "5", "--threads", "1"),
        ("eval", folder, "--data", workspace.images()),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words), "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    targets = run(capsys, workspace, "targets", "--json").json["targets"]
    assert targets["openvino"]["available"]


@needs_openvino
def test_the_selftest_and_the_card_of_a_package_run_it_in_openvino(package, tmp_path, monkeypatch):
    workspace, _ = package
    folder = workspace.root / "package"
    # No onnxruntime there: a self-test that fell back to it would fail.
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['onnxruntime'] = None")
    done = subprocess.run(
        [sys.executable, str(folder / "selftest.py")],
        env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "passed   model.onnx on openvino" in done.stdout
    assert "model.uint8.onnx differs by" in done.stdout
    (config,) = (folder / "triton").glob("*/config.pbtxt")
    assert 'backend: "openvino"' in config.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "MODEL_CARD.md").read_text(), re.S)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    namespace = {}
    exec(code, namespace)
    expected = target.open_runner(folder / "model.onnx", threads=1).infer(namespace["images"])
    np.testing.assert_allclose(namespace["logits"], expected, atol=1e-5)


@needs_openvino
def test_the_half_precision_control_is_no_float32(tmp_path):
    path = tmp_path / "float.onnx"
    path.write_bytes(target.lower_float(quantized.folded("residual")))
    half = target.open_half(path, threads=1)
    if half is None:
        pytest.skip("this processor has no half-precision kernels in OpenVINO")
    images = IMAGES.numpy()
    exact = target.open_runner(path, threads=1).infer(images)
    error = np.abs(half[1].infer(images) - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.1
