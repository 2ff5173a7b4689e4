import numpy as np
import pytest
import torch
from torch.nn import functional as F

import models
from dfqc.compiler.channels import find_groups
from dfqc.compiler.passes._criteria import eliminate, gather_context, rank_channels
from dfqc.compiler.passes.fold import fold
from functions import Function
from pruning import IMAGE, chain

CRITERIA = ("l1", "l2", "bn", "output", "restored")


def rank(graph, name, criterion, **options):
    group = next(group for group in find_groups(graph) if group.name == name)
    return rank_channels(graph, group, gather_context(graph), criterion, **options)


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_norms_of_filters(criterion, power):
    graph = models.trace_tiny("plain")
    weight = graph.module.get_submodule("stem.0").weight.double().numpy()
    expected = (np.abs(weight) ** power).sum((1, 2, 3)) ** (1 / power)
    curve = rank(graph, "stem.0", criterion)
    np.testing.assert_allclose(curve.scores.numpy(), expected, rtol=1e-12)
    np.testing.assert_array_equal(curve.order.numpy(), expected.argsort())


def test_batch_norm_scale_is_that_of_the_folded_filter():
    graph = models.trace_tiny("residual")
    folded = fold(graph)
    weight = folded.module.get_submodule("layer1.conv1").weight.double()
    scores = rank(graph, "layer1.conv1", "bn").scores
    torch.testing.assert_close(scores, weight.flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    assert torch.equal(rank(folded, "layer1.conv1", "bn").order, scores.argsort())
    assert not torch.equal(scores.argsort(), rank(graph, "layer1.conv1", "l2").order)


def test_several_producers_count_together():
    graph = models.trace_tiny("residual")
    paths = ("conv1", "layer1.conv2")
    norms = [graph.module.get_submodule(p).weight.double().flatten(1).norm(dim=1) for p in paths]
    torch.testing.assert_close(rank(graph, "conv1", "l2").scores, norms[0] + norms[1])


def test_output_energy_is_that_of_the_readers_input():
    """Against sampling: activations with the moments that the batch norm states."""
    graph = chain(6)
    norm, reader, after = (graph.module.get_submodule(p) for p in ("a.1", "b.0", "b.1"))
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 6, generator=rng, dtype=torch.double)
    a = F.relu(norm.bias + norm.weight.abs() * z)  # (samples, channels), the same at every tap
    scale = (after.weight / (after.running_var + after.eps).sqrt()).double()
    taps = reader.weight.double() * scale.view(-1, 1, 1, 1)
    mean, var = a.mean(0), a.var(0)
    energy = taps.square().sum((0, 2, 3)) * var + taps.sum((2, 3)).square().sum(0) * mean**2
    curve = rank(graph, "a.0", "output")
    torch.testing.assert_close(curve.scores, energy / energy.sum(), rtol=0.05, atol=1e-3)
    torch.testing.assert_close(curve.error, curve.scores[curve.order].cumsum(0))


def test_errors_in_a_branch_count_as_its_part_of_the_sum():
    graph = models.trace_tiny("residual")
    norms = {path: graph.module.get_submodule(path) for path in ("bn1", "layer1.bn2")}
    sampled = torch.randn(
        200_000, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0)
    )
    stream = F.relu(norms["bn1"].bias + norms["bn1"].weight.abs() * sampled).var(0).mean()
    branch = norms["layer1.bn2"].weight.double().square().mean()
    error = rank(graph, "layer1.conv1", "output").error
    assert float(error[-1]) == pytest.approx(float(branch / (branch + stream)), rel=0.02)


def test_errors_in_a_concatenation_count_as_its_part_of_the_reader():
    def forward(m, x):
        x = torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1)
        return m.fc(F.relu(m.last(x)).mean((2, 3)))

    modules = {
        "a": models.conv_bn(3, 4),
        "b": models.conv_bn(3, 4),
        "last": models.conv_bn(8, 6),
        "fc": torch.nn.Linear(6, 3),
    }
    module = Function(forward, **modules)
    models.randomize_norms(module)
    graph = models.trace_module(module, IMAGE)
    ends = [float(rank(graph, name, "output").error[-1]) for name in ("a.0", "b.0")]
    assert sum(ends) == pytest.approx(1)
    assert min(ends) > 0.05


def test_a_channel_that_nobody_reads_goes_first():
    graph = chain()
    graph.module.get_submodule("b.0").weight.data[:, 5] = 0
    for criterion in ("output", "restored"):
        curve = rank(graph, "a.0", criterion)
        assert int(curve.order[0]) == 5
        assert float(curve.error[0]) == pytest.approx(0, abs=1e-12)


