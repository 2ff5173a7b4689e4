import pytest

import quantized
from dfqc.compiler.quantize import _schedule
from dfqc.compiler.quantize._schedule import Clock, Report
from dfqc.compiler.quantize._units import list_units, merge_blocks


def make(monkeypatch, seconds, *, last=0, iterations=(10,)):
    graph = quantized.folded("residual")
    plan = quantized.plan(graph)
    units = list_units(graph, plan, merge_blocks(graph, set(plan.layers)), "block")
    now = [100.0]
    monkeypatch.setattr(_schedule.time, "monotonic", lambda: now[0])
    return Clock.of(graph, plan, units, iterations, last=last, seconds=seconds), units, now


def test_without_a_limit_nothing_is_granted_or_left(monkeypatch):
    clock, units, _ = make(monkeypatch, None)
    assert clock.left() is None
    assert clock.grant(units[0]) is None


@pytest.mark.parametrize("iterations", [(10,), (10, 4)])
def test_units_that_keep_to_their_time_share_all_of_it(monkeypatch, iterations):
    clock, units, now = make(monkeypatch, 60.0, iterations=iterations)
    for _ in iterations:
        for unit in units:
            granted = clock.grant(unit)
            assert granted > 0
            now[0] += granted
    assert clock.left() == pytest.approx(0.0, abs=1e-6)


def test_larger_units_get_more_and_the_tuning_keeps_its_part(monkeypatch):
    clock, units, now = make(monkeypatch, 60.0, last=10)
    granted = {}
    for unit in units:
        granted[unit.name] = clock.grant(unit)
        now[0] += granted[unit.name]
    assert granted["layer1"] > granted["head.fc"]
    assert clock.left() == pytest.approx(30.0)


def test_a_unit_that_is_skipped_leaves_its_time_to_the_others(monkeypatch):
    clock, units, _ = make(monkeypatch, 60.0)
    for unit in units[:-1]:
        clock.skip(unit)
    assert clock.grant(units[-1]) == pytest.approx(60.0)


def test_progress_counts_all_units_as_one_work():
    seen = []
    report = Report(lambda *args: seen.append(args), 20)
    report.of("a")(3, 10, "")
    report.finish(10)
    report.of("b")(5, 10, "loss")
    assert seen == [(3, 20, "a"), (15, 20, "b loss")]
