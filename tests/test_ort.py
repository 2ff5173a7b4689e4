import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dfqc.backends import _ort_census, ort
from dfqc.backends._onnx_file import with_outputs
from qdq_models import tiny_net

QUANTIZED = [{}, {"weight": 4}, {"weight": 4, "act": 4}, {"weight": 2, "act": 3}]
INTEGER = {
    "stem": "QLinearConv",
    "block.depthwise": "QLinearConv",
    "block.pointwise": "QLinearConv",
    "head": "QGemm",
}


def test_reading_the_target_loads_no_runtime(tmp_path):
    code = (
        "import sys\nfrom dfqc.backends.ort import TARGET\n"
        "print(TARGET.name, sorted({'torch', 'onnxruntime', 'onnx', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "ort []"


@pytest.mark.parametrize("bits", QUANTIZED, ids=str)
def test_engine_computes_the_exact_integers(bits, store):
    net = tiny_net(**bits)
    runner = ort.open_runner(store(net), threads=1)
    values = runner.codes(net.images, list(net.taps.values()))
    for name, value in net.taps.items():
        assert values[value].dtype == np.uint8
        np.testing.assert_array_equal(values[value], net.codes[name], err_msg=name)
    np.testing.assert_allclose(runner.infer(net.images), net.outputs, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(values["output"], runner.infer(net.images))


@pytest.mark.parametrize("bits", QUANTIZED, ids=str)
def test_every_planned_layer_runs_on_an_integer_kernel(bits, store):
    net = tiny_net(**bits)
    assert ort.executed(store(net), net.layers) == INTEGER


@pytest.mark.parametrize("bits", QUANTIZED, ids=str)
def test_looking_at_inner_codes_leaves_the_kernels_as_they_are(bits, store):
    net = tiny_net(**bits)
    tapped = with_outputs(store(net), list(net.taps.values()))
    assert ort.executed(store(tapped, "tapped.onnx"), net.layers) == INTEGER


def test_float_layers_are_called_float(store):
    net = tiny_net(float32=True)
    kernels = ort.executed(store(net), net.layers)
    assert set(kernels.values()) == {"Conv (float)", "Gemm (float)"}
    assert not any(_ort_census.is_integer(kernel) for kernel in kernels.values())


def test_weight_only_model_dequantizes_at_load_and_not_in_every_call(store):
    net = tiny_net(weight=4, act=16)
    marked = store(net)
    unmarked = onnx.ModelProto.FromString(net.data)
    del unmarked.metadata_props[:]
    unmarked = store(unmarked.SerializeToString(), "unmarked.onnx")
    assert ort.census(marked)["DequantizeLinear"] == 0
    assert ort.census(unmarked)["DequantizeLinear"] == len(net.layers)
    assert set(ort.executed(marked, net.layers).values()) == {"Conv (float)", "Gemm (float)"}
    output = ort.open_runner(marked, threads=1).infer(net.images)
    np.testing.assert_allclose(output, net.outputs, rtol=0, atol=1e-6)


def test_census_counts_what_runs(store):
    counts = ort.census(store(tiny_net()))
    assert counts["com.microsoft.QLinearConv"] == 3
    assert counts["com.microsoft.QLinearAdd"] == 1
    assert counts["com.microsoft.QGemm"] == 1
    assert counts["Conv"] == 0


def test_a_layer_that_fell_back_to_float_is_found_out(store):
    # With a float bias and no output quantizer, ONNX Runtime keeps the head in float.
    net = tiny_net()
    model = onnx.ModelProto.FromString(net.data)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    real = (constants["head.bias"] * constants["head.bias.s"]).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(real, "head.float"))
    head = next(n for n in model.graph.node if n.op_type == "Gemm")
    head.input[2] = "head.float"
    path = store(model.SerializeToString())
    assert ort.executed(path, net.layers) == INTEGER | {"head": "Gemm (float)"}


def linear_as_matmul(*, shared):
    """Two linear layers written as MatMul and Add, of one weight or of two."""
    rng = np.random.default_rng(0)
    constants, nodes = {}, []

    def constant(name, value):
        constants[name] = numpy_helper.from_array(value, name)
        return name

    s = constant("s", np.float32(0.05))
    z = constant("z", np.uint8(120))
    value = "input"
    for layer in ("a", "b"):
        nodes.append(helper.make_node("QuantizeLinear", [value, s, z], [f"{layer}.q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{layer}.q", s, z], [f"{layer}.x"]))
        owner = "a" if shared else layer
        weight = constant(f"{owner}.weight", rng.integers(-127, 128, (4, 4)).astype(np.int8))
        scale = constant(f"{owner}.s", np.full(4, 0.01, np.float32))
        zero = constant(f"{owner}.z", np.zeros(4, np.int8))
        inputs = [weight, scale, zero]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{layer}.w"], axis=1))
        inputs = [f"{layer}.x", f"{layer}.w"]
        nodes.append(helper.make_node("MatMul", inputs, [f"{layer}.product"], name=layer))
        bias = constant(f"{layer}.bias", rng.normal(size=4).astype(np.float32))
        nodes.append(helper.make_node("Add", [f"{layer}.product", bias], [f"{layer}.sum"]))
        value = f"{layer}.sum"
    nodes.append(helper.make_node("QuantizeLinear", [value, s, z], ["output.q"]))
    nodes.append(helper.make_node("DequantizeLinear", ["output.q", s, z], ["output"]))
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4])
        for name in ("input", "output")
    ]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], list(constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


@pytest.mark.parametrize("shared", [False, True])
def test_a_matmul_is_followed_through_its_fusion(shared, store):
    path = store(linear_as_matmul(shared=shared))
    assert ort.executed(path, {"a": "a.sum", "b": "b.product"}) == {"a": "QGemm", "b": "QGemm"}


def test_a_layer_that_was_folded_away_is_missing(store):
    # Constants in, so the runtime computes the layer when it loads the model.
    one = numpy_helper.from_array(np.ones((2, 2), np.float32), "one")
    nodes = [
        helper.make_node("MatMul", ["one", "one"], ["layer"], name="layer"),
        helper.make_node("Add", ["input", "layer"], ["output"]),
    ]
    tensors = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in ("input", "output")
    ]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = store(model.SerializeToString())
    assert ort.executed(path, {"layer": "layer"}) == {"layer": _ort_census.MISSING}


@pytest.mark.parametrize("max_batch", [1, 3, 16, 100])
def test_codes_of_a_batch_in_pieces_are_exact(max_batch, store):
    net = tiny_net()
    runner = ort.open_runner(store(net), threads=1, max_batch=max_batch)
    np.testing.assert_allclose(runner.infer(net.images), net.outputs, rtol=0, atol=1e-6)
    tapped = runner.codes(net.images, [net.taps["stem.a8"]])
    np.testing.assert_array_equal(tapped[net.taps["stem.a8"]], net.codes["stem.a8"])
