import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import models
import numerics
import quantized
from dfqc.compiler import affine
from dfqc.compiler.contracts import QParams, QTensor
from dfqc.compiler.graph import copy_graph, verify
from dfqc.compiler.simulate import FakeQuantize, IntegerLayer, TorchRunner, simulated
from dfqc.compiler.spec import QScheme

LAYERS = {
    "dense": nn.Conv2d(6, 8, 3, padding=1),
    "strided": nn.Conv2d(6, 8, 3, stride=(2, 1), padding=(1, 0)),
    "dilated": nn.Conv2d(6, 8, 3, padding=2, dilation=(2, 1)),
    "grouped": nn.Conv2d(6, 9, 3, padding=1, groups=3),
    "depthwise": nn.Conv2d(6, 12, 5, padding=2, groups=6),
    "pointwise": nn.Conv2d(6, 8, 1, stride=2),
    "wide": nn.Conv2d(600, 4, 3, padding=1),  # sums beyond 2^24
    "linear": nn.Linear(6, 8),
    "long linear": nn.Linear(3000, 5),
}
OUTPUTS = [None, (8, False, 31), (4, False, 0), (8, True, 0)]


@dataclasses.dataclass
class Sample:
    """A layer with random codes, and what the integer kernel must compute."""

    module: IntegerLayer
    x: np.ndarray
    expected: np.ndarray


def sample(layer, bits, output, seed=0):
    rng = np.random.default_rng(seed)
    low, high = numerics.grid(bits, True)
    codes = rng.integers(low, high + 1, layer.weight.shape)
    codes[::2] = np.minimum(np.abs(codes[::2]), high)  # sums that do not cancel out
    width = layer.weight.shape[1] * getattr(layer, "groups", 1)
    shape = (3, 5, width) if isinstance(layer, nn.Linear) else (2, width, 9, 8)
    # The widest codes there are, so that sums are as large as they get.
    x = rng.choice([0, 255] if bits == 8 else np.arange(2**bits), shape)
    zero_point = 3
    sx = np.float32(0.0173)
    sw = rng.uniform(0.001, 0.02, len(codes)).astype(np.float32)
    bias = rng.normal(size=len(codes)).astype(np.float32)
    shift = np.rint(bias.astype(np.float64) / (sx * sw)).astype(np.int64)
    if isinstance(layer, nn.Linear):
        total = (x - zero_point).astype(np.int64) @ codes.T.astype(np.int64) + shift
    else:
        names = ("stride", "padding", "dilation", "groups")
        options = {name: getattr(layer, name) for name in names}
        total = numerics.convolve(x - zero_point, codes, **options)
        total += shift.reshape(1, -1, 1, 1)
    step = sx * sw
    if output is not None:
        out_bits, signed, out_zero = output
        sy = np.float32(np.abs(total).max() * step.mean() / 2 ** (out_bits - 1))
        step = (step / sy).astype(np.float32)
    if not isinstance(layer, nn.Linear):
        step = step.reshape(1, -1, 1, 1)
    real = total.astype(np.float32) * step  # converted once, multiplied once
    assert real.dtype == np.float32
    if output is not None:
        out_codes = np.clip(
            np.rint(real).astype(np.int64) + out_zero, *numerics.grid(out_bits, signed)
        )
        real = (out_codes - out_zero).astype(np.float32) * sy
    module = IntegerLayer(
        layer,
        QTensor(torch.from_numpy(codes.astype(np.int8)), torch.from_numpy(sw)),
        torch.from_numpy(bias),
        QParams(float(sx), zero_point),
        None
        if output is None
        else (QParams(float(sy), out_zero), QScheme(out_bits, signed, symmetric=False)),
    )
    return Sample(module, ((x - zero_point).astype(np.float32) * sx), real)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_a_layer_is_its_integers_bit_for_bit(name, bits, output):
    case = sample(LAYERS[name], bits, output)
    found = case.module(torch.from_numpy(case.x)).numpy()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, case.expected)
    assert len(np.unique(found)) > 2


def test_wide_sums_are_added_in_float64():
    assert sample(LAYERS["wide"], 8, None).module.dtype == torch.float64
    assert sample(LAYERS["wide"], 2, None).module.dtype == torch.float32
    assert sample(LAYERS["dense"], 8, None).module.dtype == torch.float32


def test_a_layer_without_bias():
    layer = nn.Conv2d(4, 5, 1, bias=False)
    weight = QTensor(torch.ones(5, 4, 1, 1, dtype=torch.int8), torch.full((5,), 0.5))
    module = IntegerLayer(layer, weight, None, QParams(0.25, 0), None)
    x = torch.full((1, 4, 2, 2), 0.75)
    assert torch.equal(module(x), torch.full((1, 5, 2, 2), 4 * 3 * 0.125))


@pytest.fixture(scope="module")
def residual():
    graph = quantized.folded("residual")
    return graph, quantized.quantize(graph, quantized.plan(graph, "w4a4"))


@pytest.mark.parametrize(
    ("net", "bits", "floor"),
    [("residual", "w8a8", 60), ("depthwise", "w4a8", 60), ("attention", "w8a8", 60)],
)
def test_float_and_integer_simulation_agree(net, bits, floor):
    graph = quantized.folded(net)
    state = quantized.quantize(graph, quantized.plan(graph, bits))
    images = models.images(16, seed=8).numpy()
    exact = TorchRunner(simulated(graph, state)).infer(images)
    close = TorchRunner(simulated(graph, state, integer=False)).infer(images)
    numerics.assert_sqnr(close, exact, floor)


