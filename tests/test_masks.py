"""Weights that are exactly zero in the folded graph are code 0 whatever rounds them."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

import models
import quantized
from dfqc.compiler import affine, plugins
from dfqc.compiler.contracts import Pruned, QuantizerSupplies
from dfqc.compiler.graph import layer_nodes
from dfqc.compiler.options import plugin_options
from dfqc.compiler.passes.sparsity import Masks, apply_masks, mask_n_of_m, mask_smallest
from dfqc.compiler.quantize import gptq
from dfqc.compiler.quantize._columns import output_errors, round_columns
from dfqc.compiler.quantize._ranges import weight_grid
from dfqc.compiler.simulate import simulated
from dfqc.compiler.spec import QScheme

CPU = torch.device("cpu")
FEW = {"iterations": 6, "batch_size": 8}
TUNED = {"tune_iterations": 4, "tune_rounding": 0.05}
METHODS = {
    "rtn": {},
    "squant": {},
    "gptq": {},
    "udfc": {},
    "reconstruct": FEW | TUNED | {"lr_rounding": 0.5},
    "adaround": FEW | {"lr_rounding": 0.5},
    "qat": FEW | {"start": "rtn", "lr_weights": 0.05},
}
PATTERNS = ("2:4", "unstructured")
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)
each_net = pytest.mark.parametrize("net", ["residual", "depthwise"])


@functools.cache
def sparse(net, pattern):
    """A folded net with masks, one output of a masked layer entirely zero; and the masks."""
    graph = quantized.folded(net)
    masks = mask_n_of_m(graph) if pattern == "2:4" else mask_smallest(graph, 0.5)
    keep = {path: mask.clone() for path, mask in masks.keep.items()}
    path = next(p for p, _ in layer_nodes(graph) if p in keep)
    keep[path][1] = False
    return apply_masks(graph, keep), Masks(keep, masks.left)


def run(graph, name, bits="w4a8", *, unfolded=None, unpruned=None, **options):
    plugin = plugins.load("quantizer", name)
    state = plugin.quantize(
        *(graph, quantized.calib(), quantized.plan(graph, bits)),
        plugin_options(plugin, name, "quick", options),
        rng=torch.Generator().manual_seed(0),
        device=CPU,
        supplies=QuantizerSupplies(
            unfolded=unfolded, unpruned=unpruned, held_out=models.images(16, seed=9)
        ),
    )
    with torch.inference_mode():
        assert simulated(graph, state, integer=False).module(models.images()).isfinite().all()
    return state


def check(state, masks):
    """Masked codes are 0, and not only those."""
    assert masks.keep
    for path, mask in masks.keep.items():
        codes = state.weights[path].codes
        assert (codes[~mask] == 0).all(), path
        assert (codes[mask] != 0).float().mean() > 0.5, path
        assert (state.weights[path].scale > 0).all()


@each_pattern
@each_net
@pytest.mark.parametrize("name", METHODS)
def test_zeros_survive_every_quantizer(name, net, pattern):
    graph, masks = sparse(net, pattern)
    check(run(graph, name, unfolded=quantized.traced(net), **METHODS[name]), masks)


@pytest.mark.parametrize("rounding", ["soft", "flex"])
@pytest.mark.parametrize("start", ["nearest", "closed"])
def test_zeros_survive_learning_that_moves_codes(rounding, start):
    graph, masks = sparse("residual", "2:4")
    options = FEW | TUNED | {"lr_rounding": 1.0, "keep_best": False, "iterations": 20}
    state = run(
        *(graph, "reconstruct", "w3a8"),
        **options,
        unfolded=quantized.traced("residual"),
        rounding=rounding,
        start=start,
    )
    check(state, masks)
    notes = [row["notes"] for row in state.info["units"] if "learned" in row["notes"]]
    assert max(note["learned"]["flipped"] for note in notes) > 0.01


def test_options_of_two_papers_keep_zeros_too():
    graph, masks = sparse("residual", "unstructured")
    check(run(graph, "gptq", hessian="bn", refits=2, unfolded=quantized.traced("residual")), masks)
    check(run(graph, "udfc", rounding="squant", compensate="users"), masks)


def test_offsets_per_channel_hold_zero():
    graph, masks = sparse("residual", "2:4")
    plan = quantized.plan(graph, "w3a8")
    shifted = {
        name: dataclasses.replace(layer, weight=QScheme(3, True, False, 0))
        for name, layer in plan.layers.items()
    }
    plan = dataclasses.replace(plan, layers=shifted)
    state = gptq.quantize(
        *(graph, quantized.calib(), plan, gptq.Options()), rng=torch.Generator(), device=CPU
    )
    check(state, masks)


def test_what_is_learned_is_the_original_and_not_the_sparse_network():
    whole, (graph, masks) = quantized.traced("residual"), sparse("residual", "unstructured")
    images = models.images(64, seed=3)
    with torch.no_grad():
        wanted = whole.module(images)
    errors = []
    for unpruned in (None, Pruned(whole, {})):
        state = run(
            *(graph, "reconstruct", "w8a8"),
            unpruned=unpruned,
            iterations=40,
            lr_bias=1e-2,
            batch_size=8,
            skip_wide=False,
            tune_iterations=20,
            keep_best=False,
        )
        check(state, masks)
        with torch.no_grad():
            found = simulated(graph, state, integer=False).module(images)
        errors.append(float((found - wanted).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_joint_closed_form_puts_back_what_masks_took_from_the_mean():
    """One layer on the images that the moments suppose; its original has no masks."""
    whole, (graph, masks) = quantized.traced("plain"), sparse("plain", "unstructured")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (whole.image.mean, whole.image.std))
    images = (0.45 - mean) / std + 0.225 / std * models.images(256)
    exact = quantized.folded("plain").module.get_submodule("stem.0")
    wanted = exact(images).mean((0, 2, 3)).detach()
    errors = {}
    for fix in (False, True):
        state = run(
            *(graph, "udfc", "w8a8"),
            unpruned=Pruned(whole, {}),
            mean_fix=fix,
            variance_fix=False,
        )
        check(state, masks)
        weight = affine.dequantize_weight(state.weights["stem.0"], 0)
        found = torch.nn.functional.conv2d(
            images, weight, state.biases["stem.0"], exact.stride, exact.padding
        )
        errors[fix] = float((found.mean((0, 2, 3)) - wanted).abs().max())
    assert errors[True] < 0.1 * errors[False]


@each_pattern
def test_export_holds_the_zeros(tmp_path, pattern):
    graph, masks = sparse("residual", pattern)
    state = run(graph, "gptq", "w4a8")
    case = quantized.lower(graph, state, tmp_path)
    seen = 0
    for layer in case.planned():
        if layer.name not in masks.keep:
            continue
        name = case.layer_node(layer).input[1]
        while name not in case.constants:  # DequantizeLinear, Cast of packed codes
            name = case.producer(name).input[0]
        stored = case.array(name).astype(np.int8)
        mask = masks.keep[layer.name].numpy()
        stored = stored.reshape(mask.shape) if stored.shape == mask.shape else stored.T
        assert (stored[~mask] == 0).all(), layer.name
        assert np.array_equal(stored, state.weights[layer.name].codes.numpy())
        seen += 1
    assert seen == len(masks.keep)


def problem(seed=0, outputs=24, dim=36):
    """Correlated inputs' second moments, masked rows and their grid."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(400, dim, generator=rng, dtype=torch.float64).cumsum(1)
    rows = torch.randn(outputs, dim, generator=rng)
    zero = torch.rand(outputs, dim, generator=rng) < 0.5
    hessian = (x.mT @ x / len(x))[None]
    return rows, zero, hessian, weight_grid(rows, QScheme(4, True, True, 0), "mse")


def test_a_mask_known_while_rounding_beats_one_put_on_afterwards():
    rows, zero, hessian, grid = problem()
    for given in (rows, rows.masked_fill(zero, 0)):  # masks that cost something, or nothing yet
        known = round_columns(given, hessian, grid, zero=zero)
        after = round_columns(given, hessian, grid).masked_fill(zero, 0)
        assert (known[zero] == 0).all()
        errors = [output_errors(given, codes, hessian, grid).sum() for codes in (known, after)]
        assert errors[0] < 0.7 * errors[1]
        nearest = affine.round_to_grid(given, grid, 0).codes.masked_fill(zero, 0)
        assert errors[0] < output_errors(given, nearest, hessian, grid).sum()


def test_without_masks_nothing_changes():
    rows, zero, hessian, grid = problem()
    dense = torch.zeros_like(zero)
    assert torch.equal(
        round_columns(rows, hessian, grid), round_columns(rows, hessian, grid, zero=dense)
    )
