"""Bias correction of states whose biases are no longer the float ones."""

import dataclasses

import pytest
import torch

import models
import quantized
from dfqc.compiler.contracts import QuantizerSupplies
from dfqc.compiler.passes import bias
from dfqc.compiler.quantize import gptq, reconstruct
from dfqc.compiler.quantize._choice import correct_biases

HELD_OUT = models.images(16, seed=9)


def correct(graph, state, method, unfolded, **options):
    chosen = bias.Options(method=method, **options)
    return bias.correct(
        graph, unfolded, state, quantized.calib(24, seed=5), chosen, device=quantized.CPU
    )


def reconstructed(*, bits="w3a3", supplies, **options):
    graph = quantized.folded("residual")
    chosen = reconstruct.Options(iterations=6, batch_size=8, **options)
    return reconstruct.quantize(
        *(graph, quantized.calib(), quantized.plan(graph, bits), chosen),
        rng=torch.Generator().manual_seed(0), device=quantized.CPU, supplies=supplies,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["auto", "none", "analytic", "empirical", "blend"])
@pytest.mark.parametrize("variance", ["keep", "analytic"])
def test_learned_biases_are_left_alone_whatever_was_asked_for(method, variance, caplog):
    graph = quantized.folded("residual")
    state = quantized.quantize(graph, quantized.plan(graph, "w3a4"))
    learned = dataclasses.replace(state, info={**state.info, "learned_biases": True})
    found = correct(graph, learned, method, quantized.traced("residual"), variance=variance)
    info = found.info["bias_correction"]
    assert (info["method"], info["variance"]) == ("none", "keep")
    assert all(torch.equal(found.biases[name], b) for name, b in state.biases.items())
    assert all(torch.equal(found.weights[n].scale, w.scale) for n, w in state.weights.items())
    refused = method not in ("auto", "none") or variance != "keep"
    assert ("asked" in info) == refused == ("the quantizer learned the biases" in caplog.text)


@pytest.mark.parametrize("method", ["analytic", "blend", "empirical"])
def test_a_second_correction_changes_nothing(method):
    graph, unfolded = quantized.folded("residual"), quantized.traced("residual")
    state = quantized.quantize(graph, quantized.plan(graph, "w4a8"))
    once = correct(graph, state, method, unfolded)
    twice = correct(graph, once, method, unfolded)
    moved = max((once.biases[n] - state.biases[n]).abs().max() for n in state.biases)
    assert moved > 1e-3
    for name, value in once.biases.items():
        torch.testing.assert_close(twice.biases[name], value, rtol=0, atol=1e-2 * float(moved))


def test_restored_biases_are_what_an_analytic_correction_starts_from():
    graph, unfolded = quantized.folded("residual"), quantized.traced("residual")
    state = quantized.quantize(graph, quantized.plan(graph, "w4a8"))
    moved = dataclasses.replace(
        state,
        biases={name: value + 1 for name, value in state.biases.items()},
        info={**state.info, bias.RESTORED: True},
    )
    plain, found = (correct(graph, s, "analytic", unfolded) for s in (state, moved))
    for name, value in plain.biases.items():
        torch.testing.assert_close(found.biases[name], value + 1)


def test_what_was_corrected_for_its_last_codes_is_not_corrected_by_other_measurements():
    graph, unfolded = quantized.folded("residual"), quantized.traced("residual")
    state = quantized.quantize(graph, quantized.plan(graph, "w4a4"))
    supplies = QuantizerSupplies(unfolded=unfolded, bias_correction="empirical")
    once = correct_biases(graph, state, quantized.calib(24), supplies, quantized.CPU)
    assert any(not torch.equal(once.biases[name], b) for name, b in state.biases.items())
    twice = correct(graph, once, "empirical", unfolded)  # on other images
    assert twice is once
    changed = dataclasses.replace(once, info={**once.info, bias.CORRECTED: False})
    again = correct(graph, changed, "empirical", unfolded)
    assert any(not torch.equal(again.biases[name], b) for name, b in once.biases.items())


