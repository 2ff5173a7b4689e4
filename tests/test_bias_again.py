"""Bias correction of states whose biases are no longer the float ones."""

import dataclasses

import pytest
import torch

import quantized
from dfqc.compiler.passes import bias


def correct(graph, state, method, unfolded, **options):
    chosen = bias.Options(method=method, **options)
    return bias.correct(
        graph, unfolded, state, quantized.calib(24, seed=5), chosen, device=quantized.CPU
    )


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
