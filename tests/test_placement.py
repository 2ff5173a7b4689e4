import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
import quantized

aten = torch.ops.aten


def table(plan):
    """Show a plan's quantizers as text: `name: consumers < the one it reads = its twin`."""
    rows = []
    for q in plan.quantizers.values():
        assert q.name == f"{q.source}.a{q.scheme.bits}"
        row = f"{q.name}: {' '.join(q.consumers)}"
        row += f" < {q.after}" if q.after else ""
        rows.append(row + (f" = {q.tied}" if q.tied else ""))
    return rows


def inputs(plan):
    return {layer.name: layer.input for layer in plan.layers.values()}


def test_a_chain_has_one_quantizer_per_tensor_behind_its_relu():
    plan = quantized.plan(quantized.folded("grouped"), "w4a4")
    assert table(plan) == [
        "x.a8: stem_0",
        "relu.a4: grouped",
        "relu_1.a8: mean",
        "mean.a8: head_fc",
    ]
    assert inputs(plan) == {"stem.0": "x.a8", "grouped": "relu.a4", "head.fc": "mean.a8"}


def test_a_residual_stream_stays_at_eight_bits():
    plan = quantized.plan(quantized.folded("residual"), "w4a4")
    assert table(plan) == [
        "x.a8: conv1",
        "relu.a8: layer1_conv1 add",
        "relu.a4: layer1_conv1 < relu.a8",
        "relu_1.a4: layer1_conv2",
        "layer1_conv2.a8: add",
        "relu_2.a4: layer2_downsample_0 layer2_conv1",
        "layer2_downsample_0.a8: add_1",
        "relu_3.a4: layer2_conv2",
        "layer2_conv2.a8: add_1",
        "relu_4.a8: mean",
        "mean.a8: head_fc",
    ]
    assert inputs(plan) == {
        "conv1": "x.a8",
        "layer1.conv1": "relu.a4",
        "layer1.conv2": "relu_1.a4",
        "layer2.downsample.0": "relu_2.a4",
        "layer2.conv1": "relu_2.a4",
        "layer2.conv2": "relu_3.a4",
        "head.fc": "mean.a8",
    }


def test_one_width_needs_one_quantizer():
    plan = quantized.plan(quantized.folded("residual"), "w4a8")
    assert len(plan.quantizers) == 10
    assert not any(q.after or q.tied for q in plan.quantizers.values())
    assert plan.quantizers["relu.a8"].consumers == ("layer1_conv1", "add")


def test_an_inverted_residual_without_activation_on_the_add():
    plan = quantized.plan(quantized.folded("depthwise"), "w4a4")
    assert table(plan) == [
        "x.a8: stem_0",
        "hardtanh.a8: expand_0 add",
        "hardtanh.a4: expand_0 < hardtanh.a8",
        "hardtanh_1.a4: depthwise_0",
        "hardtanh_2.a4: project_0",
        "project_0.a8: add",
        "add.a8: mean",
        "mean.a8: head_fc",
    ]


def test_a_concat_of_quantized_tensors_is_quantized_too():
    plan = quantized.plan(quantized.folded("concat"), "w4a4", "left.0=w4a4")
    assert table(plan) == [
        "x.a4: left_0 right_0",
        "relu.a8: cat",
        "relu_1.a8: cat",
        "cat.a8: chunk",
        "getitem_1.a4: inner_0",
        "relu_2.a8: cat_1",
        "mean.a8: head_fc",
    ]


def test_a_gate_is_a_float_island():
    plan = quantized.plan(quantized.folded("squeeze_excite"), "w4a4")
    assert table(plan) == [
        "x.a8: stem_0",
        "stem_0.a8: hardswish",  # the convolution writes integers, hardswish reads them as float
        "mean.a4: reduce",
        "reduce.a8: silu",
        "silu.a4: expand",
        "expand.a8: sigmoid",
        "mul.a4: last_0",
        "last_0.a8: silu_1",
        "mean_1.a8: head_fc",
    ]


def test_linear_layers_write_float():
    plan = quantized.plan(quantized.folded("linear_norm"), "w4a4", ends=None)
    assert table(plan) == ["flatten.a4: fc1", "relu.a4: fc2"]


def test_a_float_layer_asks_for_nothing():
    plan = quantized.plan(quantized.folded("residual"), "w4a4", "layer1.*=w32a32")
    assert table(plan)[:3] == [
        "x.a8: conv1",
        "relu.a8: layer1_conv1 add",
        "relu_2.a4: layer2_downsample_0 layer2_conv1",
    ]
    assert inputs(plan)["layer1.conv1"] is None


@pytest.mark.parametrize("bits", ["w4a16", "w32a32"])
def test_no_quantizer_without_quantized_activations(bits):
    plan = quantized.plan(quantized.folded("residual"), bits)
    assert plan.quantizers == {}
    assert set(inputs(plan).values()) == {None}


