"""Restoration per group of a convolution, against dense layers that do the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from dfqc.compiler.channels import find_groups
from dfqc.compiler.passes._layers import dense_weight
from dfqc.compiler.passes._reads import split_reads
from dfqc.compiler.passes.curve import error_curve
from dfqc.compiler.passes.restore import Options, Restorer, restore

EXACT = {"ridge": 1e-9, "filter_ridge": 1e-9}
IMAGES = models.images(16)


class Bottleneck(nn.Module):
    """Dense, grouped, dense; batch norms and ReLU between."""

    def __init__(self, kernel=3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, kernel, padding=kernel // 2, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 5, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))


def make(kernel=3):
    torch.manual_seed(0)
    module = Bottleneck(kernel)
    models.randomize_norms(module)
    return module.eval()


def densify(module):
    """Return the same network without groups: zeros between them."""
    dense = copy.deepcopy(module)
    dense.conv2 = nn.Conv2d(8, 12, module.conv2.kernel_size, padding=module.conv2.padding)
    dense.conv2.bias = None
    dense.conv2.weight = nn.Parameter(dense_weight(module.conv2).clone(), requires_grad=False)
    return dense.eval()


def copy_channel(conv, norm, source, target):
    """Make a channel equal to another one."""
    with torch.no_grad():
        own = (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        for values in own:
            values[target] = values[source]


def run(graph):
    with torch.no_grad():
        return graph.module(IMAGES)


def group_of(graph, name):
    return next(group for group in find_groups(graph) if group.name == name)


def without(size, *gone):
    return torch.tensor([c for c in range(size) if c not in gone])


@pytest.mark.parametrize("method", ["merging", "weights", "moments", "patches"])
def test_copies_within_the_groups_are_restored_exactly(method):
    module = make()
    copy_channel(module.conv1, module.bn1, 0, 2)
    copy_channel(module.conv1, module.bn1, 7, 5)
    copy_channel(module.conv2, module.bn2, 1, 3)
    copy_channel(module.conv2, module.bn2, 8, 11)
    graph = models.trace_module(module)
    keep = {"conv1": without(8, 2, 5), "conv2": without(12, 3, 11)}
    restorer = Restorer(graph, keep, Options(method=method, **EXACT))
    restorer.run()
    assert restorer.not_restored() == []
    restored = restore(graph, keep, Options(method=method, **EXACT))
    assert restored.module.conv2.weight.shape == (10, 3, 3, 3)
    assert torch.allclose(run(restored), run(graph), atol=2e-4)


def test_a_copy_in_another_group_is_of_no_use_to_a_grouped_convolution():
    """The input has it, but the group that lost the channel does not read it."""
    module = make()
    copy_channel(module.conv1, module.bn1, 0, 6)
    graph, dense = models.trace_module(module), models.trace_module(densify(module))
    options = Options(method="patches", **EXACT)
    keep = {"conv1": without(8, 6, 1)}
    assert not torch.allclose(run(restore(graph, keep, options)), run(graph), atol=1e-2)
    found = run(restore(dense, {"conv1": without(8, 6)}, options))
    assert torch.allclose(found, run(graph), atol=2e-4)


@pytest.mark.parametrize("kernel", [1, 3])
def test_moments_of_a_part_are_a_block_of_those_of_the_whole(kernel):
    graph, dense = (models.trace_module(m) for m in (make(kernel), densify(make(kernel))))
    layers = [g.module.get_submodule("conv2") for g in (graph, dense)]
    found = []
    for one, layer in zip((graph, dense), layers, strict=True):
        group = group_of(one, "conv1")
        restorer = Restorer(one, {}, Options())
        reads = split_reads(layer, group, group.users[0])
        found.append(
            [
                restorer.patch_moments(
                    layer, group, group.users[0], r, torch.arange(len(r.channels))
                )
                for r in reads
            ]
        )
    (whole,), parts = found[1], found[0]
    assert len(parts) == 2
    for i, part in enumerate(parts):
        rows = torch.arange(4 * i, 4 * i + 4)
        torch.testing.assert_close(part.near, whole.block(rows, rows))


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_restored_group_is_least_squares_among_its_own(kernel):
    """Against the normal equations on the moments of the dense network."""
    module = make(kernel)
    graph, dense = models.trace_module(module), models.trace_module(densify(module))
    group = group_of(dense, "conv1")
    layer = dense.module.get_submodule("conv2")
    (read,) = split_reads(layer, group, group.users[0])
    whole = Restorer(dense, {}, Options()).patch_moments(
        layer, group, group.users[0], read, torch.arange(8)
    )
    keep = torch.tensor([0, 1, 3, 4, 6, 7])
    options = Options(ridge=1e-9, variance_fix=False, mean_fix=False)
    restored = restore(graph, {"conv1": keep}, options).module.conv2.weight.double()
    weight = module.conv2.weight.detach().double()
    for i in range(2):
        own, rows = torch.arange(4 * i, 4 * i + 4), slice(6 * i, 6 * i + 6)
        kept = keep[(keep // 4) == i]
        expected = torch.linalg.lstsq(
            whole.block(kept, kept), whole.block(kept, own) @ weight[rows].flatten(1).mT
        ).solution.mT
        torch.testing.assert_close(restored[rows].flatten(1), expected, rtol=1e-3, atol=1e-4)


def test_the_fixes_give_outputs_the_mean_that_they_had():
    """The mean of a grouped convolution's outputs, over images that fit the batch norms."""
    module = make()
    graph = models.trace_module(module)
    keep = {"conv1": without(8, 1, 4)}
    plain = restore(graph, keep, Options(method="none", mean_fix=False, variance_fix=False))
    fixed = restore(graph, keep, Options(method="none", variance_fix=False))
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(64, 8, 8, 8, generator=rng)
    bn1, kept = module.bn1, keep["conv1"]
    a = F.relu(bn1.bias.view(1, -1, 1, 1) + bn1.weight.view(1, -1, 1, 1) * z)
    with torch.no_grad():
        wanted = module.bn2(module.conv2(a)).mean((0, 2, 3))
        errors = []
        for one in (plain, fixed):
            m = one.module
            found = m.get_submodule("bn2")(m.get_submodule("conv2")(a[:, kept])).mean((0, 2, 3))
            errors.append(float((found - wanted).abs().max()))
    assert errors[1] < 0.1 * errors[0]


