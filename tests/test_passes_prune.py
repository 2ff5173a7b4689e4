import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
import pruning
from dfqc.compiler.channels import find_groups, remove
from dfqc.compiler.errors import UnsupportedError, UsageError
from dfqc.compiler.graph import count_macs, count_params, verify
from dfqc.compiler.passes._budget import Costs, hull
from dfqc.compiler.passes.curve import error_curves
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.passes.prune import Curve, Options, choose, prune
from dfqc.compiler.passes.restore import Options as RestoreOptions
from pruning import IMAGE, chain, conv, trace_function

CRITERIA = ("l1", "l2", "bn", "output", "restored", "moments")


# --- Ratios


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_group_loses_the_ratio(criterion):
    graph = chain(16)
    smaller, decision = prune(graph, Options(ratio=0.3, criterion=criterion))
    assert smaller.module.get_submodule("a.0").out_channels == 16 - 4
    assert smaller.module.get_submodule("b.0").out_channels == 32 - 9
    assert decision.ratios == {"a.0": 4 / 16, "b.0": 9 / 32}
    assert decision.left == {"fc": "channels of the output"}
    for name, kept in decision.keep.items():
        curve = decision.curves[name]
        gone = len(curve.order) - len(kept)
        assert set(kept.tolist()) == set(curve.order[gone:].tolist())
        assert curve.scores[kept].min() >= curve.scores[curve.order[:gone]].max()
    x = models.images(2, IMAGE)
    silent = pruning.silence(graph, decision.keep)
    torch.testing.assert_close(smaller.module(x), silent.module(x))


def test_rounding_of_ratios():
    graph = chain(50)

    def widths(**options):
        smaller = prune(graph, Options(criterion="l2", **options))[0]
        return [smaller.module.get_submodule(path).out_channels for path in ("a.0", "b.0")]

    assert widths(ratio=0.0) == [50, 100]
    assert widths(ratio=0.29) == [36, 71]  # 0.29 * 100 is 28.999999999999996 in binary
    assert widths(ratio=0.3, multiple=8) == [40, 72]
    assert widths(ratio=0.1, multiple=32) == [50, 96]  # 32 of 50 would be too few
    assert widths(ratio=0.99, minimum=3) == [3, 3]
    assert widths(ratio=1.0) == [1, 1]


def test_ratios_by_layer_come_before_the_ratio():
    graph = chain(20)
    layers = (("*.0", 0.5), ("b.*", 0.25))
    assert choose(graph, Options(layers=layers)).ratios == {"a.0": 0.5, "b.0": 0.25}
    only = choose(graph, Options(layers=(("b.0", 0.25),)))
    assert only.ratios == {"a.0": 0.0, "b.0": 0.25}
    both = choose(graph, Options(ratio=0.1, layers=(("b.0", 0.25),)))
    assert both.ratios == {"a.0": 0.1, "b.0": 0.25}


def test_residual_sums_are_left_alone_unless_asked_for():
    graph = models.trace_tiny("residual")
    decision = choose(graph, Options(ratio=0.25))
    assert set(decision.keep) == {"layer1.conv1", "layer2.conv1"}
    assert decision.left["conv1"] == "channels of a residual sum"
    smaller, decision = prune(graph, Options(ratio=0.25, residual=True))
    assert len(decision.keep) == 4
    assert smaller.module.get_submodule("conv1").out_channels == 6
    assert smaller.module.get_submodule("layer1.conv2").out_channels == 6


def test_pruning_a_folded_graph():
    graph = fold(models.trace_tiny("residual"))
    smaller, decision = prune(graph, Options(ratio=0.25))
    x = models.images()
    expected = pruning.silence(graph, decision.keep).module(x)
    torch.testing.assert_close(smaller.module(x), expected)


# --- Budgets


@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize(
    "name", ["plain", "residual", "depthwise", "linear_norm", "squeeze_excite", "transposed"]
)
def test_costs_are_those_of_the_removed_graph(name, unit):
    graph = models.trace_tiny(name)
    groups = [group for group in find_groups(graph) if group.prunable]
    costs = Costs(graph, groups, unit)
    count = count_params if unit == "params" else count_macs
    assert costs.left({}) == costs.full == count(graph)
    for ratio in (0.2, 0.5, 0.9):
        keep = pruning.draw(graph, ratio)
        removed = {group.name: group.size - len(keep[group.name]) for group in groups}
        assert costs.left(removed) == count(remove(graph, keep))


