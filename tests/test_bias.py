import dataclasses
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import fx, nn
from torch.nn import functional as F

import models
import numerics
import quantized
from dfqc.compiler import affine
from dfqc.compiler.graph import node_shapes
from dfqc.compiler.moments import expected_inputs, input_moments
from dfqc.compiler.passes import bias
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.simulate import TorchRunner, simulated

IMAGES = quantized.calib(24, seed=5)
EMPIRICAL = [("residual", "w4a4"), ("attention", "w3a8"), ("concat", "w4a8"), ("no_norm", "w2a16")]


def correct(graph, state, method, unfolded=None, *, given=None, **options):
    chosen = bias.Options(method=method, **options)
    return bias.correct(
        graph, unfolded or graph, state, IMAGES, chosen, device=quantized.CPU, **(given or {})
    )


def channel_means(graph, names):
    """Mean output per channel of the named nodes, over all images and positions."""
    found = {}

    class Watch(fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.name in names:
                axis = 1 if n.target in convolutions else -1
                rest = [d for d in range(value.dim()) if d != axis % value.dim()]
                found[n.name] = value.double().mean(rest)
            return value

    convolutions = {name for name, m in graph.module.named_modules() if isinstance(m, nn.Conv2d)}
    with torch.no_grad():
        Watch(graph.module).run(IMAGES.images)
    return found


class Constant(nn.Module):
    """A batch norm without slope: every activation behind the stem is a constant per channel."""

    def __init__(self, *, norm_between: bool):
        super().__init__()
        self.stem = models.conv_bn(3, 8)
        self.norm = nn.BatchNorm2d(8) if norm_between else None
        self.first = nn.Conv2d(8, 8, 1, bias=False)
        self.second = nn.Conv2d(8, 12, 3, stride=2)
        self.head = models.Head(12)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.first(x if self.norm is None else self.norm(x))
        return self.head(self.second(x + y))


@pytest.mark.parametrize("norm_between", [False, True])
def test_analytic_correction_of_constant_inputs_removes_the_error(norm_between):
    net = Constant(norm_between=norm_between)
    models.randomize_norms(net)
    with torch.no_grad():
        net.stem[1].weight.zero_()
        net.stem[1].bias.copy_(torch.linspace(-0.5, 2, 8))
        if norm_between:
            net.norm.running_mean.copy_(F.relu(net.stem[1].bias))
    unfolded = models.trace_module(net)
    graph = fold(unfolded)
    assert ("norm" in dict(graph.module.named_modules())) is False
    state = quantized.quantize(graph, quantized.plan(graph, "w2a32", ends=None))
    images = IMAGES.images.numpy()
    exact = TorchRunner(graph).infer(images)
    corrected = correct(graph, state, "analytic", unfolded)
    numerics.assert_sqnr(TorchRunner(simulated(graph, corrected)).infer(images), exact, 100)
    with pytest.raises(AssertionError, match="SQNR"):
        numerics.assert_sqnr(TorchRunner(simulated(graph, state)).infer(images), exact, 40)
    assert corrected.info["bias_correction"]["without_statistics"] == []


def test_analytic_correction_is_the_weight_error_times_the_expected_input():
    graph = quantized.folded("residual")
    state = quantized.quantize(graph, quantized.plan(graph, "w4a4"))
    corrected = correct(graph, state, "analytic", quantized.traced("residual"))
    mean = expected_inputs(quantized.traced("residual"))
    for name in ("layer2.downsample.0", "head.fc"):  # no borders: a plain product
        weight = state.weights[name]
        scale = weight.scale.double().numpy().reshape(-1, *[1] * (weight.codes.dim() - 1))
        error = weight.codes.numpy() * scale - graph.module.get_submodule(name).weight.numpy()
        flat = mean[name].numpy().reshape(error.shape[1], -1).mean(1)
        expected = state.biases[name].numpy() - error.reshape(error.shape[:2]) @ flat
        np.testing.assert_allclose(corrected.biases[name], expected, rtol=1e-5, atol=1e-6)


def test_layers_without_statistics_keep_their_bias_and_are_named():
    graph = quantized.folded("concat")
    state = quantized.quantize(graph, quantized.plan(graph, "w4a8"))
    corrected = correct(graph, state, "analytic", quantized.traced("concat"))
    info = corrected.info["bias_correction"]
    skipped = info["without_statistics"]
    assert "left.0" not in skipped
    assert info["corrected"] == len(state.weights) - len(skipped)
    for name, value in state.biases.items():
        assert torch.equal(corrected.biases[name], value) == (name in skipped), name


@pytest.mark.parametrize(("net", "bits"), EMPIRICAL)
def test_empirical_correction_gives_every_channel_its_float_mean(net, bits):
    graph = quantized.folded(net)
    state = quantized.quantize(graph, quantized.plan(graph, bits))
    corrected = correct(graph, state, "empirical", batch_size=7)
    info = corrected.info["bias_correction"]
    assert info == {"method": "empirical", "variance": "keep", "images": 24}
    check_means(graph, state, corrected)


def check_means(graph, state, corrected):
    """Fail unless every mean is its float one to half a step of the bias grid."""
    nodes = {layer.node: layer for layer in state.plan.layers.values()}
    exact = channel_means(graph, nodes)
    before = channel_means(simulated(graph, state, integer=False), nodes)
    after = channel_means(simulated(graph, corrected, integer=False), nodes)
    for node, layer in nodes.items():
        step = torch.zeros(1)
        if layer.input is not None:
            step = affine.bias_scale(state.acts[layer.input].scale, state.weights[layer.name].scale)
        gap = (after[node] - exact[node]).abs()
        assert (gap <= 0.5 * step + 2e-6).all(), f"{layer.name}: {gap.max()}"
    far = [n for n in nodes if (before[n] - exact[n]).abs().max() > 1e-3]
    assert len(far) >= 2, "there was nothing to correct"


def test_batches_do_not_change_the_empirical_correction():
    graph = quantized.folded("residual")
    state = quantized.quantize(graph, quantized.plan(graph, "w4a8"))
    one, many = (correct(graph, state, "empirical", batch_size=b).biases for b in (24, 5))
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=0, atol=2e-5)


