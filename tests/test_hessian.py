import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
import quantized
from dfqc.compiler.moments import Moments, folded_moments
from dfqc.compiler.quantize import _hessian
from dfqc.compiler.quantize._hessian import (
    count_patches,
    derive_moments,
    gather_patches,
    group_shape,
    measure_moments,
)

CONVS = {
    "plain": nn.Conv2d(4, 6, 3, bias=False),
    "padded": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "uneven": nn.Conv2d(4, 6, (3, 1), stride=(1, 3), padding=(2, 0), dilation=(2, 1)),
    "same": nn.Conv2d(4, 6, (3, 2), padding="same", dilation=(1, 2)),
    "grouped": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 4, 5, stride=2, padding=2, groups=4),
    "pointwise": nn.Conv2d(4, 6, 1, stride=2),
}
each_conv = pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)


def activations(count=6, seed=0, size=(11, 9)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, *size, generator=generator).relu() + 0.1


def unfolded(conv, x):
    """Every patch by `F.unfold`, (groups, positions, dim) float64."""
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    x = F.pad(x.double(), (left, right, top, bottom))
    patches = F.unfold(x, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
    patches = patches.transpose(1, 2).reshape(-1, conv.groups, patches.shape[1] // conv.groups)
    return patches.transpose(0, 1)


@each_conv
def test_patches_are_those_of_unfold_in_the_order_of_the_weights(conv):
    x = activations()
    expected = unfolded(conv, x)
    assert count_patches(conv, x) == expected.shape[1]
    assert group_shape(conv) == (expected.shape[0], expected.shape[2])
    found = gather_patches(x, conv, torch.arange(expected.shape[1]))
    np.testing.assert_array_equal(found, expected.float())
    rows = conv.weight.flatten(1).view(conv.groups, -1, found.shape[2])
    output = (found @ rows.mT).transpose(0, 1).flatten(1)
    bias = 0 if conv.bias is None else conv.bias
    np.testing.assert_allclose(
        (output + bias).detach(), conv(x).movedim(1, 3).flatten(0, 2).detach(), atol=1e-5
    )


@each_conv
@pytest.mark.parametrize("batch", [1, 4, 6])
def test_moments_are_those_of_all_patches_in_float64(conv, batch):
    x, q = activations(), activations() + 0.2 * activations(seed=1)
    found = measure_moments(conv, q.split(batch), x.split(batch), limit=10**6)
    wide, narrow = unfolded(conv, x), unfolded(conv, q)
    count = wide.shape[1]
    np.testing.assert_allclose(found.quantized, narrow.mT @ narrow / count, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.cross, wide.mT @ narrow / count, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.quantized_mean, narrow.mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.float_mean, wide.mean(1), rtol=1e-5)


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
def test_moments_of_a_linear_layer(shape):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*shape, generator=generator)
    found = measure_moments(nn.Linear(5, 2), [x], limit=100)
    flat = x.flatten(0, -2).double()
    np.testing.assert_allclose(found.quantized[0], flat.T @ flat / len(flat), rtol=1e-5)
    assert found.cross is None
    assert found.float_mean is None


def test_parts_of_patches_do_not_change_the_moments(monkeypatch):
    conv, x = CONVS["grouped"], [activations()]
    whole = measure_moments(conv, x, limit=10**6)
    monkeypatch.setattr(_hessian, "_GATHER_BYTES", 10_000)
    parts = measure_moments(conv, x, limit=10**6)
    np.testing.assert_allclose(parts.quantized, whole.quantized, rtol=1e-5)


@pytest.mark.parametrize("limit", [1, 50, 300, 593, 594, 10_000])
def test_the_limit_bounds_the_patches(limit, monkeypatch):
    seen = []
    original = gather_patches

    def spy(value, module, index):
        seen.append(len(index))
        return original(value, module, index)

    monkeypatch.setattr(_hessian, "gather_patches", spy)
    x = activations(6)  # 594 positions
    found = measure_moments(CONVS["padded"], [x], limit=limit)
    assert sum(seen) <= limit
    assert sum(seen) >= min(limit, 594) - 1
    if limit >= 300:
        full = measure_moments(CONVS["padded"], [x], limit=594)
        error = (found.quantized - full.quantized).norm() / full.quantized.norm()
        assert error < 0.15


def correlated_maps(count, mean, var, size, seed=0):
    """Normal maps (count, c, h, w): channels independent, neighbors correlated with 0.6."""
    rng = np.random.default_rng(seed)
    roots = []
    for length in size:
        distance = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
        roots.append(np.linalg.cholesky(0.6**distance))
    noise = rng.standard_normal((count, len(mean), *size))
    maps = roots[0] @ noise @ roots[1].T
    maps = maps * np.sqrt(var)[:, None, None] + np.asarray(mean)[:, None, None]
    return torch.from_numpy(maps.astype(np.float32))


@each_conv
def test_derived_moments_are_those_of_correlated_maps(conv):
    mean, var, size = np.array([0.5, -1.0, 0.0, 2.0]), np.array([1.0, 0.25, 4.0, 0.5]), (6, 5)
    sampled = measure_moments(
        conv, correlated_maps(20_000, mean, var, size).split(2000), limit=10**9
    )
    zeros = torch.zeros(1, 4, *size, dtype=torch.float64)
    maps = (zeros + torch.from_numpy(v)[:, None, None] for v in (mean, var))
    found = derive_moments(conv, Moments(*maps), limit=10**6)
    # Sampling: 20,000 independent maps give 1 / sqrt(20,000) of the largest variance.
    np.testing.assert_allclose(found.quantized, sampled.quantized, atol=0.12)
    np.testing.assert_allclose(found.quantized_mean, sampled.quantized_mean, atol=0.05)


def test_derived_moments_of_a_linear_layer_are_a_diagonal_and_the_mean():
    mean, var = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[0.5, 3.0]]).double()
    found = derive_moments(nn.Linear(2, 1), Moments(mean, var), limit=10)
    expected = [[1.5, -2.0], [-2.0, 7.0]]
    np.testing.assert_allclose(found.quantized[0], expected, rtol=1e-6)


def test_a_layer_behind_a_folded_norm_reads_what_the_norm_read():
    class Before(nn.Module):
        """A norm on a branch that joins: it can only go into the layer behind it."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.bn = nn.BatchNorm2d(4)
            self.inner = nn.Conv2d(4, 5, 1)
            self.head = models.Head(5)

        def forward(self, x):
            return self.head(self.inner(self.bn(torch.relu(self.conv(x)))))

    module = Before()
    models.randomize_norms(module)
    graph = models.trace_module(module)
    folded = quantized.fold(graph)
    found = folded_moments(graph, folded)["inner"]
    norm = graph.module.get_submodule("bn")
    np.testing.assert_allclose(found.mean[0, :, 0, 0], norm.running_mean, rtol=1e-6)
    np.testing.assert_allclose(found.var[0, :, 0, 0], norm.running_var, rtol=1e-6)