@pytest.mark.parametrize(
    ("net", "floor"), [("residual", 42), ("depthwise", 44), ("attention", 26), ("concat", 40)]
)
def test_eight_bits_are_close_to_float(net, floor):
    graph = quantized.folded(net)
    state = quantized.quantize(graph, quantized.plan(graph, "w8a8"))
    images = quantized.calib().images.numpy()
    reference = TorchRunner(graph).infer(images)
    numerics.assert_sqnr(TorchRunner(simulated(graph, state)).infer(images), reference, floor)


def test_the_simulation_keeps_names_and_leaves_the_graph_alone(residual):
    graph, state = residual
    code = graph.module.code
    result = simulated(graph, state)
    names = [n.name for n in graph.module.graph.nodes]
    added = [n for n in result.module.graph.nodes if n.name not in names]
    assert len(added) == len(state.plan.quantizers)
    assert [n.name for n in result.module.graph.nodes if n.name in names] == names
    assert graph.module.code == code
    assert isinstance(graph.module.get_submodule("conv1"), nn.Conv2d)
    verify(graph, "simulate")


def test_every_planned_layer_computes_in_integers(residual):
    graph, state = residual
    result = simulated(graph, state).module
    for name, layer in state.plan.layers.items():
        module = result.get_submodule(name)
        assert isinstance(module, IntegerLayer)
        # A convolution rounds to its own output grid, as QLinearConv does; QGemm writes float.
        assert (module.output is not None) == (layer.op == "Conv2d")
    assert sum(isinstance(m, FakeQuantize) for m in result.modules()) == len(state.acts)


def test_activations_are_on_their_grids(residual):
    graph, state = residual
    images = models.images(8, seed=9).numpy()
    codes = TorchRunner(simulated(graph, state)).codes(images, list(state.acts))
    assert set(codes) == {*state.acts, "output"}
    for name, quantizer in state.plan.quantizers.items():
        assert codes[name].dtype == np.uint8
        assert codes[name].max() <= quantizer.scheme.quant_max
        assert len(np.unique(codes[name])) > 2
    np.testing.assert_array_equal(
        codes["output"], TorchRunner(simulated(graph, state)).infer(images)
    )


def test_a_narrow_tensor_reads_the_wide_one(residual):
    graph, state = residual
    codes = TorchRunner(simulated(graph, state)).codes(
        models.images(4).numpy(), ["relu.a8", "relu.a4"]
    )
    wide, narrow = state.acts["relu.a8"], state.acts["relu.a4"]
    real = codes["relu.a8"].astype(np.float32) * np.float32(wide.scale)
    expected = numerics.quantize(real, narrow.scale, 0, 4, False)
    np.testing.assert_array_equal(codes["relu.a4"], expected)


def test_dead_channels_do_not_overflow():
    graph = copy_graph(quantized.folded("no_norm"))
    conv = graph.module.get_submodule("conv2")
    conv.weight[:4] *= 1e-12
    conv.bias[:4] = torch.tensor([3.0, 30.0, 0.5, -2.0])
    # Pass the channels on as they are.
    graph.module.get_submodule("head.fc").weight.copy_(torch.eye(10, 8))
    graph.module.get_submodule("head.fc").bias.zero_()
    state = quantized.quantize(graph, quantized.plan(graph, "w8a8"))
    output = TorchRunner(simulated(graph, state)).infer(models.images(4).numpy())
    half_step = state.acts["relu_1.a8"].scale / 2 + state.acts["mean.a8"].scale / 2
    np.testing.assert_allclose(
        output[:, :4], [[3.0, 30.0, 0.5, 0.0]] * 4, atol=1.01 * half_step + 30 / 127 / 2
    )


def test_weight_only_layers_read_float_and_hold_rounded_weights():
    graph = quantized.folded("residual")
    state = quantized.quantize(graph, quantized.plan(graph, "w4a16"))
    result = simulated(graph, state).module
    assert not any(isinstance(m, (FakeQuantize, IntegerLayer)) for m in result.modules())
    for name, weight in state.weights.items():
        module = result.get_submodule(name)
        scale = weight.scale.numpy().reshape(-1, *[1] * (weight.codes.dim() - 1))
        np.testing.assert_array_equal(module.weight, weight.codes.numpy() * scale)
        assert torch.equal(module.bias, state.biases[name])


def test_float_simulation_snaps_biases(residual):
    graph, state = residual
    result = simulated(graph, state, integer=False).module
    for name, layer in state.plan.layers.items():
        step = affine.bias_scale(state.acts[layer.input].scale, state.weights[name].scale)
        codes = result.get_submodule(name).bias / step
        torch.testing.assert_close(codes, codes.round(), rtol=1e-6, atol=0)
        assert not torch.equal(result.get_submodule(name).bias, state.biases[name])


def test_a_plan_of_another_graph_is_refused(residual):
    graph, state = residual
    quantizers = dict(state.plan.quantizers)
    quantizers["relu.a8"] = dataclasses.replace(quantizers["relu.a8"], source="elsewhere")
    plan = dataclasses.replace(state.plan, quantizers=quantizers)
    with pytest.raises(KeyError, match="elsewhere"):
        simulated(graph, dataclasses.replace(state, plan=plan))
