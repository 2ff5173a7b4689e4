"""The joint closed form: what it decides, against what it is made of; then on a real network."""

import dataclasses

import pytest
import torch

import models
from command import asset_flags
from dfqc.compiler import plugins
from dfqc.compiler.affine import dequantize_weight
from dfqc.compiler.channels import find_groups, remove
from dfqc.compiler.contracts import CalibSet, Pruned, QuantizerSupplies
from dfqc.compiler.dataset import open_dataset
from dfqc.compiler.errors import UsageError
from dfqc.compiler.frontend import trace
from dfqc.compiler.loading import ImageOverrides, load_model
from dfqc.compiler.passes import bias
from dfqc.compiler.passes.bias import analytic_biases
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.passes.restore import Options as RestoreOptions
from dfqc.compiler.passes.restore import restore
from dfqc.compiler.plan import make_plan
from dfqc.compiler.quantize import rtn, udfc
from dfqc.compiler.simulate import simulated
from dfqc.compiler.spec import Bits

CPU = torch.device("cpu")
PLAIN = {"mean_fix": False, "variance_fix": False}
each_net = pytest.mark.parametrize("net", ["plain", "residual", "depthwise", "concat", "no_norm"])


def plan_of(graph, bits):
    return make_plan(graph, plugins.load("target", "ort").TARGET, bits, [], ends=None)


def run(graph, supplies, bits, module=udfc, **options):
    calib = CalibSet(models.images(4, graph.image), None, "noise")
    return module.quantize(
        graph, calib, plan_of(graph, bits), module.Options(**options),
        rng=torch.Generator(), device=CPU, supplies=supplies,
    )  # fmt: skip


def prune(graph, share=0.25):
    """Keep the largest filters of every group that one layer makes."""
    keep = {}
    for group in find_groups(graph):
        if group.prunable and not group.residual and len(group.producers) == 1:
            weight = graph.module.get_submodule(group.producers[0]).weight
            sizes = weight.detach().flatten(1).norm(dim=1)
            count = max(1, group.size - round(share * group.size))
            keep[group.name] = sizes.argsort(descending=True)[:count].sort().values
    return keep


def top1(graph, batches):
    with torch.inference_mode():
        hits = [(graph.module(x).argmax(1) == y).float().mean() for x, y in batches]
    return 100 * float(torch.stack(hits).mean())


@each_net
def test_without_any_part_it_is_rounding_to_nearest(net):
    graph = models.trace_tiny(net)
    folded = fold(graph)
    found = run(folded, QuantizerSupplies(unfolded=graph), Bits(4, 32), **PLAIN)
    expected = run(folded, QuantizerSupplies(), Bits(4, 32), rtn)
    assert found.info["rounded_last"] == []
    for name, weight in expected.weights.items():
        axis = found.plan.layers[name].weight.axis
        assert torch.equal(found.weights[name].codes, weight.codes)
        assert torch.allclose(found.weights[name].scale, weight.scale, rtol=1e-5)
        exact = dequantize_weight(weight, axis)
        assert torch.allclose(dequantize_weight(found.weights[name], axis), exact, atol=1e-5)
    for name, value in expected.biases.items():
        assert torch.allclose(found.biases[name], value, atol=1e-5)


@each_net
def test_at_eight_bits_it_is_the_restored_network(net):
    graph = models.trace_tiny(net)
    keep = prune(graph)
    cut = fold(remove(graph, keep))
    state = run(cut, QuantizerSupplies(unpruned=Pruned(graph, keep)), Bits(8, 32))
    images = models.images(8)
    with torch.inference_mode():
        wanted = restore(graph, keep, RestoreOptions()).module(images)
        found = simulated(cut, state, integer=False).module(images)
        plain = cut.module(images)
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    if keep:
        assert (plain - wanted).norm() > 2 * (found - wanted).norm()


@pytest.mark.parametrize("compensate", ["none", "scales", "users"])
@pytest.mark.parametrize("rounding", ["nearest", "squant"])
def test_every_part_keeps_to_the_plan(compensate, rounding):
    graph = models.trace_tiny("depthwise")
    keep = prune(graph)
    assert keep
    cut = fold(remove(graph, keep))
    supplies = QuantizerSupplies(unpruned=Pruned(graph, keep))
    state = run(cut, supplies, Bits(3, 8), compensate=compensate, rounding=rounding)
    for layer in state.plan.layers.values():
        weight = state.weights[layer.name]
        assert weight.codes.shape == cut.module.get_submodule(layer.name).weight.shape
        assert weight.codes.min() >= layer.weight.quant_min
        assert weight.codes.max() <= layer.weight.quant_max
        assert (weight.scale > 0).all()
    with torch.inference_mode():
        assert simulated(cut, state, integer=False).module(models.images()).isfinite().all()


@pytest.mark.parametrize("method", ["none", "merging", "lbyl", "weights"])
def test_a_fit_to_rounded_channels_that_would_change_nothing_is_refused(method):
    said = f"compensate=users with method {method}.*--restore patches or moments"
    with pytest.raises(UsageError, match=said):
        udfc.Options(method=method, compensate="users")
    assert udfc.Options(method=method, compensate="scales").compensate == "scales"


