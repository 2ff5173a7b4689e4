from types import SimpleNamespace

import pytest

import models
from dfqc.backends import ort
from dfqc.compiler.estimate import estimate, narrow_share
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.plan import make_plan
from dfqc.compiler.recipe import make_recipe
from dfqc.compiler.spec import parse_bits
from dfqc.compiler.stages import model_facts


@pytest.fixture(scope="module")
def graph():
    return models.trace_tiny("residual")


def rows(graph, data=None, **flags):
    job = SimpleNamespace(recipe=make_recipe({"model": "net.pt", **flags}))
    found = estimate(job, graph, model_facts(graph), data or {}, seconds_per_image=0.01)
    return {row.stage: row for row in found}


def test_synthesis_costs_a_forward_and_backward_pass_per_iteration(graph):
    options = {"samples": 32, "synth_option": ["iterations=50"]}
    assert rows(graph, **options)["synthesize"].seconds == pytest.approx(32 * 50 * 3 * 0.01)
    assert rows(graph, synth="noise", samples=32)["synthesize"].seconds == 0


def test_every_net_of_a_zoo_is_passed_and_half_resolution_costs_a_quarter(graph):
    def seconds(**flags):
        return rows(graph, samples=32, **flags)["synthesize"].seconds

    one = {"synth": "mixmix", "synth_option": ["iterations=50"]}
    assert seconds(**one) == pytest.approx(32 * 50 * 3 * 0.01)
    assert seconds(**one, zoo="timm:a,timm:b,timm:c,timm:d") == pytest.approx(3 * seconds(**one))
    low = {"synth": "deepinversion", "synth_option": ["iterations=50", "low_res=0.5"]}
    assert seconds(**low) == pytest.approx(32 * (25 + 25 / 4) * 3 * 0.01)


@pytest.mark.parametrize("samples", [64, 256, 1024])
def test_a_game_is_played_once_whatever_the_number_of_images(graph, samples):
    options = {"synth": "adadfq", "synth_option": ["iterations=1000"], "samples": samples}
    game = 2.7 * 1000 * 16 * 3 * 0.01
    found = rows(graph, **options)["synthesize"].seconds
    assert found == pytest.approx(game)


def test_warm_batches_take_their_share(graph):
    def seconds(generator):
        options = [f"generator={generator}", "iterations=50", "batch_size=16", "warm_share=0.25"]
        return rows(graph, synth="genie", synth_option=options, samples=64)["synthesize"].seconds

    assert seconds("fresh") == pytest.approx(64 * 50 * 3 * 0.01)
    assert seconds("warm") == pytest.approx(16 * (1 + 3 * 0.25) * 50 * 3 * 0.01)


def test_more_samples_take_longer_and_larger_batches_more_memory(graph):
    few, many = rows(graph, samples=32), rows(graph, samples=64)
    assert many["quantize"].seconds > few["quantize"].seconds
    small = rows(graph, synth_option=["batch_size=8"])["synthesize"].peak_bytes
    large = rows(graph, synth_option=["batch_size=64"])["synthesize"].peak_bytes
    activations = 4 * model_facts(graph)["activations"]
    own = 16 * 3 * 16 * 16  # zeroq: an image, its gradient and Adam's two moments
    assert large - small == 56 * (int(1.3 * activations) + own)


def test_labelled_images_are_counted(graph):
    without, given = rows(graph), rows(graph, {"eval": {"images": 1000}})
    added = given["evaluate"].seconds - without["evaluate"].seconds
    assert added == pytest.approx(4 * 1000 * 0.01)


def test_the_facts_of_a_net(graph):
    facts = model_facts(graph)
    assert facts["params"] == sum(p.numel() for p in models.build("residual").parameters())
    assert (facts["layers"], facts["classes"], facts["batch_norm"]) == (7, 10, True)
    assert facts["image"]["size"] == (3, 16, 16)
    assert model_facts(models.trace_tiny("no_norm"))["batch_norm"] is False


def test_choosing_bits_costs_half_a_pass_per_layer_and_width(graph):
    assert "allocate" not in rows(graph, samples=32)
    seconds = rows(graph, samples=32, avg_bits=4.0)["allocate"].seconds
    assert rows(graph, samples=32, sensitivity=True)["allocate"].seconds == seconds
    assert seconds == pytest.approx(32 * 7 * 5 / 2 * 0.01)
    assert rows(graph, samples=256, avg_bits=4.0)["allocate"].seconds == pytest.approx(2 * seconds)
    assert rows(graph, samples=32, size="1m")["allocate"].seconds > seconds + 4


def test_units_with_8_bits_learn_nothing_and_cost_nothing(graph):
    def seconds(narrow, **flags):
        job = SimpleNamespace(recipe=make_recipe({"model": "net.pt", "samples": 64, **flags}))
        found = estimate(job, graph, model_facts(graph), {}, narrow, seconds_per_image=0.01)
        return next(row.seconds for row in found if row.stage == "quantize")

    none, half, every = (seconds(share) for share in (0.0, 0.5, 1.0))
    assert 5 * none < half < every
    # The published loops learn them too.
    assert seconds(0.5, quantizer="brecq") == seconds(1.0, quantizer="brecq")


def test_the_share_of_narrow_layers_counts_weights_and_activations(graph):
    def share(bits, free=()):
        plan = make_plan(fold(graph), ort.TARGET, parse_bits(bits), [], ends=parse_bits("w8a8"))
        return narrow_share(plan, free)

    layers = make_plan(fold(graph), ort.TARGET, parse_bits("w8a8"), [], ends=None).layers
    assert share("w8a8") == 0
    assert share("w4a8") == pytest.approx((len(layers) - 2) / len(layers))
    assert 0 < share("w8a4") < 1
    assert share("w8a8", free=tuple(layers)[:1]) == pytest.approx(1 / len(layers))


def test_a_limit_on_memory_is_kept_by_the_estimate(graph):
    large = {"samples": 1024, "effort": "quick"}
    free, bound = (rows(graph, **large, memory=memory) for memory in ("64g", "100m"))
    assert bound["quantize"].peak_bytes < free["quantize"].peak_bytes