def test_a_layer_without_bias_gets_one():
    class NoBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, bias=False)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.last(F.relu(self.conv(x)))

    graph = quantized.fold_module(NoBias())
    state = quantized.quantize(graph, quantized.plan(graph, "w2a8", ends=None))
    assert list(state.biases) == ["last"]
    corrected = correct(graph, state, "empirical")
    assert set(corrected.biases) == {"conv", "last"}
    check_means(graph, state, corrected)


@pytest.mark.parametrize("method", ["none", "analytic", "empirical", "blend", "auto"])
def test_the_given_state_is_not_modified(method):
    graph = quantized.folded("residual")
    state = quantized.quantize(graph, quantized.plan(graph, "w4a4"))
    kept = {name: value.clone() for name, value in state.biases.items()}
    corrected = correct(graph, state, method, quantized.traced("residual"))
    assert state.biases.keys() == kept.keys()
    assert all(torch.equal(state.biases[name], value) for name, value in kept.items())
    assert (corrected.acts, corrected.plan) == (state.acts, state.plan)
    assert corrected.weights is state.weights
    same = all(torch.equal(corrected.biases[name], value) for name, value in kept.items())
    assert same == (corrected.info["bias_correction"]["method"] == "none")


def divergence(graph, state, images):
    """Mean KL divergence of the softmax of the simulation from the float one, by numpy."""
    exact, rounded = (
        TorchRunner(g).infer(images.numpy()).astype(np.float64)
        for g in (graph, simulated(graph, state))
    )
    wanted, found = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (exact, rounded))
    return (wanted * np.log(wanted / found)).sum(1).mean()


@pytest.mark.parametrize("net", ["residual", "no_norm"])
@pytest.mark.parametrize("apart", [True, False])
def test_auto_keeps_the_method_with_the_nearest_outputs(net, apart):
    graph = quantized.folded(net)
    state = quantized.quantize(graph, quantized.plan(graph, "w3a8"))
    held_out = models.images(40, seed=9)
    given = {"held_out": held_out} if apart else {}
    chosen = correct(graph, state, "auto", quantized.traced(net), given=given)
    info = chosen.info["bias_correction"]
    scores = info["distance"]
    assert set(scores) == set(bias.METHODS)
    assert scores[info["method"]] == min(scores.values())
    again = correct(graph, state, info["method"], quantized.traced(net))
    assert all(torch.equal(again.biases[name], value) for name, value in chosen.biases.items())
    # Judged by images to which nothing was fitted: others, or a half of the calibration set.
    judges = held_out if apart else IMAGES.images[12:]
    assert scores["none"] == pytest.approx(divergence(graph, state, judges), rel=1e-4)
    fitted = IMAGES if apart else dataclasses.replace(IMAGES, images=IMAGES.images[:12])
    for method in ("analytic", "empirical", "blend"):
        alone = bias.correct(
            graph, quantized.traced(net), state, fitted, bias.Options(method=method),
            device=quantized.CPU,
        )  # fmt: skip
        assert scores[method] == pytest.approx(divergence(graph, alone, judges), rel=1e-4)


def test_many_held_out_images_are_judged_from_all_over_the_set():
    graph = quantized.folded("no_norm")
    state = quantized.quantize(graph, quantized.plan(graph, "w3a8"))
    held_out = models.images(160, seed=9)
    info = correct(graph, state, "auto", given={"held_out": held_out}).info["bias_correction"]
    expected = divergence(graph, state, held_out[::2])
    assert info["distance"]["none"] == pytest.approx(expected, rel=1e-4)


