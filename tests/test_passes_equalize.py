import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
import numerics
from dfqc.compiler.graph import Graph, copy_graph, verify
from dfqc.compiler.moments import expected_inputs
from dfqc.compiler.operators import RELU
from dfqc.compiler.passes._pairs import find_pairs
from dfqc.compiler.passes.equalize import METHODS, Options, equalize
from dfqc.compiler.passes.fold import fold

IMAGES = models.images(6, seed=3)
EXACT = Options()


class Chain(nn.Module):
    """A convolution with batch norm, operators between, and a layer that reads them."""

    def __init__(self, between, second=None, *, norm=True, groups=1):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.between = between
        self.second = second or nn.Conv2d(8, 8, 3, padding=1, groups=groups)

    def forward(self, x):
        return self.second(self.between(self.norm(self.first(x)))).flatten(1)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def make(module, seed=0) -> Graph:
    """Trace a module whose channels differ by orders of magnitude."""
    torch.manual_seed(seed)
    models.randomize_norms(module)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                spread = torch.logspace(-2, 1, layer.num_features)
                layer.weight.mul_(spread)
                layer.bias.mul_(spread)
            elif isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
                layer.bias.add_(0.3)
                rows = layer.weight.shape[0]
                layer.weight.mul_(
                    torch.logspace(1, -1, rows).view(-1, *[1] * (layer.weight.dim() - 1))
                )
    return models.trace_module(module)


def infer(graph, images=IMAGES):
    """Run in float64."""
    with torch.no_grad():
        return copy_graph(graph).module.double()(images.double()).numpy()


def outputs(graph, options=EXACT):
    """Return what the graph and its equalized form compute, both in float64."""
    result = equalize(graph, options)
    verify(result, "equalize")
    assert [n.name for n in result.module.graph.nodes] == [n.name for n in graph.module.graph.nodes]
    return infer(graph), infer(result), result


def output_ranges(graph, name):
    """Largest magnitude per output channel of a folded convolution, by numpy."""
    weight = graph.module.get_submodule(name).weight.detach().numpy().astype(np.float64)
    return np.abs(weight).reshape(len(weight), -1).max(1)


def input_ranges(graph, name):
    """Largest magnitude per input channel, by a loop over groups."""
    layer = graph.module.get_submodule(name)
    weight, groups = layer.weight.detach().numpy().astype(np.float64), getattr(layer, "groups", 1)
    rows, per_group = len(weight) // groups, weight.shape[1]
    found = []
    for group in range(groups):
        block = np.abs(weight[group * rows : (group + 1) * rows])
        found += [block[:, i].max() for i in range(per_group)]
    return np.array(found)


COMMUTING = {
    "relu": lambda: nn.ReLU(),
    "leaky": lambda: nn.LeakyReLU(0.1),
    "nothing": lambda: nn.Identity(),
    "max_pool": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),
    "avg_pool": lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.ReLU()),
    "pad": lambda: nn.Sequential(nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1))),
    "reflect": lambda: nn.Sequential(nn.LeakyReLU(0.2), nn.ReflectionPad2d(1)),
}


@pytest.mark.parametrize(("norm", "groups"), [(True, 1), (True, 8), (False, 2)])
@pytest.mark.parametrize("between", COMMUTING)
def test_a_pair_is_balanced_and_computes_the_same(between, norm, groups):
    graph = make(Chain(COMMUTING[between](), norm=norm, groups=groups))
    before, after, result = outputs(graph)
    numerics.assert_sqnr(after, before, 120)
    folded = fold(result)
    first, second = output_ranges(folded, "first"), input_ranges(folded, "second")
    np.testing.assert_allclose(first, second, rtol=1e-4)
    # Their product is what it was: equation 11 gives its square root to both.
    plain = fold(graph)
    product = output_ranges(plain, "first") * input_ranges(plain, "second")
    np.testing.assert_allclose(first, np.sqrt(product), rtol=1e-4)
    spread = output_ranges(plain, "first") / input_ranges(plain, "second")
    assert spread.max() / spread.min() > 5, "there was nothing to balance"


