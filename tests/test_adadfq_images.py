"""The images that AdaDFQ makes, and its game as a source of them: killed, resumed, out of time."""

import pytest
import torch

from checkpoints import Store
from classifiers import trained
from dfqc.calib import adadfq
from dfqc.calib._player import Player
from dfqc.compiler.contracts import CalibSet, Supplies
from dfqc.compiler.graph import Graph
from dfqc.compiler.quantize._game import Game
from dfqc.compiler.quantize._game_options import GameOptions
from models import IMAGE

CPU = torch.device("cpu")
QUICK = {"iterations": 8, "game_batch": 6, "channels": 8, "batch_size": 8}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_player(net: str = "residual", **options: object) -> Player:
    chosen = GameOptions(**({"game_batch": 6, "channels": 8} | options))
    return Player(trained(net), chosen, rng=seeded(), device=CPU)


def make(graph: Graph, count: int = 8, supplies=None, seed: int = 0, **options) -> CalibSet:
    settings = adadfq.Options(**(QUICK | options))
    return adadfq.synthesize(
        graph, count, settings, rng=seeded(seed), device=CPU, supplies=supplies or Supplies()
    )


def test_images_have_the_labels_asked_for_and_valid_pixels():
    labels = torch.tensor([3, 3, 1, 0, 9, 9, 2])
    made = make(trained("residual"), 7, Supplies(labels=labels))
    assert torch.equal(made.labels, labels)
    low, high = IMAGE.pixel_range()
    assert made.images.shape == (7, *IMAGE.size)
    assert made.images.min() >= low - 1e-4
    assert made.images.max() <= high + 1e-4
    assert made.info["iterations"] == 8
    assert 0 <= made.info["in_bounds"] <= 1


def test_the_generator_learns_classes_and_statistics():
    player = make_player(game_batch=16, channels=32)
    plain, seen = player.terms, []

    def terms(*arguments):
        found = plain(*arguments)
        seen.append([float(term.detach()) for term in found])
        return found

    player.terms = terms
    for _ in range(70):
        player.step(lambda images: 0.5 * player.teacher(images)[1], 1.0)
    first, last = (torch.tensor(part).mean(0) for part in (seen[:5], seen[-10:]))
    _, disagreement, agreement, statistics = (last / first).tolist()
    assert disagreement < 0.9
    assert agreement < 0.9
    assert statistics < 0.5


def test_the_next_batch_is_drawn_by_the_same_generator():
    graph = trained("plain")
    first = make(graph)
    second = make(graph, supplies=Supplies(carry=first.carry), seed=1)
    assert second.info["iterations"] == 0
    assert not torch.equal(first.images, second.images)
    for name, value in first.carry.items():
        if name.startswith("generator/"):
            assert torch.equal(second.carry[name], value)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_killed_game_goes_on_behind_its_last_part(tmp_path, parts):
    graph, options = trained("plain"), {"iterations": 10, "observe": 1.0}
    whole = make(graph, **options)
    store = Store(tmp_path, fail_after=parts)
    with pytest.raises(KeyboardInterrupt):
        make(graph, supplies=Supplies(checkpoint=store), **options)
    store.fail_after = None
    for made in (5, 5):  # the second time, every part is found
        resumed = make(graph, supplies=Supplies(checkpoint=store), **options)
        assert store.made == made
        assert torch.equal(whole.images, resumed.images)
        assert torch.equal(whole.labels, resumed.labels)
        assert whole.info == resumed.info
        assert {k: v.numpy().tobytes() for k, v in whole.carry.items()} == {
            k: v.numpy().tobytes() for k, v in resumed.carry.items()
        }


def test_the_game_leaves_the_time_that_drawing_takes(monkeypatch):
    seen = []
    play = Game.play

    def spy(self, parts, *, seconds, **more):
        seen.append(seconds())
        return play(self, parts, seconds=seconds, **more)

    monkeypatch.setattr(Game, "play", spy)
    monkeypatch.setattr(adadfq, "_time_drawing", lambda *_: 0.5)  # seconds an image
    graph = trained("plain")
    for following in (0, 32, 1000):  # 8 more are this batch's own
        make(graph, supplies=Supplies(seconds=100.0, following=following))
    for expected, found in zip((100 - 0.6 * 8, 100 - 0.6 * 40, 50), seen, strict=True):
        assert expected - 10 < found <= expected


def test_timing_the_drawing_leaves_no_trace():
    player = make_player()
    settings = adadfq.Options(**QUICK)
    game = adadfq._set_up(trained("residual"), player, settings, 0, CPU)
    before = {k: v.numpy().tobytes() for k, v in game.snapshot().items()}
    assert adadfq._time_drawing(player, game, settings) > 0
    assert before == {k: v.numpy().tobytes() for k, v in game.snapshot().items()}


def test_less_time_is_fewer_iterations():
    made = make(trained("plain"), iterations=100_000, supplies=Supplies(seconds=0.5))
    assert made.info["shortened"]
    assert made.info["iterations"] < 2000


def test_more_candidates_leave_more_images_in_the_bounds():
    graph = trained("residual")
    one, many = (make(graph, 32, candidates=n, lambda_l=0.5).info["in_bounds"] for n in (1, 6))
    assert many >= one
    assert many > 0


def test_bfloat16_changes_little_and_keeps_the_type():
    made = make(trained("plain"), precision="bfloat16")
    assert made.images.dtype == torch.float32
    assert torch.isfinite(made.images).all()
