import math

import pytest

from dfqc.compiler.steps import Steps, anneal, cosine


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(planned, seconds, *, each=1.0, first=None):
    """Return the steps after a run in which every iteration takes `each` seconds."""
    clock = Clock()
    steps = Steps(planned, seconds, clock=clock)
    for place in steps:
        clock.now += first if first is not None and place == 0 else each
    return steps, clock


def test_without_a_limit_all_are_made():
    steps = Steps(7)
    assert list(steps) == list(range(7))
    assert steps.done == steps.total == 7
    assert not steps.shortened
    assert steps.fraction == 1


def test_what_fits_is_made():
    steps, clock = run(100, 20)
    assert steps.done == 20
    assert clock.now == 20
    assert steps.shortened


def test_time_enough_changes_nothing():
    steps, _ = run(100, 101)
    assert steps.done == 100
    assert not steps.shortened


def test_a_slow_first_iteration_is_not_taken_for_all():
    steps, clock = run(100, 30, first=10)
    assert steps.done == 21
    assert clock.now == 30


@pytest.mark.parametrize("seconds", [0, 0.5, 1.5])
def test_no_time_at_all_still_gives_images(seconds):
    steps, _ = run(100, seconds)
    assert 1 <= steps.done <= 2
    assert steps.shortened


def test_the_schedule_ends_with_the_time():
    """What matters is not that it stops but that the rate has come down by then."""
    clock = Clock()
    steps = Steps(1000, 50, clock=clock)
    rates = []
    for _ in steps:
        rates.append(anneal(steps.fraction))
        clock.now += 1
    assert len(rates) == 50
    assert rates[-1] == pytest.approx(2 / 50)


def test_a_pace_that_is_known_is_planned_with_at_once():
    clock = Clock()
    steps = Steps(100, 20, each=1.0, clock=clock)
    assert (steps.total, steps.shortened) == (20, True)
    for _ in steps:  # it was twice as fast then
        clock.now += 2
    assert clock.now == 20
    assert Steps(100, 0, each=1.0).total == 1
    assert Steps(100, None, each=1.0).total == 100


def test_a_shortage_that_passes_is_still_one():
    """Rates were lowered for fewer iterations: the images are not those of an unlimited run."""
    clock = Clock()
    steps = Steps(20, 30, clock=clock)
    for place in steps:
        clock.now += 5 if place < 4 else 0.01
    assert steps.done == 20
    assert steps.shortened


def test_an_early_end_does_not_hide_a_shortage():
    clock = Clock()
    steps = Steps(100, 50, clock=clock)
    for place in steps:
        clock.now += 1
        if place == 10:
            steps.end_in(5)
    assert steps.done == 15
    assert steps.shortened


def test_an_early_end_is_not_a_shortage():
    steps = Steps(100, 1e9)
    seen = []
    for place in steps:
        seen.append(place)
        if place == 9:
            assert steps.left == 91  # this one among them
            steps.end_in(6)
    assert seen == list(range(15))
    assert not steps.shortened


def test_an_iteration_that_takes_no_time_is_no_fault():
    steps, _ = run(5, 1, each=0.0)
    assert steps.done == 5


def test_anneal_holds_then_falls():
    assert [anneal(f) for f in (0, 0.25, 0.5, 0.75, 1)] == [1, 1, 1, 0.5, 0]


def test_cosine_rises_then_falls():
    assert [cosine(f) for f in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert cosine(0, warm_up=0.2) == 0
    assert cosine(0.1, warm_up=0.2) == pytest.approx(0.5)
    assert cosine(0.2, warm_up=0.2) == pytest.approx(1)
    assert cosine(0.6, warm_up=0.2) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
