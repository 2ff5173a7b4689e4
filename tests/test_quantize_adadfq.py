"""The quantizer that plays: what the game leaves, how it stops, goes on and is judged."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import models
import quantized
from checkpoints import Store
from classifiers import trained
from command import build, run
from dfqc.compiler import stage_keys
from dfqc.compiler.contracts import QuantizerSupplies
from dfqc.compiler.errors import UnsupportedError, UsageError
from dfqc.compiler.options import plugin_options
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.quantize import _game, adadfq
from dfqc.compiler.quantize._choice import judging_parts
from dfqc.compiler.quantize._game_options import resolve
from dfqc.compiler.recipe import make_recipe
from dfqc.compiler.simulate import simulated

CPU = torch.device("cpu")
FEW = {"iterations": 12, "parts": 3, "game_batch": 6, "channels": 8, "start_iterations": 4}
HELD_OUT = models.images(16, seed=9)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def supplies_of(net: str = "residual", **more: object) -> QuantizerSupplies:
    return QuantizerSupplies(unfolded=trained(net), held_out=HELD_OUT, **more)


def play(net="residual", bits="w3a3", *, supplies=None, seed=0, progress=None, **options):
    graph = fold(trained(net))
    more = {} if progress is None else {"progress": progress}
    return adadfq.quantize(
        graph, quantized.calib(), quantized.plan(graph, bits, ends=None),
        adadfq.Options(**(FEW | options)), rng=seeded(seed), device=CPU,
        supplies=supplies or supplies_of(net), **more,
    )  # fmt: skip


def same(first, second):
    return (
        first.acts == second.acts
        and all(torch.equal(w.codes, second.weights[n].codes) for n, w in first.weights.items())
        and all(torch.equal(w.scale, second.weights[n].scale) for n, w in first.weights.items())
        and all(torch.equal(b, second.biases[n]) for n, b in first.biases.items())
    )


def divergence(state, images=HELD_OUT, net="residual"):
    """Mean KL of the softmax to the float network's, in float64."""
    with torch.no_grad():
        wanted = trained(net).module(images).double().log_softmax(1)
        found = simulated(fold(trained(net)), state, integer=False).module(images)
    return float((wanted.exp() * (wanted - found.double().log_softmax(1))).sum(1).mean())


# --- what is learned


@pytest.mark.parametrize("start", ["published", "reconstruct"])
def test_the_last_state_and_those_on_the_way_are_judged(start):
    state = play(start=start, keep_best=False)
    found = state.info["heldout_distance"]
    on_the_way = [part["distance"] for part in state.info["parts"]]
    assert (found["trained"], found["best"]) == (on_the_way[-1], min(on_the_way))
    assert state.info["last"] == state.info["parts"][-1]
    assert (state.info["kept"], state.info["start"]) == ("trained", start)
    assert state.info["learned_biases"]
    assert [part["iterations"] for part in state.info["parts"]] == [4, 4, 4]
    assert state.info["game"]["lambda_l"] == 0.1


def test_the_published_student_is_rounded_to_the_extremes_of_its_weights():
    state = play(bits="w4a4", keep_best=False)
    for layer in state.plan.layers.values():
        codes = state.weights[layer.name].codes.flatten(1).int()
        # min-max, symmetric: each channel reaches the largest code.
        assert (codes.abs().amax(1) >= layer.weight.quant_max).all()


def test_adasg_is_adadfq_with_its_constants():
    special = play(method="adasg", keep_best=False)
    assert same(special, play(alpha_ds=0.1, lambda_l=0.3, keep_best=False))
    assert not same(special, play(keep_best=False))


@pytest.mark.parametrize("count", [1, 5])
def test_any_batch_size_plays(count):
    state = play(game_batch=count, iterations=4, parts=1, keep_best=False)
    assert (state.info["iterations"], state.info["kept"]) == (4, "trained")
    assert math.isfinite(divergence(state))


def test_without_batch_norms_images_match_labels_alone(caplog):
    graph = fold(models.trace_tiny("no_norm"))
    plan = quantized.plan(graph, "w4a4")
    state = adadfq.quantize(
        graph, quantized.calib(), plan, adadfq.Options(**FEW), rng=seeded(), device=CPU
    )
    assert "no batch norms" in caplog.text
    assert set(state.weights) == set(plan.layers)