@pytest.mark.parametrize("criterion", ["l2", "output", "restored", "moments"])
@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("part", [0.9, 0.5, 0.2])
def test_a_budget_is_met_and_not_by_far(unit, part, criterion):
    graph = chain(24)
    count = count_params if unit == "params" else count_macs
    smaller, decision = prune(graph, Options(**{unit: part}, criterion=criterion))
    verify(smaller, "test")
    assert count(smaller) <= part * count(graph)
    # One channel less anywhere would do: what was saved last was needed.
    spare = part * count(graph) - count(smaller)
    channel = {"params": 3 * 3 * 72, "macs": 3 * 3 * 72 * 64}[unit]
    assert spare <= channel
    assert max(decision.ratios.values()) <= 0.9


def test_moments_are_the_restored_error_and_work_on_folded_graphs():
    graph = chain(24)
    groups = [group for group in find_groups(graph) if group.prunable]
    decision = choose(graph, Options(channels=0.3, criterion="moments"))
    curves = error_curves(graph, groups, RestoreOptions())
    assert {name: curve.order.tolist() for name, curve in decision.curves.items()} == {
        name: curve.order.tolist() for name, curve in curves.items()
    }
    without = choose(fold(graph), Options(channels=0.3, criterion="moments"))
    assert sum(map(len, without.keep.values())) == sum(map(len, decision.keep.values()))


def test_a_budget_of_channels():
    graph = chain(20)
    decision = choose(graph, Options(channels=0.35))
    kept = sum(len(kept) for kept in decision.keep.values())
    kept += sum({"a.0": 20, "b.0": 40}[name] for name in {"a.0", "b.0"} - set(decision.keep))
    assert kept == math.floor(0.65 * 60)


def test_a_budget_goes_where_it_costs_least():
    graph = chain(20)
    free = Curve(torch.arange(20), torch.full((20,), 1e-9).cumsum(0).double(), torch.zeros(20))
    dear = Curve(torch.arange(40), torch.linspace(1, 9, 40).double().cumsum(0), torch.zeros(40))
    decision = choose(graph, Options(channels=0.25), {"a.0": free, "b.0": dear})
    assert set(decision.keep) == {"a.0"}
    assert decision.keep["a.0"].tolist() == [15, 16, 17, 18, 19]
    assert decision.curves["a.0"] is free
    # Two channels more than the first group may lose.
    more = choose(graph, Options(channels=1 / 3, most=0.9), {"a.0": free, "b.0": dear})
    assert len(more.keep["a.0"]) == 2
    assert len(more.keep["b.0"]) == 38


def test_a_budget_respects_multiples_layers_and_minimum():
    graph = chain(24)
    options = Options(macs=0.5, multiple=8, layers=(("a.0", 0.0),))
    smaller, decision = prune(graph, options)
    assert decision.ratios["a.0"] == 0
    assert smaller.module.get_submodule("b.0").out_channels % 8 == 0
    assert count_macs(smaller) <= 0.5 * count_macs(graph)


def test_a_budget_equals_the_best_of_all_choices_on_convex_curves():
    graph = chain(6)
    rng = torch.Generator().manual_seed(3)
    curves = {
        name: Curve(
            torch.arange(size),
            torch.rand(size, generator=rng, dtype=torch.double).sort().values.cumsum(0),
            torch.zeros(size),
        )
        for name, size in (("a.0", 6), ("b.0", 12))
    }
    for gone in range(1, 14):
        decision = choose(graph, Options(channels=gone / 18, most=1.0), curves)
        counts = [
            6 - len(decision.keep.get("a.0", range(6))),
            12 - len(decision.keep.get("b.0", range(12))),
        ]
        assert sum(counts) == gone

        def error(a, b):
            parts = (("a.0", a), ("b.0", b))
            return sum(float(curves[n].error[c - 1]) for n, c in parts if c)

        every = [error(a, gone - a) for a in range(6) if 0 <= gone - a < 12]
        assert error(*counts) == pytest.approx(min(every))