class PooledResidual(nn.Module):
    """ResNet's stem: the pool's output goes into a block and around it."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = models.conv_bn(3, 8), models.conv_bn(8, 8)
        self.head = models.Head(8)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        return self.head(F.relu(x + self.body(x)))


def test_a_max_pool_repeats_the_grid_of_what_it_reads():
    graph = quantized.fold_module(PooledResidual())
    assert table(quantized.plan(graph, "w8a8")) == [
        "x.a8: stem_0",
        "relu.a8: max_pool2d",
        "max_pool2d.a8: body_0 add = relu.a8",
        "body_0.a8: add",
        "relu_1.a8: mean",
        "mean.a8: head_fc",
    ]
    narrow = quantized.plan(graph, "w4a4")
    assert table(narrow)[1:4] == [
        "relu.a8: max_pool2d",
        "max_pool2d.a8: body_0 add = relu.a8",
        "max_pool2d.a4: body_0 < max_pool2d.a8",  # so that the pool has integers on both sides
    ]
    assert inputs(narrow)["body.0"] == "max_pool2d.a4"


class OptionA(nn.Module):
    """The CIFAR shortcut without parameters: every second pixel, zeros for the new channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = models.conv_bn(3, 8), models.conv_bn(8, 16, stride=2)
        self.head = models.Head(16)

    def forward(self, x):
        x = F.relu(self.stem(x))
        skip = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(F.relu(skip + self.down(x)))


def test_slices_and_channel_pads_stay_on_the_grid():
    graph = quantized.fold_module(OptionA())
    assert table(quantized.plan(graph, "w8a8")) == [
        "x.a8: stem_0",
        "relu.a8: slice_1 down_0",
        "pad.a8: add = relu.a8",
        "down_0.a8: add",
        "relu_1.a8: mean",
        "mean.a8: head_fc",
    ]
    assert table(quantized.plan(graph, "w4a4"))[1:4] == [
        "relu.a8: slice_1 down_0",
        "relu.a4: down_0 < relu.a8",
        "pad.a8: add = relu.a8",
    ]


class Padded(nn.Module):
    """TensorFlow's `same` padding, in front of a stride-2 convolution."""

    def __init__(self, pad=(0, 1, 0, 1), mode="constant", value=0.0):
        super().__init__()
        self.stem = models.conv_bn(3, 8)
        self.body = nn.Conv2d(8, 8, 3, stride=2)
        self.head = models.Head(8)
        self.pad = lambda x: F.pad(x, pad, mode, value if mode == "constant" else None)

    def forward(self, x):
        return self.head(F.relu(self.body(self.pad(F.relu(self.stem(x))))))


def test_a_zero_pad_belongs_to_the_convolution_behind_it():
    plan = quantized.plan(quantized.fold_module(Padded()), "w4a4")
    assert table(plan)[1:3] == ["relu.a4: pad", "relu_1.a8: mean"]
    assert inputs(plan)["body"] == "relu.a4"


@pytest.mark.parametrize(
    "options", [{"mode": "reflect"}, {"value": 1.0}], ids=["reflected", "of ones"]
)
def test_other_pads_are_quantized_behind(options):
    plan = quantized.plan(quantized.fold_module(Padded(**options)), "w4a4")
    assert inputs(plan)["body"] == "pad.a4"
    # A reflection holds values of its input; ones need not be on the input's grid.
    tied = plan.quantizers["pad.a4"].tied
    assert tied == ("relu.a4" if "mode" in options else None)


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = models.conv_bn(3, 8)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.out = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.out(torch.cat([self.left(x), self.right(x)], 1))


@pytest.fixture(scope="module")
def two_readers():
    return quantized.fold_module(TwoReaders())


def test_readers_of_different_width_share_the_eight_bit_tensor(two_readers):
    plan = quantized.plan(two_readers, "w4a4", "right=w4a6")
    assert table(plan)[1:4] == [
        "relu.a8: left right",
        "relu.a6: right < relu.a8",
        "relu.a4: left < relu.a8",
    ]
    assert inputs(plan)["left"] == "relu.a4"
    assert inputs(plan)["right"] == "relu.a6"


def test_a_final_convolution_is_quantized_up_to_the_output(two_readers):
    plan = quantized.plan(two_readers, "w4a4")
    assert table(plan)[-4:] == ["left.a8: cat", "right.a8: cat", "cat.a8: out", "out.a8: output"]


def test_without_integer_kernels_only_inputs_and_skips_are_quantized():
    plan = quantized.plan(quantized.folded("residual"), "w4a4", target=quantized.INPUTS)
    assert table(plan) == [
        "x.a8: conv1",
        "relu.a8: add",
        "relu.a4: layer1_conv1",
        "relu_1.a4: layer1_conv2",
        "relu_2.a4: layer2_downsample_0 layer2_conv1",
        "layer2_downsample_0.a8: add_1",
        "relu_3.a4: layer2_conv2",
        "mean.a8: head_fc",
    ]  # layer1_conv2 and layer2_conv2 write their adds bare
    schemes = {q.name: (q.scheme.signed, q.scheme.quant_max) for q in plan.quantizers.values()}
    assert schemes == {
        "x.a8": (True, 127),
        "relu.a8": (True, 127),
        "relu.a4": (False, 15),
        "relu_1.a4": (False, 15),
        "relu_2.a4": (False, 15),
        "layer2_downsample_0.a8": (True, 127),
        "relu_3.a4": (False, 15),
        "mean.a8": (True, 127),
    }
    assert all(q.scheme.symmetric for q in plan.quantizers.values())
    signed = quantized.plan(
        quantized.folded("squeeze_excite"), "w4a4", target=quantized.INPUTS
    ).quantizers
    assert (signed["silu.a4"].scheme.quant_min, signed["silu.a4"].scheme.quant_max) == (-8, 7)


def test_an_add_without_a_layer_beside_it_stays_in_float_for_inputs():
    plan = quantized.plan(quantized.folded("attention"), "w8a8", target=quantized.INPUTS)
    assert table(plan) == [
        "x.a8: patch",
        "layer_norm.a8: qkv",
        "reshape_1.a8: project",
        "mean.a8: fc",
    ]
