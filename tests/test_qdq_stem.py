"""Convolutions on an image's three channels, rewritten for the engine's kernel: sums stay."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import quantized
from dfqc.backends import ort
from dfqc.backends._qdq_stem import widen_stems
from dfqc.compiler.parity import check_parity

OUTPUTS = 16


def stem(
    size, kernel, pads, stride, channels=3, *, group=1, dilation=1, readers=1, outputs=OUTPUTS
):
    """Return Q, DQ and Conv with all scales one, so that float32 holds every sum exactly."""
    rng = np.random.default_rng(3)
    shape = (outputs, channels // group, *kernel)
    weight = numpy_helper.from_array(rng.integers(-127, 128, shape).astype(np.int8), "w")
    constants = [
        weight,
        numpy_helper.from_array(np.float32(1), "one"),
        numpy_helper.from_array(np.uint8(131), "zero"),
        numpy_helper.from_array(np.ones(outputs, np.float32), "ones"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "one", "zero"], ["real"]),
        helper.make_node("DequantizeLinear", ["w", "ones"], ["kernel"], axis=0),
        helper.make_node(
            "Conv", ["real", "kernel"], ["y"], kernel_shape=kernel, strides=[stride] * 2, pads=pads,
            group=group, dilations=[dilation] * 2,
        ),
    ]  # fmt: skip
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, list("nchw"))]
    if readers == 2:
        nodes.append(helper.make_node("Relu", ["real"], ["z"]))
        results.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, list("nkuv")))
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", channels, *size])
    graph = helper.make_graph(nodes, "stem", [image], results, constants)
    opset = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


def widened(proto):
    model = ir.serde.deserialize_model(proto)
    widen_stems(model)
    return ir.serde.serialize_model(model)


def compute(proto, size, channels=3):
    images = np.random.default_rng(4).uniform(-140, 140, (2, channels, *size)).astype(np.float32)
    return ReferenceEvaluator(proto).run(None, {"x": images})[0]


def kinds(proto):
    return [node.op_type for node in proto.graph.node]


@pytest.mark.parametrize(
    ("size", "kernel", "pads", "channels"),
    [
        ((12, 16), (7, 7), [3, 3, 3, 3], 3),  # ResNet
        ((12, 16), (3, 3), [1, 1, 1, 1], 3),  # MobileNet
        ((12, 16), (3, 3), [0, 0, 1, 1], 3),  # MobileNet out of TensorFlow
        ((12, 16), (3, 3), [0, 0, 0, 0], 3),
        ((12, 16), (5, 2), [2, 1, 1, 0], 3),
        ((12, 16), (4, 4), [0, 0, 0, 0], 1),
        ((12, 16), (6, 6), [2, 2, 2, 2], 2),
    ],
)
def test_blocks_of_pixels_give_the_same_sums(size, kernel, pads, channels):
    before = stem(size, kernel, pads, 2, channels)
    after = widened(before)
    onnx.checker.check_model(after, full_check=True)
    assert kinds(after).count("SpaceToDepth") == 1
    weight = next(t for t in after.graph.initializer if t.name == "w")
    assert weight.dims[1] == 4 * channels
    np.testing.assert_array_equal(compute(after, size, channels), compute(before, size, channels))


@pytest.mark.parametrize(
    ("size", "stride"), [((12, 16), 1), ((13, 16), 2), ((12, 15), 2), ((12, 12), 3)]
)
def test_a_fourth_channel_of_zeros_gives_the_same_sums(size, stride):
    before = stem(size, (3, 3), [1, 1, 1, 1], stride)
    after = widened(before)
    onnx.checker.check_model(after, full_check=True)
    assert kinds(after).count("Pad") == 1
    weight = next(t for t in after.graph.initializer if t.name == "w")
    assert weight.dims[1] == 4
    np.testing.assert_array_equal(compute(after, size), compute(before, size))


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 4},
        {"channels": 1, "stride": 1},
        {"outputs": 8, "stride": 1},
        {"channels": 2, "group": 2},
        {"dilation": 2},
        {"readers": 2},
    ],
)
def test_other_convolutions_stay_as_they_are(changes):
    before = stem((12, 16), (3, 3), [1, 1, 1, 1], **({"stride": 2} | changes))
    assert kinds(widened(before)) == kinds(before)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize(("stride", "written"), [(2, "SpaceToDepth"), (1, "Pad")])
def test_the_engine_computes_what_is_simulated(bits, stride, written, tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride, 1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 8, 3),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 4),
    )
    graph = quantized.fold_module(net)
    # The ends in few bits too: kernels that are packed two codes to a byte.
    rules = ("0=w4a4",) if bits == "w4a4" else ()
    state = quantized.quantize(graph, quantized.plan(graph, bits, *rules))
    result = ort.lower(graph, state, metadata={})
    path = tmp_path / "model.onnx"
    path.write_bytes(result.model)
    assert written in kinds(onnx.load(path))
    images = torch.randn(8, *graph.image.size, generator=torch.Generator().manual_seed(1))
    report = check_parity(graph, state, result, ort.open_runner(path, threads=1), images)
    assert report.passed
    assert [layer.max_steps for layer in report.layers] == [0] * len(state.acts)
    assert "QLinearConv" in ort.executed(path, result.layers)["0"]