def test_a_network_without_classes_is_refused_before_any_work():
    class Single(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = models.conv_bn(3, 4), models.Head(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(x))

    graph = quantized.fold_module(Single())
    with pytest.raises(UnsupportedError, match="another --quantizer"):
        adadfq.quantize(
            graph, quantized.calib(), quantized.plan(graph), adadfq.Options(),
            rng=seeded(), device=CPU,
        )  # fmt: skip


# --- the same again


def test_equal_seeds_give_equal_results_and_others_do_not():
    first = play(keep_best=False)
    assert same(first, play(keep_best=False))
    assert not same(first, play(seed=1, keep_best=False))


@pytest.mark.parametrize("start", ["published", "reconstruct"])
def test_a_killed_game_goes_on_behind_its_last_part(tmp_path, start):
    (tmp_path / "whole").mkdir()
    store = Store(tmp_path / "whole")
    whole = play(start=start, supplies=supplies_of(checkpoint=store), keep_best=False)
    fail = store.made - 1  # in the last part of the game
    assert fail >= 2
    store = Store(tmp_path, fail_after=fail)
    supplies = supplies_of(checkpoint=store)
    with pytest.raises(KeyboardInterrupt):
        play(start=start, supplies=supplies, keep_best=False)
    store.fail_after = None
    resumed = play(start=start, supplies=supplies, keep_best=False)
    assert store.made == fail + 1
    assert same(whole, resumed)
    assert whole.info["heldout_distance"] == resumed.info["heldout_distance"]
    assert whole.info["parts"] == resumed.info["parts"]


def test_little_time_shortens_the_game_and_its_schedule_and_says_so():
    state = play(iterations=100_000, supplies=supplies_of(seconds=2.0), keep_best=False)
    assert state.info["shortened"]
    assert 3 <= state.info["iterations"] < 5000
    assert len(state.info["parts"]) == 3  # the whole schedule was gone through
    assert not play().info["shortened"]


def test_progress_ends_at_its_total():
    seen = []
    play(progress=lambda *report: seen.append(report))
    game = [r for r in seen if r[2].startswith("generator")]
    assert [r[:2] for r in game] == [(n, 12) for n in range(1, 13)]


# --- what is kept, and when it stops


def test_a_student_that_no_longer_tells_anything_ends_the_game(caplog):
    found = iter([1.0, 0.5, 0.4, 4.1])
    student = SimpleNamespace(state=lambda: None)
    contest = adadfq._Contest(
        SimpleNamespace(student=student), lambda state: next(found), None, 2.0
    )
    for number in range(3):
        contest.add(_game.Part({}, 1, False, 0.0, 0.0))
        assert bool(contest.collapse) == (number == 2)
    assert "the student collapsed" in caplog.text
    assert contest.distances == {"start": 1.0, "trained": 4.1, "best": 0.4}


def test_the_start_is_kept_where_the_game_is_worse(caplog):
    state = play(lr_student=3.0, warm_up=0.0, iterations=30)
    assert state.info["kept"] == "start"
    assert "its start, which is kept" in caplog.text
    assert not state.info["learned_biases"]
    assert math.isfinite(divergence(state))


def test_the_kept_state_is_the_nearest_on_images_that_were_held_out():
    state = play()
    distances = state.info["heldout_distance"]
    assert distances[state.info["kept"]] == min(distances.values())
    # Every fourth calibration image, and moved; none of the game's was shown to it.
    own, moved = judging_parts(quantized.calib().images[3::4], QuantizerSupplies())
    expected = math.sqrt(divergence(state, own) * divergence(state, moved))
    assert distances[state.info["kept"]] == pytest.approx(expected, rel=1e-3)


def test_a_loss_that_is_no_number_ends_the_game(caplog):
    state = play(lr_student=1e30, warm_up=0.0, iterations=40, parts=4)
    assert state.info["collapsed"]
    assert "the game ends" in caplog.text
    assert len(state.info["parts"]) < 4
    assert state.info["kept"] == "start"
    assert math.isfinite(divergence(state))


# --- options that a start does not read


@pytest.mark.parametrize("effort", ["quick", "standard", "max"])
@pytest.mark.parametrize(
    ("start", "name", "value", "reads"),
    [
        ("published", "start_iterations", 300, "reconstruct"),
        ("published", "lr_latent", 2e-3, "reconstruct"),
        ("published", "lr_steps", 2e-3, "reconstruct"),
        ("reconstruct", "lr_student", 1e-3, "published"),
        ("reconstruct", "momentum", 0.5, "published"),
        ("reconstruct", "weight_decay", 0.0, "published"),
        ("reconstruct", "observe", 0.5, "published"),
    ],
)
def test_options_that_a_start_does_not_read_are_refused(effort, start, name, value, reads):
    wanted = rf"adadfq: {name} is read by start={reads} only, got start={start}: leave it out"
    with pytest.raises(UsageError, match=wanted):
        plugin_options(adadfq, "adadfq", effort, {"start": start, name: value})
    assert plugin_options(adadfq, "adadfq", effort, {"start": reads, name: value})
    # What a preset or a default says is no wish of the user's.
    default = adadfq.Options.model_fields[name].default
    assert plugin_options(adadfq, "adadfq", effort, {"start": start, name: default})
    assert plugin_options(adadfq, "adadfq", effort, {"start": start, "parts": 3})


# --- estimates, presets, the engine


def test_estimates_grow_with_the_game():
    graph = fold(trained("residual"))
    small, large = (adadfq.Options(iterations=n) for n in (100, 1000))
    assert adadfq.count_passes(large, 64) > 5 * adadfq.count_passes(small, 64)
    start = adadfq.Options(iterations=100, start="reconstruct")
    assert adadfq.count_passes(start, 64) > adadfq.count_passes(small, 64)
    assert adadfq.count_bytes(small, graph, 64) > 4 * 100 * 128 * 16


def test_max_is_as_published():
    options = plugin_options(adadfq, "adadfq", "max", {})
    assert (options.start, options.iterations) == ("published", 80_000)
    assert resolve(options, (3, 32, 32)).observe == 4 / 400


GAME = ("iterations=6", "game_batch=4", "channels=8", "parts=2", "start_iterations=3")


def test_a_build_plays_twice_and_its_engine_agrees(shared, capsys):
    options = [w for o in GAME for w in ("--quantizer-option", o)]
    options += [w for o in GAME[:3] for w in ("--synth-option", o)]
    manifest = build(
        capsys, shared, "--quantizer", "adadfq", "--synth", "adadfq", *options, "--bits", "w4a4"
    )
    assert manifest["parity"]["argmax_agreement"] == 100
    assert manifest["recipe"]["quantizer"] == "adadfq"
    assert (manifest["calib"]["method"], manifest["calib"]["images"]) == ("adadfq", 8)


def test_later_batches_are_drawn_by_the_first_ones_generator(shared, capsys):
    options = [w for o in (*GAME[:3], "batch_size=10") for w in ("--synth-option", o)]
    done = run(
        capsys, shared, "synth", *shared.weights(), "--method", "adadfq", *options, "--samples",
        "20", "--threads", "1", "-o", shared.root / "drawn.npz", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["images"] == 20


def test_images_whose_game_was_killed_are_those_of_a_whole_one(workspace, capsys, monkeypatch):
    options = [w for o in ("iterations=10", *GAME[1:3]) for w in ("--synth-option", o)]
    played, kill_at = [], 2
    play = _game.Game._play_part

    def part(self, steps, number, *rest):
        if number == kill_at:
            raise KeyboardInterrupt
        played.append(number)
        return play(self, steps, number, *rest)

    def synth(name, *more):
        return run(
            capsys, workspace, "synth", *workspace.weights(), "--method", "adadfq", *options,
            "--samples", "12", "--threads", "1", "-o", workspace.root / name, "--json", *more,
        )  # fmt: skip

    monkeypatch.setattr(_game.Game, "_play_part", part)
    assert synth("drawn.safetensors").code == 130
    kill_at = None
    done = synth("drawn.safetensors", "--budget", "1h")  # time enough: parts are the same
    assert done.code == 0, done.err
    assert played == [0, 1, 2, 3, 4]
    shutil.rmtree(workspace.cache)
    assert synth("whole.safetensors").code == 0
    assert played == [0, 1, 2, 3, 4] * 2
    first, second = ((workspace.root / f"{n}.safetensors").read_bytes() for n in ("drawn", "whole"))
    assert first == second


def test_a_change_of_the_generator_makes_old_results_void():
    recipe = make_recipe({"model": "timm:resnet18", "quantizer": "adadfq"})
    assert "dfqc.calib.adadfq" in stage_keys.quantizer(SimpleNamespace(recipe=recipe))
    recipe = make_recipe({"model": "timm:resnet18", "quantizer": "rtn"})
    assert not any("calib." in m for m in stage_keys.quantizer(SimpleNamespace(recipe=recipe)))
