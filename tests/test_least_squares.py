import numpy as np
import pytest
import torch
from torch import nn

import models
from dfqc.compiler.channels import find_groups, remove
from dfqc.compiler.graph import count_params
from dfqc.compiler.passes import _least_squares
from dfqc.compiler.passes._least_squares import refit
from dfqc.compiler.passes.restore import Options, restore

IMAGES = models.images(32)


def outputs(graph, images):
    with torch.no_grad():
        return graph.module(images)


def distance(graph, reference, images):
    wanted = outputs(reference, images)
    return float((outputs(graph, images) - wanted).norm() / (wanted - wanted.mean(0)).norm())


def kept_rows(graph, keep):
    groups = {g.name: g for g in find_groups(graph)}
    return {
        path: channels
        for name, channels in keep.items()
        for path in groups[name].producers + groups[name].through
    }


def test_a_linear_layer_gets_the_least_squares_solution():
    torch.manual_seed(0)
    graph = models.trace_module(nn.Sequential(nn.Flatten(), nn.Linear(768, 6)))
    pruned = models.trace_module(nn.Sequential(nn.Flatten(), nn.Linear(768, 6)))
    (path,) = [n for n, m in pruned.module.named_modules() if isinstance(m, nn.Linear)]
    layer = pruned.module.get_submodule(path)
    mask = torch.zeros(6, 768, dtype=torch.bool)
    for row in range(6):
        mask[row, 40 * row : 40 * row + 50] = True
    layer.weight.data *= mask
    images = models.images(400)
    fitted = refit(graph, pruned, images, outputs={}, masks={path: mask}, ridge=1e-9)
    found = fitted.module.get_submodule(path)
    x = images.flatten(1).double().numpy()
    y = outputs(graph, images).double().numpy()
    for row in range(6):
        columns = mask[row].numpy()
        design = np.concatenate([x[:, columns], np.ones((400, 1))], 1)
        solution = np.linalg.lstsq(design, y[:, row], rcond=None)[0]
        assert np.allclose(found.weight[row, mask[row]].numpy(), solution[:-1], atol=1e-5)
        assert float(found.bias[row]) == np.float32(solution[-1]).item() or np.isclose(
            float(found.bias[row]), solution[-1], atol=1e-5
        )
        assert (found.weight[row, ~mask[row]] == 0).all()


def test_a_pruned_network_comes_nearer_and_stays_small():
    for net in ("plain", "residual", "depthwise", "no_norm"):
        graph = models.trace_tiny(net)
        keep = {
            g.name: torch.arange(1, g.size)
            for g in find_groups(graph)
            if g.prunable and not g.residual
        }
        assert keep
        pruned = remove(graph, keep)
        fitted = refit(graph, pruned, IMAGES, outputs=kept_rows(graph, keep))
        assert count_params(fitted) <= count_params(pruned) + 200  # biases at most
        fresh = models.images(32, seed=5)
        assert distance(fitted, graph, fresh) < 0.8 * distance(pruned, graph, fresh), net


def test_it_does_not_matter_what_was_done_to_the_norms_before():
    graph = models.trace_tiny("residual")
    keep = {
        g.name: torch.arange(1, g.size) for g in find_groups(graph) if g.prunable and not g.residual
    }
    rows = kept_rows(graph, keep)
    plain = refit(graph, remove(graph, keep), IMAGES, outputs=rows, ridge=1e-7)
    start = restore(graph, keep, Options())
    restored = refit(graph, start, IMAGES, outputs=rows, ridge=1e-7)
    assert distance(start, plain, IMAGES) > 0.05
    assert distance(restored, plain, IMAGES) < 0.01


def test_an_unpruned_network_stays_as_it_is():
    graph = models.trace_tiny("residual")
    fitted = refit(graph, graph, IMAGES, outputs={})
    assert distance(fitted, graph, IMAGES) < 1e-4


def test_masked_weights_stay_zero_in_every_layer():
    graph = models.trace_tiny("depthwise")
    pruned = models.trace_tiny("depthwise")
    masks = {}
    for path, module in pruned.module.named_modules():
        if isinstance(module, nn.Conv2d):
            size = module.weight.abs().flatten().quantile(0.5)
            masks[path] = module.weight.abs() > size
            module.weight.data *= masks[path]
    fitted = refit(graph, pruned, IMAGES, outputs={}, masks=masks)
    for path, mask in masks.items():
        assert (fitted.module.get_submodule(path).weight[~mask] == 0).all()
    fresh = models.images(32, seed=5)
    assert distance(fitted, graph, fresh) < 0.8 * distance(pruned, graph, fresh)


@pytest.mark.parametrize("ridge", [1e-2, 1e-1])
def test_wide_rows_are_solved_by_iterations_to_the_same(ridge, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 48, generator=rng, dtype=torch.float64)
    rows *= torch.logspace(-1.5, 1.5, 48, dtype=torch.float64)
    inner = (rows.T @ rows / 400).unsqueeze(0)
    missing = torch.randn(1, 9, 48, generator=rng, dtype=torch.float64)
    mask = torch.rand(1, 9, 48, generator=rng) < 0.5
    mask[0, 3] = False  # a row that must stay zero
    direct = _least_squares._solve(inner, missing, ridge, mask)
    monkeypatch.setattr(_least_squares, "_DIRECT", 0)
    found = _least_squares._solve(inner, missing, ridge, mask)
    assert (found[~mask] == 0).all()
    torch.testing.assert_close(found, direct, rtol=1e-4, atol=1e-6)
