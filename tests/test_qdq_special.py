import dataclasses

import numpy as np
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

import models
import numerics
import quantized
from dfqc.backends import ort
from dfqc.compiler.parity import check_parity
from dfqc.compiler.simulate import TorchRunner, simulated

IMAGES = models.images(48, seed=11)


class Names(nn.Module):
    """Modules called like the exporter's values, the model's ends, and the writer's constants."""

    def __init__(self):
        super().__init__()
        self.input, self.c0 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.relu, self.val_0 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.mean = nn.Conv2d(8, 8, 1)
        self.output = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.c0(F.relu(self.input(x))))
        x = F.leaky_relu(self.val_0(F.silu(self.relu(x))))
        return self.output(self.mean(x).mean((2, 3))) + 1


def test_module_names_never_meet_other_names(tmp_path):
    graph = quantized.fold_module(Names())
    state = quantized.quantize(graph, quantized.plan(graph, "w4a4"))
    case = quantized.lower(graph, state, tmp_path)
    assert [v.name for v in (*case.model.graph.input, *case.model.graph.output)] == [
        "input",
        "output",
    ]
    assert set(case.lowered.layers) == {"input", "c0", "relu", "val_0", "mean", "output"}
    assert ort.executed(case.path, case.lowered.layers)["relu"] == "QLinearConv"
    expected = TorchRunner(simulated(graph, state)).infer(IMAGES.numpy())
    np.testing.assert_array_equal(case.runner.infer(IMAGES.numpy()), expected)


class Dense(nn.Module):
    """An output with positions, computed by a convolution and its ReLU."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = models.conv_bn(3, 8), models.conv_bn(8, 5, 1)

    def forward(self, x):
        return F.relu(self.last(F.relu(self.stem(x))))


def test_a_quantized_tensor_may_be_the_output(tmp_path):
    graph = quantized.fold_module(Dense())
    state = quantized.quantize(graph, quantized.plan(graph, "w4a4"))
    case = quantized.lower(graph, state, tmp_path)
    (output,) = case.model.graph.output
    assert output.name == "output"
    assert [d.dim_value for d in output.type.tensor_type.shape.dim][1:] == [5, 16, 16]
    assert case.producer("output").op_type == "DequantizeLinear"
    assert set(ort.executed(case.path, case.lowered.layers).values()) == {"QLinearConv"}
    report = check_parity(graph, state, case.lowered, case.runner, IMAGES)
    assert report.max_abs == 0
    assert report.argmax_agreement == 100


class Pooled(nn.Module):
    """A pool whose output is wanted wide and narrow, and the CIFAR shortcut without parameters."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = models.conv_bn(3, 8), models.conv_bn(8, 8)
        self.down = models.conv_bn(8, 16, stride=2)
        self.head = models.Head(16)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        x = F.relu(x + self.body(x))
        skip = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(F.relu(skip + self.down(x)))


def test_pools_and_shortcuts_run_on_integers(tmp_path):
    graph = quantized.fold_module(Pooled())
    state = quantized.quantize(graph, quantized.plan(graph, "w4a4"))
    case = quantized.lower(graph, state, tmp_path)
    counts = ort.census(case.path)
    assert counts["com.microsoft.NhwcMaxPool"] == 1
    assert counts["com.microsoft.QLinearAdd"] == 2
    assert counts["com.microsoft.QLinearConv"] == 3
    assert counts["MaxPool"] == counts["Add"] == counts["Conv"] == 0
    report = check_parity(graph, state, case.lowered, case.runner, IMAGES)
    assert report.passed
    assert max(row.share for row in report.layers) <= 1e-3


class Rectified(nn.Module):
    """Pads, and activations that quantizers repeat or do not."""

    def __init__(self):
        super().__init__()
        self.stem = models.conv_bn(3, 8)
        self.body = nn.Conv2d(8, 8, 3, stride=2)
        self.plain = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 8, 3)
        self.head = models.Head(8)

    def forward(self, x):
        x = F.relu6(self.stem(x) * 3)
        x = F.relu6(self.body(F.pad(x, (0, 1, 0, 1))))
        x = F.relu(self.plain(x))  # left in float, and read in float and as integers
        y = self.last(F.pad(x, (1, 1, 1, 1), mode="reflect"))
        return self.head(F.relu6(y + x))


@pytest.fixture(scope="module")
def rectified(tmp_path_factory):
    graph = quantized.fold_module(Rectified())
    state = quantized.quantize(graph, quantized.plan(graph, "w4a4", "plain=w32a32"), acts="minmax")
    end = state.plan.quantizers["hardtanh_1.a8"].name
    wide = dataclasses.replace(state.acts[end], scale=0.05)  # up to 12.75
    state = dataclasses.replace(state, acts={**state.acts, end: wide})
    return quantized.lower(graph, state, tmp_path_factory.mktemp("rectified"))


