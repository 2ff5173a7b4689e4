"""Layers left in float because that is faster."""

from __future__ import annotations

import numpy as np
import pytest

import quantized
from dfqc.backends import ort
from dfqc.compiler.autotune import GAIN, autotune, list_groups
from dfqc.compiler.plan import leave_float, make_plan
from dfqc.compiler.spec import parse_bits, parse_rule

BITS = parse_bits("w8a8")


def planned(net, *rules):
    graph = quantized.folded(net)
    return graph, make_plan(graph, ort.TARGET, BITS, [parse_rule(r) for r in rules], ends=BITS)


def stopwatch(cost, offset=0.0):
    """An engine takes the sum of its layers' milliseconds, by whether they are quantized."""

    def measure(plans):
        def total(plan):
            return sum(cost(name, layer.weight is not None) for name, layer in plan.layers.items())

        return {name: np.full(5, offset + total(plan)) for name, plan in plans.items()}

    return measure


@pytest.mark.parametrize("net", ["residual", "depthwise", "concat"])
def test_a_plan_with_layers_in_float_is_that_of_rules_that_say_so(net):
    graph, plan = planned(net)
    for name in plan.layers:
        left = leave_float(graph, ort.TARGET, plan, [name], "why")
        _, wanted = planned(net, f"{name}=w32a32")
        assert left.quantizers == wanted.quantizers
        assert left.layers[name].weight is None
        assert left.layers[name].reason == "why"
        for other in set(plan.layers) - {name}:
            assert left.layers[other] == wanted.layers[other]


def test_what_is_slow_goes_to_float_and_nothing_else():
    graph, plan = planned("depthwise")
    groups = dict(list_groups(graph, plan))
    slow = set(groups["depthwise convolutions"])
    assert slow < set(plan.layers)

    def cost(name, quantized):
        return (3.0 if quantized else 1.0) if name in slow else (1.0 if quantized else 3.0)

    chosen, trials = autotune(graph, plan, ort.TARGET, stopwatch(cost))
    assert {n for n, layer in chosen.layers.items() if layer.weight is None} == slow
    assert [trial.what for trial in trials if trial.kept] == ["depthwise convolutions"]


def test_a_layer_of_a_group_that_does_not_need_float_is_quantized_again():
    graph, plan = planned("residual")
    slow, *free = group = dict(list_groups(graph, plan))["convolutions of few channels"]
    assert len(free) > 1

    def cost(name, quantized):
        if name in free:  # costs less than noise when quantized
            return 0.01 if quantized else 0.0
        return (3.0 if quantized else 1.0) if name == slow else (1.0 if quantized else 3.0)

    chosen, trials = autotune(graph, plan, ort.TARGET, stopwatch(cost))
    assert [n for n, layer in chosen.layers.items() if layer.weight is None] == [slow]
    again = [(t.layers, t.kept) for t in trials if t.what.endswith("again")]
    assert again == [((name,), name != slow) for name in group]


def test_many_small_losses_do_not_add_up():
    graph, plan = planned("residual")
    group = dict(list_groups(graph, plan))["convolutions of few channels"]
    loss = 0.6 * (GAIN - 1) * 100  # one is noise, two are not

    def cost(name, quantized):
        return loss if name in group and quantized else 0.0

    def measure(plans):
        # In the beginning the whole group is far slower than it is alone.
        times = stopwatch(cost, 100.0)(plans)
        slow = {n for n, p in plans.items() if all(p.layers[g].weight for g in group)}
        return {n: t + 50 * (n in slow) for n, t in times.items()}

    chosen, _ = autotune(graph, plan, ort.TARGET, measure)
    assert sum(chosen.layers[name].weight is not None for name in group) == 1


def test_a_gain_that_may_be_noise_changes_nothing():
    graph, plan = planned("residual")
    total = 100.0
    gain = total * (GAIN - 1) / 2

    def cost(name, quantized):
        return gain if quantized and name == "conv1" else 0.0

    chosen, trials = autotune(graph, plan, ort.TARGET, stopwatch(cost, total))
    assert chosen == plan
    assert trials
    assert not any(trial.kept for trial in trials)


def test_medians_alone_do_not_decide():
    graph, plan = planned("residual")

    def measure(plans):
        # Faster by medians, as by chance on a busy machine; not by best calls.
        return {"now": np.array([1.0, 9, 9, 9, 9]), "other": np.array([1.0, 2, 2, 2, 2])}

    chosen, _ = autotune(graph, plan, ort.TARGET, measure)
    assert chosen == plan


def test_no_more_engines_than_there_is_time_for():
    graph, plan = planned("residual")
    _, trials = autotune(graph, plan, ort.TARGET, stopwatch(lambda *_: 1.0), seconds=-1.0)
    assert trials == []


def test_groups_come_once_and_hold_quantized_layers_only():
    graph, plan = planned("depthwise", "head*=w32a32")
    groups = list_groups(graph, plan)
    assert len({names for _, names in groups}) == len(groups)
    floats = {name for name, layer in plan.layers.items() if layer.weight is None}
    assert floats
    assert not any(floats & set(names) for _, names in groups)