def test_the_curve_is_the_error_of_a_new_fit_per_group():
    module = make(kernel=1)
    graph = models.trace_module(module)
    group = group_of(graph, "conv1")
    order, errors = error_curve(graph, group, Options(ridge=1e-9))
    layer = graph.module.get_submodule("conv2")
    restorer = Restorer(graph, {}, Options())
    variance, weights, covariances = [], [], []
    for i, read in enumerate(split_reads(layer, group, group.users[0])):
        moments = restorer.patch_moments(layer, group, group.users[0], read, torch.arange(4))
        weights.append(module.conv2.weight.detach()[6 * i : 6 * i + 6, :, 0, 0].double())
        covariances.append(moments.near)
        variance.append(((weights[i] @ moments.near) * weights[i]).sum(1))
    gamma = module.bn2.weight.detach().double().square()
    for count in (2, 4, 6):
        gone = order[:count]
        assert torch.bincount(gone // 4, minlength=2).tolist() == [count // 2] * 2
        lost = []
        for i, (weight, full) in enumerate(zip(weights, covariances, strict=True)):
            out = gone[gone // 4 == i] - 4 * i
            kept = without(4, *out.tolist())
            inner = torch.linalg.solve(full[kept][:, kept], full[kept][:, out])
            rest = full[out][:, out] - full[out][:, kept] @ inner
            lost.append(((weight[:, out] @ rest) * weight[:, out]).sum(1) / variance[i])
        expected = float((gamma * torch.cat(lost)).sum() / gamma.sum())
        assert float(errors[count - 1]) == pytest.approx(expected, rel=1e-3)
