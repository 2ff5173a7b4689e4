import dataclasses

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

import models
import numerics
import quantized
from dfqc.compiler import affine
from dfqc.compiler.graph import copy_graph
from dfqc.compiler.quantize import rtn
from dfqc.compiler.quantize._ranges import weight_grid
from dfqc.compiler.spec import QScheme, Quantizer


@pytest.fixture(scope="module")
def plan():
    return quantized.plan(quantized.folded("residual"), "w4a4")


@pytest.fixture(scope="module")
def state(plan):
    return quantized.quantize(quantized.folded("residual"), plan)


def test_every_planned_tensor_is_decided(plan, state):
    graph = quantized.folded("residual")
    assert list(state.acts) == list(plan.quantizers)
    assert list(state.weights) == list(state.biases) == list(plan.layers)
    assert state.plan == plan
    for name, weight in state.weights.items():
        layer = graph.module.get_submodule(name)
        bits = plan.layers[name].exported.weight
        assert weight.codes.shape == layer.weight.shape
        assert weight.codes.dtype == torch.int8
        assert weight.scale.shape == (len(layer.weight),)
        assert weight.codes.min() >= -(2 ** (bits - 1))
        assert weight.codes.max() <= 2 ** (bits - 1) - 1
        assert torch.equal(state.biases[name], layer.bias)


def test_weights_are_rounded_to_the_nearest_code(plan, state):
    graph = quantized.folded("residual")
    for name, weight in state.weights.items():
        real = graph.module.get_submodule(name).weight.numpy()
        scale = weight.scale.numpy().reshape(-1, *[1] * (real.ndim - 1))
        bits = plan.layers[name].exported.weight
        np.testing.assert_array_equal(
            weight.codes, numerics.quantize(real, scale, 0, bits, True), err_msg=name
        )


def test_the_image_grid_holds_every_valid_pixel(state):
    spec = models.IMAGE
    black = min(-m / s for m, s in zip(spec.mean, spec.std, strict=True))
    white = max((1 - m) / s for m, s in zip(spec.mean, spec.std, strict=True))
    expected = numerics.qparams(black, white, QScheme(8, False, False))
    assert (state.acts["x.a8"].scale, state.acts["x.a8"].zero_point) == expected


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.45, 0.225), (0.0, 1.0)])
def test_pixels_do_not_lie_halfway_between_codes(mean, std, bits):
    image = dataclasses.replace(models.IMAGE, mean=(mean,) * 3, std=(std,) * 3)
    graph = dataclasses.replace(quantized.folded("plain"), image=image)
    scheme = QScheme(bits, False, False)
    grid = rtn._image_grid(graph, Quantizer("x.a", "x", scheme, ()))
    pixels = (np.arange(256) / 255 - mean) / std
    codes = pixels / grid.scale
    if bits == 8:
        assert (np.abs(codes - np.floor(codes) - 0.5) < 1e-4).mean() < 0.02
    kept = np.clip(np.round(codes) + grid.zero_point, 0, scheme.quant_max) - grid.zero_point
    assert np.abs(kept * grid.scale - pixels).max() <= 0.501 * grid.scale


def test_two_widths_of_one_tensor_have_their_own_grids(state):
    wide, narrow = state.acts["relu.a8"], state.acts["relu.a4"]
    assert narrow.scale > wide.scale * 4
    assert narrow.zero_point == wide.zero_point == 0


def test_a_tied_quantizer_repeats_the_grid():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = models.conv_bn(3, 8), models.conv_bn(8, 8)
            self.pool, self.head = nn.MaxPool2d(2), models.Head(8)

        def forward(self, x):
            return self.head(torch.relu(self.body(self.pool(torch.relu(self.stem(x))))))

    graph = quantized.fold_module(Pooled())
    plan = quantized.plan(graph, "w4a4")
    assert plan.quantizers["max_pool2d.a4"].tied == "relu.a4"
    acts = quantized.quantize(graph, plan).acts
    assert acts["max_pool2d.a4"] == acts["relu.a4"]


@pytest.mark.parametrize(
    "options",
    [{"weights": "minmax", "acts": "minmax"}, {"acts": "percentile", "percentile": 99.0}],
    ids=str,
)
def test_range_estimators_are_chosen_by_name(options, plan, state):
    other = quantized.quantize(quantized.folded("residual"), plan, **options)
    assert other.acts["relu_1.a4"] != state.acts["relu_1.a4"]
    same = torch.equal(other.weights["layer1.conv1"].scale, state.weights["layer1.conv1"].scale)
    assert same == ("weights" not in options)


def test_minmax_covers_the_largest_activation(plan):
    graph = quantized.folded("residual")
    acts = quantized.quantize(graph, plan, acts="minmax").acts
    conv = graph.module.get_submodule("conv1")
    with torch.inference_mode():
        largest = torch.relu(conv(quantized.calib().images)).max().item()
    assert acts["relu.a8"].scale == pytest.approx(largest / 255, rel=1e-5)
    assert acts["relu.a4"].scale == pytest.approx(largest / 15, rel=1e-5)


def test_equal_inputs_give_equal_states(plan, state):
    again = quantized.quantize(quantized.folded("residual"), plan)
    assert again.acts == state.acts
    for name, weight in state.weights.items():
        assert torch.equal(weight.codes, again.weights[name].codes)
        assert torch.equal(weight.scale, again.weights[name].scale)


def test_batches_do_not_change_the_grids(plan, state):
    again = quantized.quantize(quantized.folded("residual"), plan, batch_size=7)
    for name, grid in state.acts.items():
        assert again.acts[name].scale == pytest.approx(grid.scale, rel=0.02), name


def test_float_layers_are_left_out():
    graph = quantized.folded("transposed")
    plan = quantized.plan(graph, "w4a8", "head.fc=w32a32")
    state = quantized.quantize(graph, plan)
    assert list(state.weights) == ["down.0"]


def test_a_weight_only_plan_has_weights_and_no_grids():
    graph = quantized.folded("residual")
    state = quantized.quantize(graph, quantized.plan(graph, "w4a16"))
    assert not state.acts
    assert set(state.weights) == set(state.plan.layers)


@pytest.mark.parametrize("bits", ["w2a4", "w8a8"])
def test_dead_channels_leave_room_for_their_bias(bits):
    # Batch norm leaves such channels: weights near zero, an ordinary bias.
    graph = copy_graph(quantized.folded("no_norm"))
    conv = graph.module.get_submodule("conv2")
    conv.weight[:4] *= 1e-12
    conv.bias[:4] = torch.tensor([3.0, -3.0, 1e-3, 0.0])
    plan = quantized.plan(graph, bits, ends=None)
    state = quantized.quantize(graph, plan)
    weight, grid = state.weights["conv2"], state.acts[plan.layers["conv2"].input]
    codes = affine.bias_codes(conv.bias, grid.scale, weight.scale)
    assert codes.abs().max() <= affine.BIAS_LIMIT * (1 + 1e-6)
    step = grid.scale * weight.scale.double()
    np.testing.assert_allclose((codes * step)[:4], conv.bias[:4], atol=1e-8)
    untouched = weight_grid(conv.weight[4:], plan.layers["conv2"].weight, "mse").scale
    assert torch.equal(weight.scale[4:], untouched)


@pytest.mark.parametrize(
    "wrong", [{"weights": "best"}, {"percentile": 50}, {"batch_size": 0}, {"unknown": 1}], ids=str
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        rtn.Options(**wrong)
