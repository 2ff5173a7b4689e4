"""The training of a student: its losses, its segments, and what it does when it breaks down."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import models
from classifiers import trained
from dfqc.compiler import distill_train
from dfqc.compiler.distill_options import METHODS, PRESETS, DistillOptions
from dfqc.compiler.distill_train import Trainer, hint_loss, output_loss
from dfqc.compiler.matching import find_hints
from dfqc.compiler.sources import Pool
from dfqc.compiler.stages_distill import _find_collapse, load_state, save_state, source_options
from dfqc.compiler.steps import Steps

CPU = torch.device("cpu")
SMALL = {"steps": 12, "batch_size": 8, "points": 4}


def trainer(seed=0, source=None, health=None, **options):
    rng = torch.Generator().manual_seed(seed)
    teacher, student = trained("residual"), models.trace_tiny("residual", 3)
    pool = Pool(models.images(20, seed=1), rng)
    more = {} if health is None else {"health": health}
    return Trainer(
        teacher, student, find_hints(teacher, student), source or pool,
        DistillOptions(**(SMALL | options)), rng=rng, held_out=models.images(16, seed=2),
        device=CPU, **more,
    )  # fmt: skip


def finish(one, state=None):
    state = state or one.begin()
    while not state.finished:
        state = one.advance(state)
    return state


def test_output_loss_is_hintons():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 5, 7))

    def soften(logits):
        powers = np.exp(logits / 3.0)
        return powers / powers.sum(1, keepdims=True)

    p, q = soften(theirs), soften(ours)
    expected = 9.0 * (p * np.log(p / q)).sum(1).mean()
    found = output_loss(torch.tensor(ours), torch.tensor(theirs), 3.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_hint_loss_is_one_for_a_map_of_means():
    maps = [torch.randn(6, c, 5, 5) * 3 + 1 for c in (2, 4)]
    means = [m.mean((0, 2, 3), keepdim=True).expand_as(m) for m in maps]
    assert float(hint_loss(means, maps)) == pytest.approx(2.0, rel=1e-4)
    assert float(hint_loss(maps, maps)) == 0
    assert float(hint_loss([], [])) == 0


def test_a_first_step_is_the_gradients():
    """Momentum and decay off, one step: weights move by the rate times autograd's gradient."""
    one = trainer(momentum=0.0, weight_decay=0.0, schedule="steps", lr=0.1, steps=1, points=1,
                  crop=0.0, flip=False, mix=0.0, hint=0.0)  # fmt: skip
    state = one.begin()
    reference = models.trace_tiny("residual", 3).module
    rng = torch.Generator()
    rng.set_state(state.tensors["rng"])
    images = Pool(models.images(20, seed=1), rng).draw(8)
    reference.train().requires_grad_(True)
    with torch.no_grad():
        wanted = trained("residual").module(images)
    output_loss(reference(images), wanted, 4.0).backward()
    after = finish(one, state).part("student")
    for name, value in reference.named_parameters():
        torch.testing.assert_close(after[name], value.detach() - 0.1 * value.grad)


def test_students_learn():
    state = finish(trainer(steps=60, batch_size=16, lr=0.05, mix=0.0))
    assert state.curve[-1]["agreement"] > state.curve[0]["agreement"] + 20
    assert state.curve[-1]["loss"] < 0.8 * state.curve[1]["loss"]
    assert [p["step"] for p in state.curve] == [0, 15, 30, 45, 60]


def test_seeds_decide():
    states = [finish(trainer(seed)) for seed in (0, 0, 1)]
    ends = [s.part("student")["head.fc.weight"] for s in states]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_a_stored_state_goes_on_to_the_same_bytes(tmp_path):
    whole = finish(trainer())
    one = trainer()
    state = one.advance(one.advance(one.begin()))
    save_state(state, tmp_path)
    resumed = finish(trainer(), load_state(tmp_path))
    assert whole.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(v, resumed.tensors[k]) for k, v in whole.tensors.items())
    steps = [p["step"] for p in resumed.curve]
    assert steps == [p["step"] for p in whole.curve] == [0, 3, 6, 9, 12]


def test_time_shortens_the_schedule_and_the_segments():
    one = trainer(steps=10_000_000, points=3)
    state = one.begin()
    while not state.finished:
        state = one.advance(state, seconds=0.5)
    assert state.shortened
    assert state.done < 100_000
    assert state.done == state.total


