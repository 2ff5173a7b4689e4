import math

import numpy as np
import pytest
import torch
from scipy import integrate, special

from dfqc.compiler.covariance import (
    LEAKY,
    TERMS,
    activation_moments,
    depthwise_covariance,
    hermite,
    kernel_products,
    mehler,
    output_covariance,
)
from dfqc.compiler.operators import CLIP, RELU

SILU, HARDSWISH = torch.ops.aten.silu.default, torch.ops.aten.hardswish.default
ACTIVATIONS = {
    "none": (None, (), lambda y: y),
    "relu": (RELU, (), lambda y: np.maximum(y, 0)),
    "relu6": (CLIP, (0.0, 6.0), lambda y: np.clip(y, 0, 6)),
    "narrow": (CLIP, (0, 1.0), lambda y: np.clip(y, 0, 1)),
    "leaky": (LEAKY, (0.1,), lambda y: np.where(y > 0, y, 0.1 * y)),
    "silu": (SILU, (), lambda y: y / (1 + np.exp(-y))),
    "hardswish": (HARDSWISH, (), lambda y: y * np.clip(y + 3, 0, 6) / 6),
}
MEAN, STD = (
    torch.tensor([0.4, -1.2, 2.0, 0.0]).double(),
    torch.tensor([1.0, 0.7, 2.5, 1.3]).double(),
)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_series_is_the_projection_on_hermite_polynomials(name):
    target, args, function = ACTIVATIONS[name]
    found = hermite(target, args, MEAN, STD).numpy()
    z = np.linspace(-12, 12, 200_001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    for n in range(1, TERMS + 1):
        for c, (mean, std) in enumerate(zip(MEAN.numpy(), STD.numpy(), strict=True)):
            values = function(mean + std * z) * special.eval_hermitenorm(n, z) * density
            # By quadrature, which misses the kinks of a hard swish; the others are closed forms.
            slack = {"hardswish": 2e-2, "silu": 1e-6}.get(name, 1e-9) * math.sqrt(math.factorial(n))
            assert found[n - 1, c] == pytest.approx(integrate.trapezoid(values, z), abs=slack)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_covariance_of_two_activations_is_that_of_samples(name):
    target, args, function = ACTIVATIONS[name]
    rng = np.random.default_rng(0)
    correlation = np.array(
        [[1, 0.8, -0.5, 0.2], [0.8, 1, -0.2, 0.5], [-0.5, -0.2, 1, 0.3], [0.2, 0.5, 0.3, 1]]
    )
    samples = rng.multivariate_normal(np.zeros(4), correlation, 1_000_000)
    expected = np.cov(function(MEAN.numpy() + STD.numpy() * samples), rowvar=False)
    series = hermite(target, args, MEAN, STD)
    var = activation_moments(target, args, MEAN, STD).var
    found = mehler(torch.from_numpy(correlation), series, var).numpy()
    deviations = np.sqrt(np.diag(expected))
    assert np.abs((found - expected) / np.outer(deviations, deviations)).max() < 0.02


def test_two_relus_of_mean_zero_have_the_arc_cosine_kernel():
    rho = torch.linspace(-0.95, 0.95, 20, dtype=torch.float64)
    zeros, ones = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    series = hermite(RELU, (), zeros, ones)
    var = activation_moments(RELU, (), zeros, ones).var
    for r in rho.tolist():
        found = mehler(torch.tensor([[1, r], [r, 1]], dtype=torch.float64), series, var)
        kernel = (math.sqrt(1 - r * r) + r * (math.pi - math.acos(r))) / (2 * math.pi)
        assert found[0, 1] == pytest.approx(kernel - 1 / (2 * math.pi), abs=1.5e-3)
        assert found[0, 0] == pytest.approx(0.5 - 1 / (2 * math.pi), abs=1e-12)


def test_equal_channels_have_covariance_and_variance_equal():
    mean, std = MEAN[[0, 0]], STD[[0, 0]]
    var = activation_moments(RELU, (), mean, std).var
    found = mehler(torch.ones(2, 2, dtype=torch.float64), hermite(RELU, (), mean, std), var)
    assert torch.allclose(found, var[0].expand(2, 2), rtol=1e-12)


def patch_covariance(var, size, factor):
    """Covariance of a size x size patch, channels first: factor^(distance) within a channel."""
    places = [(y, x) for y in range(size) for x in range(size)]
    near = [[factor ** (abs(a - c) + abs(b - d)) for c, d in places] for a, b in places]
    return torch.kron(torch.diag(var), torch.tensor(near, dtype=torch.float64))


@pytest.mark.parametrize(("model", "factor"), [("spatial", 0.6), ("variance", 0.0)])
def test_outputs_of_a_convolution_covary_as_its_patch_says(model, factor):
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, 3, 3, generator=rng).double()
    var = torch.rand(4, generator=rng).double() + 0.1
    products = kernel_products(weight, var, (1, 1))
    for lag in [(0, 0), (1, 0), (-1, 2), (2, -2)]:
        # Both outputs as rows over one 7 x 7 patch: the second one's kernel lies `lag` further.
        rows = torch.zeros(2, 5, 4, 7, 7, dtype=torch.float64)
        rows[0, :, :, 2:5, 2:5] = weight
        rows[1, :, :, 2 + lag[0] : 5 + lag[0], 2 + lag[1] : 5 + lag[1]] = weight
        first, second = rows.flatten(2)
        expected = first @ patch_covariance(var, 7, factor) @ second.T
        assert torch.allclose(output_covariance(products, lag, model), expected, atol=1e-10)


def test_covariance_goes_through_a_depthwise_convolution():
    rng = torch.Generator().manual_seed(0)
    dense = torch.randn(3, 2, 1, 1, generator=rng).double()
    depth = torch.randn(3, 3, 3, generator=rng).double()
    var = torch.tensor([0.5, 2.0]).double()
    products = kernel_products(dense, var, (1, 1))
    # A pointwise layer and a depthwise one are one convolution.
    whole = kernel_products(dense * depth[:, None], var, (1, 1))
    for lag in [(0, 0), (1, 0), (0, -1)]:
        found = depthwise_covariance(
            depth, lag, (2, 2), (1, 1), lambda at: output_covariance(products, at, "spatial")
        )
        expected = output_covariance(whole, (2 * lag[0], 2 * lag[1]), "spatial")
        assert torch.allclose(found, expected, atol=1e-12)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="no moments"):
        hermite(torch.ops.aten.cos.default, (), MEAN, STD)
