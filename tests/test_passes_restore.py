"""Restoration against sampled activations; nets are one block, so that what is sampled is exact."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from dfqc.compiler.channels import find_groups
from dfqc.compiler.graph import batch_norms, count_params, verify
from dfqc.compiler.passes._reads import split_reads
from dfqc.compiler.passes.curve import error_curve, error_curves
from dfqc.compiler.passes.restore import Options, Restorer, restore

METHODS = ("none", "merging", "lbyl", "weights", "moments", "patches")
EXACT = {"ridge": 1e-9, "filter_ridge": 1e-9}


class Pair(nn.Module):
    """Two convolutions with batch norms, pointwise or 3 x 3, and an activation between."""

    def __init__(self, kernel=1, act=F.relu, depthwise=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, kernel, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False) if depthwise else None
        self.bn_deep = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, kernel, padding=kernel // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.act = act

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        if self.deep is not None:
            x = self.act(self.bn_deep(self.deep(x)))
        return self.bn2(self.conv2(x))


def make_pair(seed=0, **options):
    torch.manual_seed(seed)
    module = Pair(**options)
    models.randomize_norms(module)
    return module.eval()


def set_statistics(module, images):
    """Give the batch norms the statistics of these images."""
    module.train()
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum, norm.running_mean, norm.running_var = (
            None, torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var),
        )  # fmt: skip
        norm.num_batches_tracked.zero_()
    with torch.no_grad():
        module(images)
    return module.eval()


def copy_channel(module, source, target, factor=1.0):
    """Make channel `target` behind the activation `factor` times channel `source`."""
    with torch.no_grad():
        for values in (module.conv1.weight, module.bn1.running_mean, module.bn1.running_var):
            values[target] = values[source]
        module.bn1.weight[target] = factor * module.bn1.weight[source]
        module.bn1.bias[target] = factor * module.bn1.bias[source]
        if module.deep is not None:
            module.deep.weight[target] = module.deep.weight[source]
            for name in ("weight", "bias", "running_mean", "running_var"):
                values = getattr(module.bn_deep, name)
                values[target] = values[source]


def keep_all_but(graph, *gone):
    group = next(g for g in find_groups(graph) if g.name == "conv1")
    return {group.name: torch.tensor([c for c in range(group.size) if c not in gone])}


def outputs(graph, images):
    with torch.no_grad():
        return graph.module(images)


IMAGES = models.images(16)


@pytest.mark.parametrize(
    ("method", "kernel"),
    [("weights", 3), ("moments", 1), ("moments", 3), ("patches", 1), ("patches", 3)],
)
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_a_multiple_of_another_channel_is_restored_exactly(method, kernel, factor):
    module = make_pair(kernel=kernel)
    copy_channel(module, 1, 4, factor)
    graph = models.trace_module(module)
    restored = restore(graph, keep_all_but(graph, 4), Options(method=method, **EXACT))
    assert count_params(restored) < count_params(graph)
    assert torch.allclose(outputs(restored, IMAGES), outputs(graph, IMAGES), atol=2e-4)


@pytest.mark.parametrize("act", [F.relu, F.relu6])
@pytest.mark.parametrize("method", ["moments", "patches"])
def test_a_copy_is_restored_exactly_behind_a_depthwise_layer(method, act):
    module = make_pair(depthwise=True, act=act)
    copy_channel(module, 1, 4)
    graph = models.trace_module(module)
    restored = restore(graph, keep_all_but(graph, 4), Options(method=method, **EXACT))
    assert torch.allclose(outputs(restored, IMAGES), outputs(graph, IMAGES), atol=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_whole_stays_as_it_is(method):
    graph = models.trace_module(make_pair(kernel=3))
    restored = restore(graph, keep_all_but(graph), Options(method=method))
    assert torch.equal(outputs(restored, IMAGES), outputs(graph, IMAGES))


def test_plain_pruning_drops_the_channels():
    module = make_pair(kernel=3)
    graph = models.trace_module(module)
    options = Options(method="none", mean_fix=False, variance_fix=False)
    found = outputs(restore(graph, keep_all_but(graph, 0, 5), options), IMAGES)
    with torch.no_grad():
        module.conv2.weight[:, [0, 5]] = 0
        assert torch.allclose(found, module(IMAGES), atol=1e-5)


def sampled_pair(seed=0):
    """A pointwise pair with the statistics of images as the input model has them."""
    images = models.images(400, seed=1)  # every value standard normal
    graph_image = models.IMAGE
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (graph_image.mean, graph_image.std))
    images = (0.45 - mean) / std + 0.225 / std * images
    return set_statistics(make_pair(seed), images), images


def test_factors_are_the_least_squares_solution_of_samples():
    module, images = sampled_pair()
    graph = models.trace_module(module)
    keep = keep_all_but(graph, 2, 3)
    restored = restore(graph, keep, Options(method="moments", ridge=1e-9))
    with torch.no_grad():
        features = F.relu(module.bn1(module.conv1(images))).movedim(1, 0).flatten(1).double()
    centered = features - features.mean(1, keepdim=True)
    kept, gone = centered[keep["conv1"]], centered[[2, 3]]
    factors = torch.linalg.lstsq(kept.T, gone.T).solution
    weight = module.conv2.weight.detach()[:, :, 0, 0].double()
    expected = weight[:, keep["conv1"]] + weight[:, [2, 3]] @ factors.T
    found = restored.module.get_submodule("conv2").weight[:, :, 0, 0].double()
    assert (found - expected).abs().max() < 0.03 * weight.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_mean_and_variance_of_outputs_are_put_back(method):
    module, images = sampled_pair()
    graph = models.trace_module(module)
    keep = keep_all_but(graph, 0)
    exact = outputs(graph, images)

    def error(options):
        found = outputs(restore(graph, keep, options), images)
        means = (found.mean((0, 2, 3)) - exact.mean((0, 2, 3))).abs().max()
        ratios = found.var((0, 2, 3)) / exact.var((0, 2, 3))
        return float(means), float(ratios.log().abs().max())

    raw = error(Options(method=method, mean_fix=False, variance_fix=False))
    mean_only = error(Options(method=method, variance_fix=False))
    both = error(Options(method=method))
    assert raw[0] > 0.1
    assert mean_only[0] < 0.02
    assert both[0] < 0.02
    assert mean_only[1] > 0.05
    assert both[1] < 0.04


def test_the_mean_at_zero_padding_counts():
    module = make_pair(kernel=3)
    graph = models.trace_module(module)
    options = Options(method="none", variance_fix=False)
    restored = restore(graph, keep_all_but(graph, 0), options)
    norms = [{n.path: n.module for n in batch_norms(g)}["bn2"] for g in (graph, restored)]
    moved = norms[0].running_mean - norms[1].running_mean
    beta, gamma = module.bn1.bias[0].double(), module.bn1.weight[0].double().abs()
    t = beta / gamma
    mean = beta * torch.special.ndtr(t) + gamma * torch.exp(-t * t / 2) / (2 * torch.pi) ** 0.5
    inside = F.conv2d(torch.ones(1, 1, 16, 16), module.conv2.weight[:, :1], padding=1)
    assert torch.allclose(moved, (mean * inside.mean((0, 2, 3))).float(), atol=1e-5)


@pytest.mark.parametrize("net", ["plain", "residual", "depthwise", "no_norm", "squeeze_excite"])
@pytest.mark.parametrize("method", METHODS)
def test_every_structure_becomes_smaller(net, method):
    graph = models.trace_tiny(net)
    groups = [g for g in find_groups(graph) if g.prunable]
    assert groups
    keep = {g.name: torch.arange(1, g.size) for g in groups}
    restored = restore(graph, keep, Options(method=method))
    verify(restored, "test")
    assert count_params(restored) < count_params(graph)
    assert outputs(restored, IMAGES).isfinite().all()


def test_the_form_for_large_users_is_near_the_exact_one():
    graph = models.trace_module(make_pair(kernel=3))
    keep = keep_all_but(graph, 2)
    few, many = (
        restore(graph, keep, Options(method="moments", largest=n)).module for n in (10, 5000)
    )
    assert torch.equal(few.get_submodule("conv2").weight, many.get_submodule("conv2").weight)
    ratio = few.get_submodule("bn2").running_var / many.get_submodule("bn2").running_var
    assert (ratio.log().abs() < 0.2).all()


class Dense(nn.Module):
    """Two branches side by side, which one layer reads; then a flattened map and a classifier."""

    def __init__(self):
        super().__init__()
        self.left, self.right = models.conv_bn(3, 4), models.conv_bn(3, 6)
        self.join = models.conv_bn(10, 8, stride=4)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.head(F.relu(self.join(x)).flatten(1))


@pytest.mark.parametrize("method", ["moments", "patches"])
def test_copies_are_restored_through_concat_and_flatten(method):
    torch.manual_seed(0)
    module = Dense()
    models.randomize_norms(module)
    keep = {"left.0": [0, 1, 2], "right.0": [0, 1, 3, 4, 5], "join.0": [0, 2, 3, 4, 5, 6, 7]}
    with torch.no_grad():
        for branch, source, target in [("left", 0, 3), ("right", 5, 2), ("join", 4, 1)]:
            conv, norm = getattr(module, branch)
            for values in (
                conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var
            ):  # fmt: skip
                values[target] = values[source]
    graph = models.trace_module(module)
    kept = {name: torch.tensor(channels) for name, channels in keep.items()}
    restored = restore(graph, kept, Options(method=method, ridge=1e-9))
    assert restored.module.get_submodule("join.0").weight.shape[:2] == (7, 8)
    assert restored.module.get_submodule("head").weight.shape == (5, 7 * 16)
    assert torch.allclose(outputs(restored, IMAGES), outputs(graph, IMAGES), atol=1e-3)


# --- the curve


@pytest.mark.parametrize("kernel", [1, 3])
def test_copies_go_first_and_errors_grow(kernel):
    module = make_pair(kernel=kernel)
    copy_channel(module, 1, 4)
    graph = models.trace_module(module)
    group = next(g for g in find_groups(graph) if g.name == "conv1")
    order, errors = error_curve(graph, group, Options(ridge=1e-7))
    assert order[0] in (1, 4)
    assert errors[0] < 1e-4 * errors[-1]
    assert (errors.diff() >= 0).all()
    assert sorted(order.tolist()) == sorted(set(order.tolist()))
    assert len(order) == len(errors) == group.size
    curves = error_curves(graph, [group], Options(ridge=1e-7))
    assert torch.allclose(curves["conv1"].scores[order], errors)


def test_the_curve_is_the_error_of_a_new_fit():
    """Downdating must give what least squares from scratch gives, for one user without norm."""
    module = make_pair(kernel=1)
    graph = models.trace_module(module)
    group = next(g for g in find_groups(graph) if g.name == "conv1")
    order, errors = error_curve(graph, group, Options(ridge=1e-9))
    conv2 = graph.module.get_submodule("conv2")
    (read,) = split_reads(conv2, group, group.users[0])
    moments = Restorer(graph, {}, Options()).patch_moments(
        conv2, group, group.users[0], read, torch.arange(6)
    )
    full = moments.near
    weight = module.conv2.weight.detach()[:, :, 0, 0].double()
    variance = ((weight @ full) * weight).sum(1)
    gamma = module.bn2.weight.detach().double().square()
    for count in range(1, 6):
        gone, kept = (
            order[:count],
            torch.tensor(sorted(set(range(6)) - set(order[:count].tolist()))),
        )
        rest = full[gone][:, gone] - full[gone][:, kept] @ torch.linalg.solve(
            full[kept][:, kept], full[kept][:, gone]
        )
        lost = ((weight[:, gone] @ rest) * weight[:, gone]).sum(1)
        expected = float((gamma * lost / variance).sum() / gamma.sum())
        assert float(errors[count - 1]) == pytest.approx(expected, rel=1e-3)


def test_layers_that_are_not_restored_are_known():
    graph = models.trace_tiny("residual")
    keep = {
        group.name: torch.arange(group.size - 2)
        for group in find_groups(graph)
        if group.prunable and group.residual
    }
    restorer = Restorer(graph, keep, Options())
    restorer.run()
    assert restorer.not_restored() == [
        "head.fc", "layer1.conv1", "layer2.conv1", "layer2.downsample.0"
    ]  # fmt: skip
    alone = Restorer(graph, {"layer1.conv1": torch.arange(6)}, Options())
    alone.run()
    assert alone.not_restored() == []