@pytest.mark.parametrize("kept", ["closed", "reconstructed"])
def test_a_build_ships_a_kept_closed_form_as_gptq_makes_it(kept, monkeypatch):
    graph, unfolded = quantized.folded("residual"), quantized.traced("residual")
    plan, calib = quantized.plan(graph, "w4a4"), quantized.calib(24)
    supplies = QuantizerSupplies(unfolded=unfolded, held_out=HELD_OUT)

    def choose(graph, states, *_):
        return states[kept], {name: float(name != kept) for name in states}

    def build(plugin, **options):
        state = plugin.quantize(
            *(graph, calib, plan, plugin.Options(**options)),
            rng=torch.Generator().manual_seed(0), device=quantized.CPU, supplies=supplies,
        )  # fmt: skip
        return bias.correct(
            *(graph, unfolded, state, calib, bias.options_of("auto")),
            device=quantized.CPU, held_out=supplies.held_out,
        )  # fmt: skip

    monkeypatch.setattr(reconstruct, "keep_best", choose)
    monkeypatch.setattr(reconstruct, "led_astray", lambda *_: ([], {}))
    found = build(reconstruct, iterations=20, tune_iterations=0, lr_bias=0.0)
    closed = build(gptq)
    assert found.info["kept"] == kept
    assert found.info[bias.CORRECTED] == (kept == "closed")
    same = all(torch.equal(found.biases[name], b) for name, b in closed.biases.items())
    assert same == (kept == "closed")


def unmarked(state):  # as if its codes had changed since its biases were corrected
    return dataclasses.replace(state, info={**state.info, bias.CORRECTED: False})


@pytest.mark.parametrize("method", ["none", "analytic", "empirical", "variance", "auto"])
def test_biases_are_corrected_as_the_recipe_says(method):
    supplies = QuantizerSupplies(
        unfolded=quantized.traced("residual"), held_out=HELD_OUT, bias_correction=method
    )
    # No unit has anything to learn.
    state = reconstructed(bits="w8a8", supplies=supplies, lr_bias=0.0)
    info = state.info["bias_correction"]
    expected = {"variance": "analytic", "auto": info["method"]}.get(method, method)
    assert info["method"] == expected
    assert ("distance" in info) == (method == "auto")
    assert info["variance"] == ("analytic" if method == "variance" else "keep")
    graph = quantized.folded("residual")
    same = all(torch.equal(b, graph.module.get_submodule(n).bias) for n, b in state.biases.items())
    assert same == (expected == "none")
    # Behind the quantizer, nothing is taken off twice and what was done stays known.
    given = (supplies.unfolded, unmarked(state), quantized.calib(), bias.options_of("none"))
    after = bias.correct(graph, *given, device=quantized.CPU).info["bias_correction"]
    assert (after["method"], after["before"]) == ("none", info)


def test_restandardized_weights_are_not_restandardized_again():
    unfolded = quantized.traced("residual")
    supplies = QuantizerSupplies(unfolded=unfolded, held_out=HELD_OUT, bias_correction="variance")
    state = reconstructed(bits="w2a8", supplies=supplies, lr_bias=0.0)
    given = (quantized.folded("residual"), unfolded, unmarked(state), quantized.calib())
    found = bias.correct(*given, bias.options_of("variance"), device=quantized.CPU)
    for name, weight in state.weights.items():
        assert torch.equal(found.weights[name].scale, weight.scale)


def test_learned_biases_tell_what_they_were_learned_from():
    supplies = QuantizerSupplies(
        unfolded=quantized.traced("residual"), held_out=HELD_OUT, bias_correction="none"
    )
    state = reconstructed(supplies=supplies, keep_best=False)
    assert state.info["learned_biases"]
    given = (quantized.folded("residual"), supplies.unfolded, state, quantized.calib())
    found = bias.correct(*given, bias.options_of("auto"), device=quantized.CPU)
    info = found.info["bias_correction"]
    assert info["reason"] == "the quantizer learned the biases"
    assert info["before"] == {"method": "none", "variance": "keep"}
