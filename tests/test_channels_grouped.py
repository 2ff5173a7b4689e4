"""Convolutions with groups: what is removed keeps them legal, and is what was asked for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
import pruning
from dfqc.compiler.channels import Use, remove
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import count_macs, count_params
from dfqc.compiler.passes._layers import dense_weight, input_taps, output_rows
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.passes.prune import Options, prune
from pruning import conv, groups_of, trace_function


def trace_block(groups=4, width=16, gated=False):
    """A bottleneck with a grouped convolution, as in ResNeXt, or RegNetY where it is gated."""

    def forward(m, x):
        x = F.relu(m.stem(x))
        y = F.relu(m.mid(F.relu(m.first(x))))
        if gated:
            y = y * m.open(F.relu(m.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return m.fc(F.relu(x + m.last(y)).mean((2, 3)))

    gate = {
        "squeeze": lambda: nn.Conv2d(2 * width, 4, 1),
        "open": lambda: nn.Conv2d(4, 2 * width, 1),
    }
    return trace_function(
        forward,
        stem=lambda: conv(3, 8),
        first=lambda: conv(8, width, k=1),
        mid=lambda: conv(width, 2 * width, groups=groups),
        last=lambda: conv(2 * width, 8, k=1),
        fc=lambda: nn.Linear(8, 5),
        **(gate if gated else {}),
    )


def test_both_sides_of_a_grouped_convolution_are_groups_of_their_own():
    groups = groups_of(trace_block())
    read, made = groups["first.0"], groups["mid.0"]
    assert (read.size, read.slices, read.users) == (16, 4, (Use("mid.0", 1, 0),))
    assert (made.size, made.slices, made.users) == (32, 4, (Use("last.0", 1, 0),))
    assert read.restorable
    assert made.restorable
    assert groups["stem.0"].slices == 1


@pytest.mark.parametrize("gated", [False, True])
def test_a_block_without_channels_is_the_block_with_them_silent(gated):
    graph = trace_block(gated=gated)
    pruning.check(graph)
    pruning.check(fold(graph))


@pytest.mark.parametrize("name", ["grouped", "transposed"])
def test_tiny_networks_with_groups(name):
    pruning.check(models.trace_tiny(name))
    pruning.check(models.trace_tiny(name), 0.5)


def test_the_smaller_weight_is_that_of_the_dense_convolution():
    graph = trace_block()
    keep = {
        "first.0": torch.tensor([0, 3, 4, 7, 9, 10, 12, 14]),
        "mid.0": torch.cat([8 * i + torch.tensor(k) for i, k in enumerate([[1], [0], [7], [4]])]),
    }
    smaller = remove(graph, keep)
    layer = smaller.module.get_submodule("mid.0")
    assert (layer.groups, layer.in_channels, layer.out_channels) == (4, 8, 4)
    whole = dense_weight(graph.module.get_submodule("mid.0"))
    expected = whole[keep["mid.0"]][:, keep["first.0"]]
    assert torch.equal(dense_weight(layer), expected)


def test_a_gate_goes_along_with_what_it_gates():
    group = groups_of(trace_block(gated=True))["mid.0"]
    assert group.producers == ("mid.0", "open")
    assert group.slices == 4


@pytest.mark.parametrize("groups", [(4, 6), (6, 4), (2, 4)])
def test_sums_of_grouped_convolutions_keep_both_legal(groups):
    graph = trace_function(
        lambda m, x: m.fc(F.relu(m.a(F.relu(m.stem(x))) + m.b(F.relu(m.stem2(x)))).mean((2, 3))),
        stem=lambda: conv(3, 12),
        stem2=lambda: conv(3, 12),
        a=lambda: conv(12, 24, groups=groups[0]),
        b=lambda: conv(12, 24, groups=groups[1]),
        fc=lambda: nn.Linear(24, 3),
    )
    assert groups_of(graph)["a.0"].slices == (12 if 6 in groups else 4)
    pruning.check(graph)


def test_grouped_convolutions_in_a_row_and_depthwise_ones_between():
    graph = trace_function(
        lambda m, x: m.fc(F.relu(m.b(F.relu(m.deep(F.relu(m.a(m.stem(x))))))).mean((2, 3))),
        stem=lambda: conv(3, 8),
        a=lambda: conv(8, 12, groups=2),
        deep=lambda: conv(12, 12, groups=12),
        b=lambda: conv(12, 6, groups=3),
        fc=lambda: nn.Linear(6, 3),
    )
    group = groups_of(graph)["a.0"]
    assert (group.slices, group.through) == (6, ("deep.0",))
    pruning.check(graph)


def test_unequal_groups_are_refused():
    graph = trace_block()
    with pytest.raises(ValueError, match="equally many channels to keep of each of 4 slices"):
        remove(graph, {"first.0": torch.arange(15)})
    with pytest.raises(ValueError, match="equally many"):
        remove(graph, {"first.0": torch.arange(8)})


def test_shuffled_channels_stay():
    """As in ShuffleNet: what was one group is spread over all."""

    def forward(m, x):
        x = F.relu(m.a(F.relu(m.stem(x))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.fc(F.relu(m.b(m.deep(x))).mean((2, 3)))

    graph = trace_function(
        forward,
        stem=lambda: conv(3, 8),
        a=lambda: conv(8, 12, k=1, groups=2),
        deep=lambda: conv(12, 12, groups=12),
        b=lambda: conv(12, 8, k=1, groups=2),
        fc=lambda: nn.Linear(8, 3),
    )
    groups = groups_of(graph)
    assert groups["a.0"].reason == "reshape splits or merges channels"
    assert groups["stem.0"].prunable
    assert groups["b.0"].prunable
    pruning.check(graph)


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn", "output", "restored", "moments"])
@pytest.mark.parametrize("amount", [{"ratio": 0.5}, {"channels": 0.3}, {"params": 0.6}])
def test_every_group_loses_equally_many(criterion, amount):
    graph = trace_block(gated=True)
    smaller, decision = prune(graph, Options(criterion=criterion, **amount))
    assert {"first.0", "mid.0"} & decision.keep.keys()
    for name in {"first.0", "mid.0"} & decision.keep.keys():
        length = groups_of(graph)[name].size // 4
        assert len(set(torch.bincount(decision.keep[name] // length, minlength=4).tolist())) == 1
    assert count_params(smaller) < count_params(graph)
    if "params" in amount:
        assert count_params(smaller) <= 0.6 * count_params(graph)
    smaller.module(models.images(1, graph.image))


def test_within_a_group_the_criterion_decides():
    graph = trace_block()
    _, decision = prune(graph, Options(ratio=0.5, criterion="l2"))
    norms = graph.module.get_submodule("mid.0").weight.flatten(1).norm(dim=1).view(4, 8)
    expected = norms.argsort(dim=1)[:, 4:].sort(dim=1).values + 8 * torch.arange(4)[:, None]
    assert torch.equal(decision.keep["mid.0"], expected.flatten())


@pytest.mark.parametrize(
    ("ratio", "multiple", "left"), [(0.3, 1, 12), (0.5, 3, 12), (0.2, 1, 16), (0.5, 8, 8)]
)
def test_ratios_round_down_to_whole_channels_per_group(ratio, multiple, left):
    graph = trace_block()
    smaller, _ = prune(graph, Options(ratio=ratio, multiple=multiple))
    assert smaller.module.get_submodule("first.0").out_channels == left


def test_budgets_count_what_is_left():
    graph = trace_block()
    for part in (0.8, 0.5):
        smaller, _ = prune(graph, Options(macs=part))
        assert 0.5 * part < count_macs(smaller) / count_macs(graph) <= part
    with pytest.raises(UsageError, match="all that can go here"):
        prune(graph, Options(macs=0.01))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 9, 3, groups=3, bias=False),
        nn.ConvTranspose2d(6, 9, 3, groups=3, bias=False),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.ConvTranspose2d(4, 6, 2, bias=False),
        nn.Linear(5, 7, bias=False),
    ],
    ids=["conv", "transposed", "dense", "dense-transposed", "linear"],
)
@torch.no_grad()
def test_views_of_weights_by_channel(layer):
    """Against impulses: what one input adds to one output is the sum of the kernel they share."""
    layer.weight.copy_(torch.arange(1.0, layer.weight.numel() + 1).view(layer.weight.shape))
    rows, taps = output_rows(layer, layer.weight), input_taps(layer, layer.weight)
    linear = isinstance(layer, nn.Linear)
    for c, values in enumerate(taps):
        x = torch.zeros(1, len(taps)) if linear else torch.zeros(1, len(taps), 5, 5)
        x[(0, c) if linear else (0, c, 2, 2)] = 1
        answer = layer(x)[0].flatten(1).sum(1) if not linear else layer(x)[0]
        assert len(answer) == len(rows)
        shared = [sum({*row.tolist()} & {*values.flatten().tolist()}) for row in rows]
        assert answer.tolist() == shared
