"""The game between a generator and a student: what both learn, when it stops, how it goes on."""

import math

import pytest
import torch

import models
import quantized
from classifiers import trained
from dfqc.calib import adadfq
from dfqc.compiler import calib_quality
from dfqc.compiler.contracts import QParams
from dfqc.compiler.errors import UsageError
from dfqc.compiler.opponent import Move
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.plan import make_plan
from dfqc.compiler.quantize import _game
from dfqc.compiler.quantize._game import (
    Game,
    load_part,
    save_part,
)
from dfqc.compiler.quantize._game_options import GameOptions
from dfqc.compiler.quantize._game_start import set_up
from dfqc.compiler.quantize._latent import LatentGrid
from dfqc.compiler.quantize._optimizer import pack_optimizer, unpack_optimizer
from dfqc.compiler.quantize.adadfq import _READ_BY
from dfqc.compiler.spec import Bits, QScheme
from dfqc.compiler.steps import Steps

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Scripted:
    """An opponent that draws what a test says."""

    classes = 10

    def __init__(self, images):
        self.images = images

    def step(self, student, factor):
        answer = student(self.images)
        return Move(trained("residual").module(self.images), answer, torch.zeros(()))

    def draw(self, labels, rng):
        return self.images[torch.arange(len(labels)) % len(self.images)]

    def snapshot(self):
        return {}

    def restore(self, state):
        pass


def make_game(opponent=None, *, learned=False, **options) -> Game:
    graph = fold(trained("residual"))
    plan = make_plan(graph, quantized.INPUTS, Bits(4, 4), [], ends=None)
    state = quantized.quantize(graph, plan)
    chosen = GameOptions(**({"game_batch": 6, "channels": 8} | options))
    opponent = opponent or Scripted(varied_images())
    return set_up(
        graph, trained("residual"), state, opponent, chosen, learned=learned, seed=0, device=CPU
    )


def varied_images() -> torch.Tensor:
    """Different images in which the net sees about all classes alike often."""
    candidates = models.images(600, seed=4)
    with torch.no_grad():
        seen = trained("residual").module(candidates).argmax(1)
    rows = [torch.nonzero(seen == c).flatten()[:12] for c in range(10)]
    images = candidates[torch.cat(rows)][torch.randperm(sum(map(len, rows)), generator=seeded())]
    found = calib_quality.score(trained("residual"), images[: _game.DRAWN])
    assert found.predictions.evenness > 0.6
    return images


@pytest.mark.parametrize("learned", [False, True])
def test_the_student_learns_what_the_float_network_answers(learned):
    images = varied_images()[:32]
    options = {"lr_student": 3e-4, "lr_latent": 1e-2, "lr_steps": 3e-3, "milestones": (0.7,)}
    game = make_game(Scripted(images), learned=learned, iterations=60, **options)

    def gap() -> float:
        with torch.no_grad():
            found, wanted = game.student(images), trained("residual").module(images)
        difference = (found - wanted).double()
        return float((difference - difference.mean(1, keepdim=True)).square().mean())

    seen = [gap() for _ in game.play(4)]  # one part of warm-up: ranges alone
    assert seen[-1] < 0.5 * seen[0]


@pytest.mark.parametrize("option", [n for n in _READ_BY if n != "start_iterations"])
def test_options_that_are_refused_would_have_no_effect(option):
    value = {"momentum": 0.0, "weight_decay": 0.5, "observe": 0.9}.get(option, 0.05)

    def student_after(learned, **given):
        game = make_game(learned=learned, iterations=4, warm_up=0.0, **given)
        list(game.play(1))
        return [v.numpy().tobytes() for v in game.student.snapshot().values()]

    for learned, start in ((False, "published"), (True, "reconstruct")):
        changed = student_after(learned) != student_after(learned, **{option: value})
        assert changed == (_READ_BY[option] == start)


def test_a_constant_input_is_read_as_itself_at_every_update():
    """The lineage's correction, applied in place, reads 3904 at the 20th update."""
    grid = LatentGrid(
        QParams(0.3, 0), QScheme(4, signed=False, symmetric=False), CPU, kind="ema", relative=False
    )
    grid.observe(True)
    wrong = 0.0
    for update in range(1, 60):
        grid(torch.ones(2, 3))
        wrong = (0.9 * wrong + 0.1) / (1 - 0.9**update)
        assert grid.bounds.tolist()[1] == 1.0
        assert float(grid.scale) * 15 == pytest.approx(1.0, rel=1e-6)
        if update == 20:
            assert wrong == pytest.approx(3904, rel=1e-3)


def test_ranges_follow_the_images_and_then_stay():
    graph = trained("residual")
    game = make_game(iterations=10, observe=0.4, warm_up=0.0)
    grids = [g for g in game.student.narrow_grids() if g.kind == "ema"]
    assert graph is game.teacher
    assert grids
    seen = []
    for part in game.play(10):
        assert not part.collapse
        seen.append([float(grid.scale) for grid in grids])
    assert all(a != b for a, b in zip(seen[0], seen[3], strict=True))
    assert seen[3] == seen[9]  # not followed after 4 of 10


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_optimizers_go_on_from_what_was_packed(kind):
    def make():
        weight = torch.nn.Parameter(torch.ones(3))
        return weight, (
            torch.optim.Adam([weight], lr=0.1)
            if kind == "adam"
            else torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True)
        )

    def step(weight, optimizer):
        optimizer.zero_grad()
        (weight**3).sum().backward()
        optimizer.step()

    weight, optimizer = make()
    step(weight, optimizer)
    packed, kept = pack_optimizer(optimizer), weight.detach().clone()
    step(weight, optimizer)
    other, again = make()
    with torch.no_grad():
        other.copy_(kept)
    unpack_optimizer(again, packed)
    step(other, again)
    assert torch.equal(weight, other)