HEADS = {
    "mean": (lambda x: F.relu(x).mean((2, 3)), 8),
    "pooled": (lambda x: F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1), 8),
    "flattened": (lambda x: F.max_pool2d(F.relu(x), 4).flatten(1), 8 * 16),
    "viewed": (lambda x: F.relu(F.avg_pool2d(x, 8)).reshape(x.shape[0], -1), 8 * 4),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_linear_layer_behind_pooling_or_flattening_is_balanced(head):
    function, features = HEADS[head]
    graph = make(Chain(Call(function), nn.Linear(features, 5)))
    before, after, result = outputs(graph)
    numerics.assert_sqnr(after, before, 120)
    folded = fold(result)
    weight = folded.module.get_submodule("second").weight.detach().numpy()
    read = np.abs(weight).reshape(5, 8, -1).max((0, 2))
    np.testing.assert_allclose(output_ranges(folded, "first"), read, rtol=1e-4)


class Branch(nn.Module):
    """The first layer's output is read twice, or joined with something."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first = models.conv_bn(3, 8)
        self.second = nn.Conv2d(16 if kind == "concat" else 8, 8, 1)

    def forward(self, x):
        y = F.relu(self.first(x))
        if self.kind == "add":
            return self.second(y + y.flip(3)).flatten(1)
        if self.kind == "concat":
            return self.second(torch.cat((y, y), 1)).flatten(1)
        if self.kind == "output":
            return torch.cat((self.second(y).flatten(1), y.flatten(1)), 1)
        if self.kind == "twice":
            return self.second(self.second(y)).flatten(1)
        return (self.second(y) + F.silu(y)).flatten(1)


UNTOUCHED = {
    "relu6": lambda: Chain(nn.ReLU6()),
    "silu": lambda: Chain(nn.SiLU()),
    "sigmoid": lambda: Chain(nn.Sigmoid()),
    "hardtanh": lambda: Chain(nn.Hardtanh()),
    "shuffle": lambda: Chain(nn.ChannelShuffle(2)),
    "pad_one": lambda: Chain(nn.ConstantPad2d(1, 1.0)),
    "shift": lambda: Chain(Call(lambda x: F.relu(x) + 1)),
    "over_channels": lambda: Chain(Call(lambda x: x.mean((1, 2))), nn.Linear(16, 4)),
    "rows": lambda: Chain(Call(lambda x: x.mean(2)), nn.Linear(16, 4)),
    "two_norms": lambda: Chain(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU())),
    **{kind: (lambda kind=kind: Branch(kind)) for kind in ("add", "concat", "output", "twice")},
    "reader": lambda: Branch("reader"),
}


@pytest.mark.parametrize("net", UNTOUCHED)
def test_what_does_not_commute_or_branches_is_left_alone(net):
    graph = make(UNTOUCHED[net]())
    result = equalize(graph)
    before, after = graph.module.state_dict(), result.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("net", sorted(models.TINY))
def test_every_tiny_net_computes_the_same(net):
    graph = models.trace_tiny(net)
    before, after, _ = outputs(graph)
    numerics.assert_sqnr(after, before, 115)


def test_residual_streams_and_depthwise_triples():
    pairs = [(p.first, p.second) for p in find_pairs(models.trace_tiny("residual"))]
    assert pairs == [("layer1.conv1", "layer1.conv2"), ("layer2.conv1", "layer2.conv2")]
    chain = find_pairs(models.trace_tiny("depthwise"))
    assert [(p.first, p.second) for p in chain] == [
        ("expand.0", "depthwise.0"),
        ("depthwise.0", "project.0"),
    ]
    assert all(p.clips for p in chain)


def test_dead_channels_are_left_alone_and_factors_are_bounded():
    module = Chain(nn.ReLU())
    graph = make(module)
    first, second = (graph.module.get_submodule(n) for n in ("first", "second"))
    with torch.no_grad():
        first.weight[0] = 0
        second.weight[:, 1] = 0
        first.weight[2] *= 1e-9
    before, after, result = outputs(graph, Options(limit=50.0))
    numerics.assert_sqnr(after, before, 120)
    gamma, scaled = (g.module.get_submodule("norm").weight.double() for g in (graph, result))
    factor = (scaled / gamma).detach().numpy()
    np.testing.assert_allclose(factor[:3], [1, 1, 50], rtol=1e-6)
    assert factor.max() <= 50 * (1 + 1e-6)
    assert factor.min() >= (1 - 1e-6) / 50


def test_relu6_is_replaced_only_where_asked_and_only_between_pairs():
    graph = models.trace_tiny("depthwise")
    before, after, result = outputs(graph, Options(relu6="replace"))
    kinds = [n.target for n in result.module.graph.nodes if n.op == "call_function"]
    assert kinds.count(RELU) == 2  # the stem's is read by the residual sum and stays
    folded = fold(result)
    np.testing.assert_allclose(
        output_ranges(folded, "depthwise.0"), input_ranges(folded, "project.0"), rtol=2e-3
    )
    small = infer(graph, 1e-3 * IMAGES), infer(result, 1e-3 * IMAGES)
    assert np.isfinite(after).all()
    assert before.shape == after.shape
    numerics.assert_sqnr(small[1], small[0], 100)  # nothing is clipped there


def test_expected_activations_follow_the_factors():
    graph = make(Chain(nn.ReLU()))
    result = equalize(graph)
    gamma, scaled = (g.module.get_submodule("norm").weight.double() for g in (graph, result))
    mean, moved = (expected_inputs(g)["second"] for g in (graph, result))
    factor = (scaled / gamma).detach().view(1, -1, 1, 1)
    torch.testing.assert_close(moved, mean * factor, rtol=1e-6, atol=1e-9)


def absorbing(between=None, padding=0):
    """A pair whose first channels are positive with certainty, and one that is not."""
    graph = make(Chain(between or nn.ReLU(), nn.Conv2d(8, 4, 1, padding=padding)))
    norm = graph.module.get_submodule("norm")
    with torch.no_grad():
        norm.bias.copy_(100 * norm.weight.abs())
        norm.bias[7] = 2 * norm.weight[7].abs()
    return graph


def test_absorbing_is_exact_where_the_activation_stays_positive():
    graph = absorbing()
    before, after, result = outputs(graph, Options(absorb=True))
    numerics.assert_sqnr(after, before, 100)
    norm = result.module.get_submodule("norm")
    left = (norm.bias / norm.weight.abs()).detach().numpy()
    np.testing.assert_allclose(left, [3] * 7 + [2], rtol=1e-3)


@pytest.mark.parametrize("case", ["leaky", "padded", "padded_map"])
def test_what_cannot_absorb_exactly_does_not(case):
    graph = {
        "leaky": lambda: absorbing(nn.LeakyReLU(0.1)),
        "padded": lambda: absorbing(padding=1),
        "padded_map": lambda: absorbing(nn.Sequential(nn.ReLU(), nn.ZeroPad2d(1))),
    }[case]()
    plain, absorbed = (equalize(graph, Options(absorb=a)) for a in (False, True))
    for name, value in plain.module.state_dict().items():
        assert torch.equal(absorbed.module.state_dict()[name], value), name


def test_the_given_graph_is_not_modified_and_methods_are_as_named():
    graph = models.trace_tiny("depthwise")
    kept = {name: value.clone() for name, value in graph.module.state_dict().items()}
    code = graph.module.code
    equalize(graph, METHODS["dfq"])
    assert graph.module.code == code
    assert all(torch.equal(graph.module.state_dict()[n], v) for n, v in kept.items())
    assert METHODS["none"] is None
    assert METHODS["cle"] == EXACT