def test_a_single_output_is_judged_by_its_noise():
    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.last = nn.Conv2d(8, 1, 1)

        def forward(self, x):
            return self.last(F.relu(self.conv(x)))

    graph = quantized.fold_module(Depth())
    state = quantized.quantize(graph, quantized.plan(graph, "w2a8", ends=None))
    found = bias.output_distance(graph, state, IMAGES.images, device=quantized.CPU)
    exact, rounded = (
        TorchRunner(g).infer(IMAGES.images.numpy()) for g in (graph, simulated(graph, state))
    )
    assert found == pytest.approx(((exact - rounded) ** 2).sum() / (exact**2).sum(), rel=1e-5)
    assert found > 0.01


def test_a_blend_is_the_mean_of_both_and_empirical_without_statistics():
    graph, unfolded = quantized.folded("concat"), quantized.traced("concat")
    state = quantized.quantize(graph, quantized.plan(graph, "w4a8"))
    methods = ("analytic", "empirical", "blend")
    analytic, empirical, blend = (correct(graph, state, m, unfolded) for m in methods)
    skipped = blend.info["bias_correction"]["without_statistics"]
    assert skipped
    assert len(skipped) < len(state.weights)
    for name, value in blend.biases.items():
        mean = (analytic.biases[name] + empirical.biases[name]) / 2
        expected = empirical.biases[name] if name in skipped else mean
        torch.testing.assert_close(value, expected)


def test_restandardizing_gives_independent_inputs_their_float_variance():
    """By Monte Carlo: normal inputs of the stated moments, a layer without borders."""
    graph, unfolded = quantized.folded("residual"), quantized.traced("residual")
    state = quantized.quantize(graph, quantized.plan(graph, "w2a8"))
    before = {name: weight.scale.clone() for name, weight in state.weights.items()}
    result = bias.restandardize(graph, unfolded, state)
    assert all(torch.equal(state.weights[name].scale, scale) for name, scale in before.items())
    name = "layer2.downsample.0"
    moments = input_moments(unfolded)[name]
    rng = np.random.default_rng(0)
    inputs = moments.mean.shape[1]
    sigma, mean = (v[0, :, 0, 0].numpy() for v in (moments.var.sqrt(), moments.mean))
    x = rng.normal(mean, sigma, (200_000, inputs))

    def variance(weight):
        return (x @ weight.reshape(len(weight), -1).T).var(0)

    def rounded(state):
        weight = state.weights[name]
        return weight.codes.numpy() * weight.scale.numpy().reshape(-1, 1, 1, 1)

    wanted = variance(graph.module.get_submodule(name).weight.detach().numpy())
    np.testing.assert_allclose(variance(rounded(result)), wanted, rtol=0.03)
    assert np.abs(variance(rounded(state)) / wanted - 1).max() > 0.1, "nothing to restore"
    assert torch.equal(result.weights[name].codes, state.weights[name].codes)


def test_restandardized_layers_are_corrected_for_the_weights_they_have():
    graph, unfolded = quantized.folded("residual"), quantized.traced("residual")
    state = quantized.quantize(graph, quantized.plan(graph, "w3a8"))
    corrected = correct(graph, state, "empirical", unfolded, variance="analytic")
    scaled = bias.restandardize(graph, unfolded, state)
    check_means(graph, scaled, corrected)
    assert corrected.info["bias_correction"]["variance"] == "analytic"


def test_only_the_asked_images_are_measured():
    graph = quantized.folded("no_norm")
    state = quantized.quantize(graph, quantized.plan(graph, "w4a8"))
    corrected = correct(graph, state, "empirical", images=9)
    assert corrected.info["bias_correction"]["images"] == 9


@pytest.mark.parametrize("wrong", [{"method": "best"}, {"images": 0}, {"extra": 1}], ids=str)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        bias.Options(**wrong)


def test_auto_does_not_derive_means_again_that_were_put_back():
    graph, unfolded = quantized.folded("residual"), quantized.traced("residual")
    state = quantized.quantize(graph, quantized.plan(graph, "w3a4"))
    restored = dataclasses.replace(state, info={**state.info, "restored_means": True})
    free, found = (correct(graph, s, "auto", unfolded) for s in (state, restored))
    distances = found.info["bias_correction"]["distance"]
    assert set(distances) == {"none", "empirical"}
    assert found.info["bias_correction"]["method"] == min(distances, key=distances.get)
    assert distances.items() <= free.info["bias_correction"]["distance"].items()


def test_images_whose_activations_do_not_fit_are_left_out():
    graph = models.trace_tiny("residual")
    largest = max(math.prod(shape) for shape in node_shapes(graph).values())
    room = 20 * 3 * 4 * largest  # of twenty images, three tensors at a time
    assert bias.count_images(graph, 4 * room) == 20
    assert bias.count_images(graph, 1) == 16
    assert bias.count_images(graph, None) > 1000
    folded = quantized.folded("residual")
    state = quantized.quantize(folded, quantized.plan(folded, "w4a8"))
    found = correct(folded, state, "empirical", given={"memory_bytes": 1})
    assert found.info["bias_correction"]["images"] == 16
