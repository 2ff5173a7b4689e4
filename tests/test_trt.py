"""The `trt` target: what its file computes, in float32 and float16, and how weights are stored."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

import quantized
import trt_files as files
from dfqc.backends import _qdq_half, ort, trt
from dfqc.backends._qdq_write import block_size
from dfqc.compiler.affine import half_scales
from dfqc.compiler.contracts import QParams
from dfqc.compiler.errors import UnsupportedError
from dfqc.compiler.simulate import TorchRunner, simulated

# Rounding to float16 between layers (2^-11 of a value each) puts some codes on the other side of a
# boundary; measured 0.03 to 0.6 % of the largest output on small networks, allowed 2 %.
HALF_TOLERANCE = 0.02


def run(data, tmp_path, images):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    return trt.rehearse(path, images)


@pytest.fixture(scope="module")
def images():
    return quantized.calib(16, seed=3).images.numpy()


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w4a16"])
def test_the_file_computes_what_is_simulated(bits, tmp_path, images):
    graph, state = files.state(bits)
    expected = TorchRunner(simulated(graph, state, integer=False)).infer(images)
    found = run(files.written(bits), tmp_path, images)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("bits", ["w8a8", "w4a16"])
def test_the_float16_form_stays_near_the_simulation(bits, tmp_path, images):
    graph, state = files.state(bits)
    expected = TorchRunner(simulated(graph, half_scales(state), integer=False)).infer(images)
    found = run(files.written(bits, "fp16"), tmp_path, images)
    assert found.dtype == np.float32
    difference = np.abs(found - expected).max()
    assert 0 < difference < HALF_TOLERANCE * np.abs(expected).max()
    clear = np.diff(np.sort(expected, 1)[:, -2:]).ravel() > 2 * difference
    assert (found.argmax(1) == expected.argmax(1))[clear].all()


def test_all_but_codes_and_ends_is_float16():
    model = files.good("w8a8", "fp16")
    kinds = {t.data_type for t in model.graph.initializer}
    assert TensorProto.FLOAT not in kinds
    assert TensorProto.FLOAT16 in kinds
    ends = [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)]
    assert ends == [TensorProto.FLOAT] * 2
    assert [n.op_type for n in model.graph.node].count("Cast") == 2
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["input", "output"]


def test_scales_of_a_float16_file_are_the_simulations():
    """Rounded before the simulation, so that nothing is rounded when the file is written."""
    _, state = files.state("w8a8")
    halved = half_scales(state)
    again = half_scales(halved)
    for name, weight in halved.weights.items():
        assert np.array_equal(weight.scale.numpy(), weight.scale.numpy().astype(np.float16))
        assert np.array_equal(weight.scale.numpy(), again.weights[name].scale.numpy())
        ratio = weight.scale.numpy() / state.weights[name].scale.numpy()
        assert np.abs(ratio - 1).max() <= 2**-11
    model = files.good("w8a8", "fp16")
    stored = files.array(model, files.weight_dq(model, "inner").input[1])
    assert np.array_equal(stored.astype(np.float32), halved.weights["inner"].scale.numpy())


def test_numbers_beyond_float16_saturate():
    wide = np.array([1e-30, -1e-30, 0, 1e9, -1e9, np.inf, -np.inf, 1.0], np.float32)
    narrow = _qdq_half.half(wide)
    assert narrow.dtype == np.float16
    assert narrow[:3].tolist() == [2.0**-24, -(2.0**-24), 0]
    assert narrow[3:].tolist() == [65504, -65504, np.inf, -np.inf, 1]


# --- weight-only


def test_a_weight_only_product_is_stored_in_int4_blocks():
    graph, state = files.state("w4a16")
    model = files.good("w4a16")
    node = files.weight_dq(model, "head")
    attributes = {a.name: a.i for a in node.attribute}
    assert attributes == {"axis": 0, "block_size": 32}
    stored = next(t for t in model.graph.initializer if t.name == node.input[0])
    assert (stored.data_type, list(stored.dims)) == (TensorProto.INT4, [32, 10])
    codes = numpy_helper.to_array(stored).astype(np.int8)
    assert np.array_equal(codes.T, state.weights["head"].codes.numpy())
    scales = files.array(model, node.input[1])
    assert scales.shape == (1, 10)
    assert files.named(model, "head").op_type == "MatMul"
    assert graph.module.get_submodule("head").bias is not None
    assert [n.op_type for n in files.readers(model, files.named(model, "head").output[0])] == [
        "Add"
    ]


def test_weight_only_convolutions_are_left_in_float_and_the_plan_says_so():
    _, state = files.state("w4a16")
    layers = state.plan.layers
    assert str(layers["inner"].exported) == "w32a32"
    assert "no weight-only Conv2d" in layers["inner"].reason
    assert str(layers["head"].exported) == "w4a32"
    assert "INT4 blocks" in layers["head"].reason


@pytest.mark.parametrize(
    ("inputs", "outputs", "block"),
    [(512, 1000, 128), (192, 10, 64), (96, 10, 32), (48, 10, 16), (20, 10, 0), (512, 7, 0)],
)
def test_blocks_divide_the_inputs(inputs, outputs, block):
    assert block_size(inputs, outputs) == block


# --- placement


def test_a_concatenation_shares_one_scale_and_its_clip_replaces_the_relus():
    model = files.good("w4a4")
    (node,) = (n for n in model.graph.node if n.op_type == "Concat")
    pairs = [files.producer(model, name) for name in node.input]
    assert [p.op_type for p in pairs] == ["DequantizeLinear"] * 2
    assert len({p.input[1] for p in pairs}) == 1
    quantizers = [files.producer(model, p.input[0]) for p in pairs]
    clips = [files.producer(model, q.input[0]) for q in quantizers]
    assert [c.op_type for c in clips] == ["Clip"] * 2
    assert [files.producer(model, c.input[0]).name for c in clips] == ["left", "right"]
    (behind,) = files.readers(model, node.output[0])
    assert (behind.op_type, behind.input[1]) == ("QuantizeLinear", pairs[0].input[1])


def test_the_residual_convolution_is_bare_and_the_skip_quantized():
    model = files.good("w4a4")
    (node,) = (n for n in model.graph.node if n.op_type == "Add")
    makers = {files.producer(model, name).op_type for name in node.input}
    assert makers == {"Conv", "DequantizeLinear"}


def test_a_linear_layer_leaves_the_skip_alone():
    """Only convolutions fuse with the add behind them."""
    graph = quantized.folded("attention")
    plan = quantized.plan(graph, "w8a8", target=trt.TARGET)
    consumers = {name for q in plan.quantizers.values() for name in q.consumers}
    assert not [name for name in consumers if name.startswith("add")]


# --- without TensorRT


def test_the_stand_in_runs_the_file_as_written(tmp_path, images):
    """Optimized, ONNX Runtime rounds a float16 bias with a product of scales that underflows."""
    path = tmp_path / "model.onnx"
    path.write_bytes(files.written("w8a8", "fp16"))
    runner = ort.open_runner(path, threads=1, as_written=True)
    assert np.array_equal(runner.infer(images), trt.rehearse(path, images))
    runner.close()


def test_the_checked_file_is_plain_data(tmp_path):
    path = tmp_path / "model.onnx"
    model = files.good()
    model.opset_import[0].version = 25
    onnx.save(model, path)
    (row,) = (r for r in trt.check(path) if r["rule"] == "opset")
    assert row["severity"] == "error"
    assert "opset 25" in row["message"]


def test_a_bias_of_zeros_that_the_exporter_drops_is_none(tmp_path, images):
    """Classifiers begin with one; the file then simply has no bias."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = files.Everything()
    torch.nn.init.zeros_(net.head.bias)
    graph = quantized.fold_module(net)
    state = quantized.quantize(graph, quantized.plan(graph, "w8a8", target=trt.TARGET))
    found = run(trt.lower(graph, state, metadata={}).model, tmp_path, images)
    expected = TorchRunner(simulated(graph, state, integer=False)).infer(images)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_values_that_float16_cannot_hold_are_refused():
    _, state = files.state("w8a8")
    name = next(iter(state.acts))
    acts = {**state.acts, name: QParams(600.0, 0)}
    with pytest.raises(UnsupportedError, match=f"{name}.*--trt-base fp32"):
        half_scales(dataclasses.replace(state, acts=acts))