def test_hull_leaves_out_what_is_above_it():
    error = torch.tensor([3.0, 4.0, 4.5, 9.0, 10.0])
    curve = Curve(torch.arange(5), error, torch.zeros(5))
    assert hull(curve, range(1, 6)) == [(0, 0.0), (3, 4.5), (5, 10.0)]
    assert hull(curve, [2, 4]) == [(0, 0.0), (2, 4.0), (4, 9.0)]


# --- Requests that cannot be met


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(), "got no amount"),
        (Options(ratio=0.3, macs=0.5), "got ratio and macs; give one"),
        (Options(ratio=1.3), "ratio: got 1.3, expected a part from 0 to 1"),
        (Options(params=-0.1), "params: got -0.1"),
        (Options(layers=(("a.0", 1.0),)), r"a\.0: got 1.0"),
        (Options(layers=(("A.0", 0.5),)), r"'A\.0' matches no layer; nearest: .*a\.0"),
        (Options(ratio=0.1, minimum=0), "minimum: got 0"),
        (Options(ratio=0.1, ridge=0), "ridge: got 0"),
        (Options(macs=0.01), r"macs: got 0.01, expected at least 0\.\d+"),
        (Options(channels=0.95), r"channels: got 0.95, expected at most 0\.\d+"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        choose(chain(20), options)


@pytest.mark.parametrize("beside", [{}, {"ratio": 0.25}, {"macs": 0.9}])
def test_a_ratio_for_layers_that_stay_whole_is_refused_with_the_reason(beside):
    graph = models.trace_tiny("residual")
    message = r"'conv1' matches only layers whose channels stay; conv1: channels of a residual sum;"
    with pytest.raises(UsageError, match=message + " allow residual channels"):
        choose(graph, Options(layers=(("conv1", 0.5),), **beside))
    with pytest.raises(UsageError, match=r"head\.fc: channels of the output$"):
        choose(graph, Options(layers=(("head.fc", 0.5),), **beside))
    allowed = choose(graph, Options(layers=(("conv1", 0.5),), residual=True, **beside))
    assert allowed.ratios["conv1"] == 0.5


def test_a_ratio_that_counts_for_some_layers_only_names_the_others(caplog):
    graph = models.trace_tiny("residual")
    decision = choose(graph, Options(layers=(("layer1.*", 0.5),)))
    assert decision.ratios == {"layer1.conv1": 0.5, "layer2.conv1": 0.0}
    assert "'layer1.*' does not count for 1 of the 2 layers" in caplog.text
    assert "layer1.conv2: channels of a residual sum" in caplog.text
    caplog.clear()
    choose(graph, Options(layers=(("layer1.conv1", 0.5),)))
    assert not caplog.records


def test_a_ratio_for_a_depthwise_layer_is_that_of_its_channels():
    graph = models.trace_tiny("depthwise")
    (group,) = [g for g in find_groups(graph) if g.through and g.prunable and not g.residual]
    (through,) = group.through
    assert choose(graph, Options(layers=((through, 0.5),))).ratios[group.name] == 0.5


def test_nothing_to_prune_is_refused():
    with pytest.raises(UnsupportedError, match="no group of channels can be pruned"):
        choose(models.trace_tiny("concat"), Options(ratio=0.3))


def test_sums_that_are_all_there_is_are_hinted_at():
    """As in RepVGG: every layer's output is a sum of branches."""
    graph = trace_function(
        lambda m, x: m.fc(F.relu(m.a(x) + m.b(x)).mean((2, 3))),
        a=lambda: conv(3, 8),
        b=lambda: conv(3, 8, k=1),
        fc=lambda: nn.Linear(8, 3),
    )
    with pytest.raises(UnsupportedError, match=r"a residual sum.*; allow residual channels"):
        choose(graph, Options(ratio=0.3))
    assert choose(graph, Options(ratio=0.3, residual=True)).keep


def test_the_same_decision_every_time():
    graph = models.trace_tiny("squeeze_excite")
    one, two = (choose(graph, Options(macs=0.6)) for _ in range(2))
    assert {n: k.tolist() for n, k in one.keep.items()} == {
        n: k.tolist() for n, k in two.keep.items()
    }
    assert one.keep
    assert replace(one, keep={}, curves={}) == replace(two, keep={}, curves={})