def restored_error(gram, weight, ridge, kept):
    """Return the weighted ridge residuals of the rows that are not kept, each solved for."""
    gram, weight = gram.numpy(), weight.numpy()
    level = gram.diagonal().mean() * ridge
    total = 0.0
    for j in set(range(len(gram))) - set(kept):
        inner = gram[np.ix_(kept, kept)] + level * np.eye(len(kept))
        total += weight[j] * (gram[j, j] - gram[j, kept] @ np.linalg.solve(inner, gram[kept, j]))
    return total


def test_elimination_is_greedy_and_exact():
    rng = torch.Generator().manual_seed(1)
    rows = torch.randn(9, 5, generator=rng, dtype=torch.double)  # dependent: five dimensions
    weight = torch.rand(9, generator=rng, dtype=torch.double) + 0.1
    gram, ridge = rows @ rows.T, 0.03
    order, errors = eliminate(gram, weight, ridge)
    assert sorted(order.tolist()) == list(range(9))
    kept = list(range(9))
    for gone, error in zip(order.tolist(), errors.tolist(), strict=True):
        tried = {j: restored_error(gram, weight, ridge, [k for k in kept if k != j]) for j in kept}
        assert gone == min(tried, key=tried.get)
        assert error == pytest.approx(tried[gone], rel=1e-9)
        kept.remove(gone)
    total = float((weight * gram.diagonal()).sum())
    assert errors[-1] == pytest.approx(total)
    # Five rows hold what nine do; one at a time, without restoring, four would cost much more.
    assert errors[3] < 0.2 * float((weight * gram.diagonal()).sort().values[:4].sum())


def test_wide_groups_lose_several_channels_in_one_step():
    rng = torch.Generator().manual_seed(2)
    rows = torch.randn(1030, 40, generator=rng, dtype=torch.double)
    gram, weight = rows @ rows.T, torch.rand(1030, generator=rng, dtype=torch.double)
    order, errors = eliminate(gram, weight, 0.01)
    assert sorted(order.tolist()) == list(range(1030))
    assert (errors.diff() >= 0).all()
    kept = sorted(order[900:].tolist())
    assert float(errors[899]) == pytest.approx(restored_error(gram, weight, 0.01, kept), rel=1e-6)


def test_a_copy_of_another_channel_costs_nothing_to_remove():
    graph = chain()
    layer, norm = graph.module.get_submodule("a.0"), graph.module.get_submodule("a.1")
    layer.weight.data[3] = layer.weight.data[11]
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        values.data[3] = values.data[11]
    curve = rank(graph, "a.0", "restored", ridge=1e-6)
    assert int(curve.order[0]) in (3, 11)
    assert float(curve.error[0]) < 1e-5
    assert float(rank(graph, "a.0", "output").error[0]) > 1e-3


def test_depthwise_filters_count_by_their_products():
    """Composed: expand 1x1, depthwise 3x3 is one 3x3 convolution per channel."""
    graph = models.trace_tiny("depthwise")
    folded = fold(graph)
    expand = folded.module.get_submodule("expand.0").weight.double().flatten(1)
    depthwise = folded.module.get_submodule("depthwise.0").weight.double().flatten(1)
    rows = torch.einsum("ci,ck->cik", expand, depthwise).flatten(1)
    scores = rank(graph, "expand.0", "bn").scores
    torch.testing.assert_close(scores, rows.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", sorted({*models.TINY} - {"concat", "attention"}))
def test_curves_of_every_structure(name, criterion):
    for graph in (models.trace_tiny(name), fold(models.trace_tiny(name))):
        context = gather_context(graph)
        for group in find_groups(graph):
            if not group.prunable:
                continue
            curve = rank_channels(graph, group, context, criterion)
            assert sorted(curve.order.tolist()) == list(range(group.size))
            assert (curve.error.diff() >= -1e-12).all()
            # With all channels gone, all is lost, whatever the order.
            assert 0 < float(curve.error[-1]) <= len(group.users) + 1e-9
            all_gone = rank_channels(graph, group, context, "output").error[-1]
            assert float(curve.error[-1]) == pytest.approx(float(all_gone), rel=1e-6)
            owner = curve.order // (group.size // group.slices)
            for i in range(group.slices):
                assert (curve.scores[curve.order[owner == i]].diff() >= 0).all()