@pytest.mark.parametrize("segment", [1, 2, 3, 7])
def test_segments_of_a_few_steps_are_planned_for_the_time_too(segment, monkeypatch):
    """A step takes a second, a look at the student a fourth: of 60 s, most are used and no more."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(distill_train, "time", clock)
    monkeypatch.setattr(Steps.__init__, "__kwdefaults__", {"each": None, "clock": clock.monotonic})
    one = trainer(steps=100 * segment, points=100)
    look = one._look

    def step(fraction):
        now[0] += 1.0
        fractions.append(fraction)
        one.shown = models.images(2)
        return torch.zeros(())

    def slow_look(*arguments):
        now[0] += 0.25
        return look(*arguments)

    fractions = []
    monkeypatch.setattr(one, "_step", step)
    monkeypatch.setattr(one, "_look", slow_look)
    state = one.begin()
    while not state.finished:
        state = one.advance(state, seconds=60 - now[0])
    assert state.shortened
    assert 45 <= now[0] <= 62
    assert state.done == len(fractions) < 60
    assert fractions == sorted(fractions)
    assert fractions[-1] > 0.9  # the schedule was gone through


def test_a_loss_that_is_no_number_stops_with_the_best_student():
    one = trainer(lr=0.01)
    state = one.advance(one.begin())
    kept = dict(state.part("best"))
    one.options = one.options.model_copy(update={"lr": 1e30})
    while not state.finished:
        state = one.advance(state)
    assert "no number" in state.stopped
    assert state.curve[-1]["loss"] is None
    after = state.part("student")
    assert all(torch.isfinite(v).all() for v in after.values())
    assert all(torch.equal(after[k], v) for k, v in kept.items())


def test_images_that_are_unhealthy_stop_it():
    state = finish(trainer(health=lambda images: "all alike" if len(images) == 8 else ""))
    assert state.stopped == "all alike"
    assert state.done == 3
    assert not state.shortened


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (models.images(1).expand(16, -1, -1, -1) + 1e-4, "15 of 16 of its images are nearly"),
        (models.images(16, seed=2), ""),
    ],
    ids=["alike", "healthy"],
)
def test_a_collapsed_generator_is_found(images, message):
    found = _find_collapse(trained("residual"), images)
    assert (message in found) if message else not found


def test_a_generator_of_one_class_has_collapsed():
    graph = models.trace_tiny("residual")
    with torch.no_grad():
        graph.module.get_parameter("head.fc.bias")[3] += 100
    assert "one class" in _find_collapse(graph, models.images(16, seed=2))


def test_a_pool_shows_every_image_once_a_round():
    images = torch.arange(10.0).view(10, 1, 1, 1)
    pool = Pool(images, torch.Generator().manual_seed(0))
    first = torch.cat([pool.draw(3) for _ in range(3)])
    stored = {k: v.clone() for k, v in pool.state().items()}
    last = pool.draw(1)
    assert sorted(torch.cat((first, last)).flatten().tolist()) == list(range(10))
    again = Pool(images, torch.Generator())
    again.restore(stored)
    assert torch.equal(again.draw(1), last)
    assert len(pool.draw(25)) == 25


@pytest.mark.parametrize("method", METHODS)
def test_max_is_the_published_schedule(method):
    options = DistillOptions(**PRESETS[method, "max"])
    assert (options.steps, options.batch_size) == (2000 * 120, 1024)
    assert (options.lr, options.weight_decay, options.momentum) == (0.1, 5e-4, 0.9)
    assert options.nesterov is False
    assert (options.temperature, options.hint, options.init) == (1.0, 0.0, "random")
    from dfqc.compiler.distill_train import _rate

    rates = [_rate(options, done / 2000) for done in (0, 799, 800, 1599, 1600, 1999)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert math.isclose(_rate(DistillOptions(), 1.0), 0.0, abs_tol=1e-9)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_the_published_one_or_nesterovs(nesterov, monkeypatch):
    """Sutskever et al. 2013: two steps of slopes 2 and 3."""
    one = trainer(lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=nesterov)
    weight = one.student.get_parameter("head.fc.bias")
    before = weight.detach().double()
    velocity, expected = 0.0, 0.0
    for slope in (2.0, 3.0):
        weight.grad = torch.full_like(weight, slope)
        one.optimizer.step()
        velocity = 0.9 * velocity + slope
        expected += 0.1 * (slope + 0.9 * velocity if nesterov else velocity)
    torch.testing.assert_close(before - weight.double(), torch.full_like(before, expected))


@pytest.mark.parametrize(
    ("method", "effort", "clip", "mix"),
    [("dafl", "max", False, 0.0), ("dafl", "quick", True, 0.0), ("mix", "max", False, 0.5)],
)
def test_at_max_images_are_shown_as_the_generator_makes_them(method, effort, clip, mix):
    recipe = SimpleNamespace(synth="dafl", effort=effort, synth_option={})
    job = SimpleNamespace(method=method, recipe=recipe)
    options = source_options(job)
    assert (options.clip, options.mix) == (clip, mix)
    recipe.synth_option = {"clip": True, "mix": 0.25}
    assert (source_options(job).clip, source_options(job).mix) == (True, 0.25)


@pytest.mark.parametrize("name", ["attention", "linear_norm", "transposed", "no_norm"])
def test_students_of_any_kind_are_trained_whole(name):
    rng = torch.Generator().manual_seed(0)
    teacher, student = trained("residual"), models.trace_tiny(name)
    before = {k: v.clone() for k, v in student.module.named_parameters()}
    one = Trainer(
        teacher, student, find_hints(teacher, student), Pool(models.images(20), rng),
        DistillOptions(**SMALL), rng=rng, held_out=models.images(16), device=CPU,
    )  # fmt: skip
    after = finish(one).part("student")
    assert before.keys() <= after.keys() == student.module.state_dict().keys()
    # A bias that every class shares, or that a batch norm takes away, need not move.
    moved = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert len(moved) >= 0.8 * len(before)