def test_pads_go_into_convolutions_unless_they_reflect(rectified):
    pads = {
        n.name: list(a.ints)
        for n in rectified.nodes("Conv")
        for a in n.attribute
        if a.name == "pads"
    }
    assert pads["body"] == [0, 0, 1, 1]
    (left,) = rectified.nodes("Pad")
    assert {a.name: a.s for a in left.attribute} == {"mode": b"reflect"}


def test_activations_stay_where_a_grid_does_not_repeat_them(rectified):
    # Gone: relu6 behind the stem. Left: relu6 whose grid ends above 6, relu6 without a quantizer,
    # and relu behind a layer in float, which an add reads too.
    clips = [n for n in rectified.nodes("Clip") if rectified.array(n.input[1]).dtype == np.float32]
    before = [rectified.producer(clip.input[0]) for clip in clips]
    assert [node.name or node.op_type for node in before] == ["body", "Add"]
    (relu,) = rectified.nodes("Relu")
    assert rectified.producer(relu.input[0]).input[1] == "plain.weight"


def test_the_mixed_net_is_the_simulation(rectified):
    kernels = ort.executed(rectified.path, rectified.lowered.layers)
    assert kernels["stem.0"] == kernels["last"] == "QLinearConv"
    assert "plain" not in kernels
    expected = TorchRunner(simulated(rectified.graph, rectified.state)).infer(IMAGES.numpy())
    numerics.assert_sqnr(rectified.runner.infer(IMAGES.numpy()), expected, 50)


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    graph = quantized.folded("residual")
    state = quantized.quantize(graph, quantized.plan(graph, "w4a4", target=quantized.INPUTS))
    folder = tmp_path_factory.mktemp("signed")
    return quantized.lower(graph, state, folder, target=quantized.INPUTS)


def test_a_symmetric_target_gets_signed_codes_and_float_clips(signed):
    assert {t.data_type for t in signed.constants.values()} <= {
        TensorProto.INT8,
        TensorProto.FLOAT,
        TensorProto.INT64,
    }
    for name, quantizer in signed.state.plan.quantizers.items():
        node = signed.producer(signed.lowered.taps[name])
        assert node.op_type == "QuantizeLinear"
        zero_point = signed.array(node.input[2])
        assert (zero_point.dtype, int(zero_point)) == (np.int8, 0)
        before = [n for n in signed.nodes("Clip") if node.input[0] in n.output]
        assert bool(before) == (quantizer.scheme.bits < 8)
        for clip in before:
            scale = np.float32(signed.state.acts[name].scale)
            limits = [float(signed.array(i)) for i in clip.input[1:]]
            assert limits == pytest.approx([0, 15 * scale], rel=1e-6)
            if "add" not in signed.producer(clip.input[0]).op_type.lower():
                assert signed.producer(clip.input[0]).op_type in ("Conv", "Relu")


def test_one_clip_replaces_the_relu_before_it(signed):
    # relu_1 and relu_3 are read by a narrow layer alone; the others also feed adds or a mean.
    for name in ("relu_1.a4", "relu_3.a4", "relu_2.a4"):
        clip = signed.producer(signed.producer(signed.lowered.taps[name]).input[0])
        assert clip.op_type == "Clip"
        assert signed.producer(clip.input[0]).op_type != "Relu"
    assert len(signed.nodes("Relu")) == 2
    # Eight bits reach below zero: the ReLU stays.
    tap = signed.producer(signed.lowered.taps["relu.a8"])
    assert signed.producer(tap.input[0]).op_type == "Relu"


def test_its_biases_are_float_on_the_integer_grid(signed):
    for layer in signed.planned():
        node = signed.layer_node(layer)
        bias = signed.array(node.input[2])
        assert bias.dtype == np.float32
        scale = np.float32(signed.state.acts[layer.input].scale)
        step = scale * signed.state.weights[layer.name].scale.numpy()
        codes = np.rint(signed.state.biases[layer.name].numpy().astype(np.float64) / step)
        np.testing.assert_array_equal(bias, codes.astype(np.float32) * step)


def test_its_file_computes_the_simulation(signed):
    images = IMAGES[:8].numpy()
    (found,) = ReferenceEvaluator(signed.model).run(None, {"input": images})
    expected = TorchRunner(simulated(signed.graph, signed.state)).infer(images)
    numerics.assert_sqnr(found, expected, 45)
