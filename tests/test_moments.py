import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

import models
import quantized
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.graph import Graph
from dfqc.compiler.moments import (
    PIXEL_MEAN,
    clipped_moments,
    expected_inputs,
    folded_inputs,
    input_moments,
    leaky_relu_moments,
    relu_moments,
    smooth_moments,
)
from dfqc.compiler.passes.fold import fold

# One channel: a layer's output is then as Gaussian as the image itself.
IMAGE = ImageSpec((1, 16, 16), (PIXEL_MEAN,), (0.225,))
COUNT = 64


def integrate(function, mean, std):
    """Mean and variance of function(y), y ~ N(mean, std^2), by the trapezoidal rule."""
    y = np.linspace(mean - 12 * std, mean + 12 * std, 400_001)
    values = function(torch.from_numpy(y)).numpy()
    density = stats.norm.pdf(y, mean, std)
    first = np.trapezoid(values * density, y)
    return first, np.trapezoid((values - first) ** 2 * density, y)


CLOSED_FORMS = {
    "relu": (relu_moments, F.relu),
    "relu6": (lambda m, v: clipped_moments(m, v, 6.0), F.relu6),
    "cap 1": (lambda m, v: clipped_moments(m, v, 1.0), lambda y: y.clamp(0, 1)),
    "leaky": (lambda m, v: leaky_relu_moments(m, v, 0.1), lambda y: F.leaky_relu(y, 0.1)),
}
SMOOTH = {
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}
NORMALS = [(0.0, 1.0), (1.5, 0.5), (-2.0, 1.0), (-5.0, 1.0), (3.0, 4.0), (7.0, 0.3), (0.2, 2.0)]


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize(("mean", "std"), NORMALS)
def test_closed_forms_are_the_integrals(name, mean, std):
    formula, function = CLOSED_FORMS[name]
    found = formula(torch.tensor(mean).double(), torch.tensor(std).double() ** 2)
    first, second = integrate(function, mean, std)
    assert found.mean.item() == pytest.approx(first, rel=1e-6, abs=1e-9)
    assert found.var.item() == pytest.approx(second, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(("mean", "std"), NORMALS)
def test_quadrature_is_the_integral(name, mean, std):
    found = smooth_moments(
        torch.tensor(mean).double(), torch.tensor(std).double() ** 2, SMOOTH[name]
    )
    first, second = integrate(SMOOTH[name], mean, std)
    # hardswish has kinks, where 64 points are good for three digits
    assert found.mean.item() == pytest.approx(first, rel=3e-3, abs=3e-3)
    assert found.var.item() == pytest.approx(second, rel=1e-2, abs=3e-3)


def test_a_constant_passes_as_it_is():
    mean = torch.tensor([-1.0, 0.5, 7.0]).double()
    zero = torch.zeros(3).double()
    torch.testing.assert_close(relu_moments(mean, zero).mean, F.relu(mean))
    torch.testing.assert_close(clipped_moments(mean, zero, 6.0).mean, F.relu6(mean))
    torch.testing.assert_close(smooth_moments(mean, zero, F.silu).mean, F.silu(mean))
    assert relu_moments(mean, zero).var.abs().max() < 1e-12


def gaussian_images():
    """Images whose pixels are the quantiles of the normal distribution, in random order."""
    size = COUNT * 16 * 16
    quantiles = stats.norm.ppf((np.arange(size) + 0.5) / size)
    np.random.default_rng(0).shuffle(quantiles)
    return torch.from_numpy(quantiles).view(COUNT, 1, 16, 16)


def traced(module: nn.Module) -> Graph:
    """Trace a net whose batch norms hold the exact statistics of `gaussian_images`."""
    models.randomize_norms(module)
    module.double()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum, norm.eps = None, 1e-9
            norm.reset_running_stats()
    # Layer by layer: each batch norm counts on inputs that the ones before it made.
    module.train()
    with torch.no_grad():
        module(gaussian_images())
    module.eval().float()
    return models.trace_module(module, IMAGE)


def measured_inputs(graph: Graph) -> dict[str, torch.Tensor]:
    """Mean input of every layer over images and positions, (channels,)."""
    module, found = graph.module, {}

    def record(name):
        def hook(_module, inputs):
            x = inputs[0].double()
            found[name] = x.mean((0, 2, 3)) if x.dim() == 4 else x.flatten(0, -2).mean(0)

        return hook

    handles = [
        child.register_forward_pre_hook(record(name))
        for name, child in module.named_modules()
        if isinstance(child, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        module(gaussian_images().float())
    for handle in handles:
        handle.remove()
    return found


def over_positions(mean: torch.Tensor) -> torch.Tensor:
    return mean.mean((0, 2, 3)) if mean.dim() == 4 else mean.flatten(0, -2).mean(0)


def check_means(graph, atol):
    """Compare all layers; `atol` holds for outputs with a standard deviation near 1."""
    found, measured = expected_inputs(graph), measured_inputs(graph)
    assert found.keys() == measured.keys()
    for name, mean in found.items():
        assert mean.dtype == torch.float64
        assert len(mean) == 1
        gap = (over_positions(mean) - measured[name]).abs().max()
        assert gap < atol, f"{name}: {gap}"


class Residual(nn.Module):
    """The two tensors of the add: a rectified normal one, and one behind a batch norm."""

    def __init__(self):
        super().__init__()
        self.stem = models.conv_bn(1, 6, 1)
        self.body = models.conv_bn(6, 6)
        self.head = models.Head(6)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(x + self.body(x))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = models.conv_bn(1, 4, 1), models.conv_bn(1, 5, 1)
        self.mix = models.conv_bn(9, 6)
        self.head = models.Head(6)

    def forward(self, x):
        x = torch.cat([F.relu6(self.left(x) * 1), F.leaky_relu(self.right(x), 0.2)], 1)
        return self.head(self.mix(x))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand = models.conv_bn(1, 8, 1)
        self.depthwise = models.conv_bn(8, 8, groups=8)
        self.project = models.conv_bn(8, 4, 1)
        self.head = models.Head(4)

    def forward(self, x):
        x = self.depthwise(F.silu(self.expand(x)))
        return self.head(F.avg_pool2d(self.project(x), 2))


class Bare(nn.Module):
    """Layers without batch norm between: the mean passes through them exactly."""

    def __init__(self):
        super().__init__()
        self.stem = models.conv_bn(1, 6, 1)
        self.first = nn.Conv2d(6, 8, 3)
        self.second = nn.Conv2d(8, 6, 3, padding=1, stride=2, bias=False)
        self.fc = nn.Linear(6, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        x = self.second(self.first(F.relu(self.stem(x))))
        return self.out(self.fc(x.mean((2, 3))))


@pytest.mark.parametrize("net", [Residual, Depthwise, Bare], ids=lambda net: net.__name__)
def test_expected_inputs_are_the_true_means(net):
    check_means(traced(net()), 1e-2)


def test_an_operator_that_is_not_understood_is_left_out_until_the_next_norm():
    graph = traced(Concat())  # the multiplication by a constant
    found, measured = expected_inputs(graph), measured_inputs(graph)
    assert measured.keys() - found.keys() == {"mix.0"}
    gap = (over_positions(found["head.fc"]) - measured["head.fc"]).abs().max()
    assert gap < 1e-2


def test_concatenation_keeps_the_means_of_its_parts():
    class Clean(Concat):
        def forward(self, x):
            x = torch.cat([F.relu6(self.left(x)), F.leaky_relu(self.right(x), 0.2)], 1)
            return self.head(self.mix(x))

    check_means(traced(Clean()), 1e-2)


def test_the_mean_image_is_in_the_middle_of_natural_ones():
    image = ImageSpec((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    first = expected_inputs(quantized.traced("no_norm"))["conv1"]
    assert first.shape == (1, *image.size)
    expected = [(PIXEL_MEAN - m) / s for m, s in zip(image.mean, image.std, strict=True)]
    torch.testing.assert_close(first[0, :, 3, 5], torch.tensor(expected).double())


def test_a_gate_scales_the_moments_on_either_side():
    class Gated(nn.Module):
        def __init__(self, *, gate_first):
            super().__init__()
            self.gate_first = gate_first
            self.stem = models.conv_bn(1, 6, 1)
            self.gate = nn.Conv2d(6, 6, 1)
            self.last = nn.Conv2d(6, 4, 1)

        def forward(self, x):
            x = F.relu(self.stem(x))
            gate = torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
            return self.last(gate * x if self.gate_first else x * gate)

    found = []
    for gate_first in (False, True):
        torch.manual_seed(0)
        graph = traced(Gated(gate_first=gate_first))
        # The gate of one image is not constant, which the walker takes it for.
        check_means(graph, 2e-2)
        found.append(input_moments(graph)["last"].var)
    torch.testing.assert_close(found[0], found[1])
    assert float(found[0].min()) > 1e-3


def test_a_layer_that_took_in_a_norm_reads_what_the_norm_read():
    class NormFirst(nn.Module):
        """Two readers of the sum: the batch norm can only go into the layer behind it."""

        def __init__(self):
            super().__init__()
            self.stem = models.conv_bn(1, 6, 1)
            self.norm = nn.BatchNorm2d(6)
            self.inner = nn.Conv2d(6, 6, 1)
            self.inner_norm = nn.BatchNorm2d(6)
            self.head = models.Head(6)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.head(x + self.inner_norm(self.inner(self.norm(x))))

    graph = traced(NormFirst())
    folded = fold(graph)
    assert "norm" not in dict(folded.module.named_modules())
    unfolded_mean = over_positions(expected_inputs(graph)["inner"])
    found, measured = folded_inputs(graph, folded), measured_inputs(folded)
    for name, mean in found.items():
        torch.testing.assert_close(over_positions(mean), measured[name], rtol=0, atol=1e-2)
    assert (unfolded_mean - measured["inner"]).abs().max() > 0.1


def test_norms_that_went_into_their_producer_change_no_input():
    for name in ("residual", "depthwise", "linear_norm"):
        graph = quantized.traced(name)
        before, after = expected_inputs(graph), folded_inputs(graph, quantized.folded(name))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[path], after[path]) for path in before), name