@pytest.mark.parametrize("method", ["moments", "patches"])
def test_a_fit_to_rounded_channels_changes_codes(method):
    graph = models.trace_tiny("depthwise")
    supplies = QuantizerSupplies(unfolded=graph)
    alone, fitted = (
        run(fold(graph), supplies, Bits(4, 32), method=method, compensate=way).weights
        for way in ("none", "users")
    )
    assert any(not torch.equal(alone[name].codes, fitted[name].codes) for name in alone)


@pytest.mark.parametrize("fix", [True, False])
def test_bias_correction_is_told_that_means_were_put_back(fix):
    graph = models.trace_tiny("plain")
    folded, calib = fold(graph), CalibSet(models.images(4, graph.image), None, "noise")
    state = run(folded, QuantizerSupplies(unfolded=graph), Bits(4, 8), mean_fix=fix)
    done = bias.correct(folded, graph, state, calib, bias.Options(), device=CPU)
    tried = set(done.info["bias_correction"]["distance"])
    assert tried == ({"none", "empirical"} if fix else set(bias.METHODS))


def test_mean_of_rounded_outputs_is_put_back():
    """One layer on the images that the moments suppose: the mean error of rounding goes."""
    graph = models.trace_tiny("plain")
    folded = fold(graph)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (graph.image.mean, graph.image.std))
    images = (0.45 - mean) / std + 0.225 / std * models.images(256)
    errors = {}
    for fix in (False, True):
        state = run(
            folded, QuantizerSupplies(unfolded=graph), Bits(2, 32),
            mean_fix=fix, variance_fix=False,
        )  # fmt: skip
        conv = folded.module.get_submodule("stem.0")
        weight = dequantize_weight(state.weights["stem.0"], 0)
        with torch.inference_mode():
            exact = conv(images).mean((0, 2, 3))
            rounded = torch.nn.functional.conv2d(images, weight, state.biases["stem.0"], padding=1)
        errors[fix] = float((rounded.mean((0, 2, 3)) - exact).abs().max())
    assert errors[True] < 0.1 * errors[False]


def test_layers_in_float_are_left_alone():
    graph = models.trace_tiny("residual")
    folded = fold(graph)
    state = run(folded, QuantizerSupplies(unfolded=graph), Bits(32, 32))
    assert state.weights == {}
    assert state.biases == {}


def test_an_original_that_does_not_belong_to_the_graph_is_refused():
    graph = models.trace_tiny("residual")
    keep = prune(graph)
    assert keep
    with pytest.raises(UsageError, match=r"layer.*without its pruned channels"):
        run(fold(graph), QuantizerSupplies(unpruned=Pruned(graph, keep)), Bits(4, 32))


def test_on_a_real_network_pruning_and_rounding_cost_little(assets):
    """ResNet-20 at 30 % and W6, 500 images; every figure is deterministic."""
    flags = dict(zip(asset_flags(assets, "resnet20_cifar10")[1::2],
                     asset_flags(assets, "resnet20_cifar10")[2::2], strict=True))  # fmt: skip
    weights = asset_flags(assets, "resnet20_cifar10")[0]
    mean, std = (tuple(map(float, flags[k].split(","))) for k in ("--mean", "--std"))
    image = ImageOverrides((3, 32, 32), mean, std, 32)
    graph = trace(load_model(str(weights), arch=flags["--arch"], image=image))
    data = open_dataset(assets / "data" / "cifar10" / "cifar10_test.npz", graph.image)
    batches = [(torch.from_numpy(x), torch.from_numpy(y))
               for x, y in data.subset(range(500)).batches(250)]  # fmt: skip
    exact = top1(graph, batches)

    keep = prune(graph, 0.3)
    cut = fold(remove(graph, keep))
    supplies = QuantizerSupplies(unpruned=Pruned(graph, keep))
    plain = run(cut, QuantizerSupplies(), Bits(6, 32), rtn)
    joint = run(cut, supplies, Bits(6, 32))
    found = {
        name: top1(simulated(cut, state, integer=False), batches)
        for name, state in (("plain", plain), ("joint", joint))
    }
    for method in ("merging", "lbyl"):
        other = restore(graph, keep, RestoreOptions(method=method, **PLAIN))
        found[method] = top1(other, batches)
    assert max(found, key=found.get) == "joint", found
    assert exact - found["joint"] < 11, found
    assert found["joint"] > found["plain"] + 10, found

    whole = fold(graph)
    rounded = run(whole, QuantizerSupplies(unfolded=graph), Bits(6, 32))
    assert exact - top1(simulated(whole, rounded, integer=False), batches) <= 0.4


def test_an_analytic_correction_starts_from_the_restored_biases():
    graph = models.trace_tiny("residual")
    folded = fold(graph)
    state = run(folded, QuantizerSupplies(unfolded=graph), Bits(4, 32))
    found, _ = analytic_biases(folded, graph, state)
    plain, _ = analytic_biases(folded, graph, dataclasses.replace(state, info={}))
    own = {name: folded.module.get_submodule(name).bias for name in found}
    assert max((state.biases[n] - own[n]).abs().max() for n in found) > 1e-3
    for name, value in found.items():
        torch.testing.assert_close(value - plain[name], state.biases[name] - own[name])


def test_options_of_the_ranges_are_those_of_rounding_to_nearest():
    options = udfc.Options(acts="percentile", percentile=99.0, batch_size=3)
    assert options.ranges() == rtn.Options(acts="percentile", percentile=99.0, batch_size=3)
    assert dataclasses.is_dataclass(Pruned)
