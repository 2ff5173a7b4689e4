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
from dfqc.compiler.moments import expected_inputs
from dfqc.compiler.passes import bias
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.simulate import TorchRunner, simulated

IMAGES = quantized.calib(24, seed=5)
EMPIRICAL = [("residual", "w4a4"), ("attention", "w3a8"), ("concat", "w4a8"), ("no_norm", "w2a16")]


def correct(graph, state, method, unfolded=None, **options):
    chosen = bias.Options(method=method, **options)
    return bias.correct(graph, unfolded or graph, state, IMAGES, chosen, device=quantized.CPU)


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
    assert corrected.info["bias_correction"] == {"method": "empirical", "images": 24}
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


@pytest.mark.parametrize("method", ["none", "analytic", "empirical", "auto"])
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


@pytest.mark.parametrize("net", ["residual", "no_norm"])
def test_auto_keeps_the_method_with_the_nearest_outputs(net):
    graph = quantized.folded(net)
    state = quantized.quantize(graph, quantized.plan(graph, "w3a8"))
    chosen = correct(graph, state, "auto", quantized.traced(net))
    info = chosen.info["bias_correction"]
    scores = info["output_sqnr_db"]
    assert set(scores) == set(bias.METHODS)
    assert scores[info["method"]] == max(scores.values())
    again = correct(graph, state, info["method"], quantized.traced(net))
    assert all(torch.equal(again.biases[name], value) for name, value in chosen.biases.items())
    # Judged by the half that the empirical fit did not see.
    exact = TorchRunner(graph).infer(IMAGES.images[12:].numpy())
    rounded = TorchRunner(simulated(graph, state)).infer(IMAGES.images[12:].numpy())
    noise = ((rounded - exact) ** 2).sum() / (exact**2).sum()
    assert scores["none"] == pytest.approx(-10 * np.log10(noise), abs=0.05)


def test_only_the_asked_images_are_measured():
    graph = quantized.folded("no_norm")
    state = quantized.quantize(graph, quantized.plan(graph, "w4a8"))
    corrected = correct(graph, state, "empirical", images=9)
    assert corrected.info["bias_correction"]["images"] == 9


@pytest.mark.parametrize("wrong", [{"method": "best"}, {"images": 0}, {"extra": 1}], ids=str)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        bias.Options(**wrong)