def test_a_stored_part_is_read_back(tmp_path):
    part = _game.Part({"a": torch.arange(3)}, 5, True, math.nan, 1.5, 0.75, "why")
    save_part(part, tmp_path)
    back = load_part(tmp_path)
    assert back.notes() == part.notes() == {
        "iterations": 5, "shortened": True, "loss": None, "student_loss": 1.5, "evenness": 0.75,
        "collapse": "why",
    }  # fmt: skip
    assert torch.equal(back.tensors["a"], part.tensors["a"])
    assert math.isnan(back.loss)


@pytest.mark.parametrize("kind", ["twins", "one class", "not finite"])
def test_a_generator_that_collapsed_ends_the_game(kind, caplog):
    images = varied_images()
    if kind == "twins":
        images, expected = images[:20], "44 of 64 images nearly equal"
    elif kind == "one class":
        with torch.no_grad():
            images = images[trained("residual").module(images).argmax(1) == 1]
        noise = 0.3 * torch.randn(64, *images.shape[1:], generator=seeded(5))
        images, expected = images[:1] + noise, "classes in its images"
    else:
        images[3] = torch.nan
        expected = "not finite"
    game = make_game(Scripted(images), iterations=8, warm_up=0.0)
    if kind == "one class":  # a generator that never had them has not lost them
        assert game.look_at_images(0)[1] == ""
    game.evenness = 0.8  # so far
    assert expected in game.look_at_images(0)[1]
    if kind != "not finite":
        parts = list(game.play(4))
        assert len(parts) == 1
        assert expected in parts[0].collapse
        assert "the game ends after 2 iterations" in caplog.text


def test_a_generator_is_given_its_warm_up():
    game = make_game(Scripted(varied_images()[:4]), iterations=8, warm_up=0.5)
    assert [bool(part.collapse) for part in game.play(4)] == [False, False, True]


def test_good_images_are_no_collapse():
    evenness, collapse = make_game().look_at_images(0)
    assert evenness > 0.6
    assert collapse == ""


def test_the_student_does_not_learn_in_the_warm_up():
    game = make_game(iterations=10, warm_up=0.5, lr_student=1e-2)
    layers = game.student.layers.values()
    weights = [
        torch.cat([layer.latent.detach().flatten() for layer in layers]) for _ in game.play(10)
    ]
    assert torch.equal(weights[0], weights[4])
    assert not torch.equal(weights[4], weights[5])


@pytest.mark.parametrize(("left", "expected"), [(1600, 200), (400, 100)])
def test_a_warm_up_is_long_enough_in_a_game_that_time_shortens(left, expected, monkeypatch):
    """1 % of the 80,000 planned are enough, of 1600 only 200 are, and of 400 a quarter."""
    warm, observed = [], []

    class Short(Steps):
        def __init__(self, planned, seconds=None):
            super().__init__(left // 10)
            self.shortened = True

    game = make_game(iterations=80_000)
    monkeypatch.setattr(_game, "Steps", Short)
    monkeypatch.setattr(game.student, "observe", observed.append)
    monkeypatch.setattr(game, "look_at_images", lambda number: (1.0, ""))
    monkeypatch.setattr(game, "snapshot", dict)

    def iterate(fraction, learning):
        warm.append(not learning)
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(game, "_iterate", iterate)
    parts = list(game.play(10))
    assert len(warm) == left
    assert warm == [True] * expected + [False] * (left - expected)
    assert sum(observed) == expected
    assert not observed[-1]
    assert all(part.shortened for part in parts)
    for given in ("warm_up", "observe"):  # what was asked for is taken as it is
        share = {given: 0.01}
        game.options = GameOptions(**share)
        assert not game._begins(given, 0.01, 1)


def test_a_part_behind_a_shortened_one_is_of_a_shortened_game(monkeypatch):
    class Short(Steps):
        def __init__(self, planned, seconds=None):
            super().__init__(planned)
            self.shortened = seconds == 0

    times = iter([100.0, 0.0, 100.0])
    monkeypatch.setattr(_game, "Steps", Short)
    game = make_game(iterations=3, warm_up=0.0)
    assert [p.shortened for p in game.play(3, seconds=lambda: next(times))] == [False, True, True]


def test_rates_fall_at_the_milestones():
    game = make_game(iterations=8, warm_up=0.0, lr_student=0.01, milestones=(0.25, 0.75))
    rates = [game.optimizer.param_groups[0]["lr"] for _ in game.play(8)]
    assert rates == pytest.approx([0.01, 0.01] + [1e-3] * 4 + [1e-4] * 2)


def test_images_of_a_game_that_breaks_down_at_once_are_refused_with_what_to_lower():
    settings = adadfq.Options(
        iterations=8, game_batch=6, channels=8, lr_generator=1e30, lr_student=1e30
    )
    with pytest.raises(UsageError, match=r"broke down in its first part.*lr_generator"):
        adadfq.synthesize(
            trained("residual"), 4, settings, rng=torch.Generator().manual_seed(0), device=CPU
        )
