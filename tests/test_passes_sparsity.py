import numpy as np
import pytest
import torch
from torch import nn

import models
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import layer_nodes, verify
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.passes.sparsity import apply_masks, mask_n_of_m, mask_smallest
from functions import Function


def weight(graph, path):
    return graph.module.get_submodule(path).weight.detach()


def test_per_layer_drops_the_smallest_of_each():
    graph = fold(models.trace_tiny("plain"))
    masks = mask_smallest(graph, 0.5)
    assert list(masks.keep) == [path for path, _ in layer_nodes(graph)]
    assert not masks.left
    for path, keep in masks.keep.items():
        values = weight(graph, path).abs().numpy()
        limit = np.sort(values, axis=None)[values.size // 2]
        assert keep.shape == values.shape
        np.testing.assert_array_equal(keep.numpy(), values >= limit)


def test_globally_one_threshold_for_all():
    graph = fold(models.trace_tiny("plain"))
    keep = mask_smallest(graph, 0.3, scope="global").keep
    every = np.concatenate([weight(graph, path).abs().numpy().ravel() for path in keep])
    limit = np.sort(every)[int(0.3 * every.size)]
    for path, mask in keep.items():
        np.testing.assert_array_equal(mask.numpy(), weight(graph, path).abs().numpy() >= limit)
    shares = [float(mask.float().mean()) for mask in keep.values()]
    assert max(shares) - min(shares) > 0.05  # unlike one fraction for each


def test_equal_weights_still_lose_exactly_the_fraction():
    graph = models.trace_tiny("no_norm")
    graph.module.conv1.weight.data.fill_(0.5)
    assert int((~mask_smallest(graph, 0.25).keep["conv1"]).sum()) == 8 * 27 // 4


def test_skipped_layers_stay_dense_and_say_so():
    graph = models.trace_tiny("no_norm")
    for masks in (
        mask_smallest(graph, 0.5, skip=("conv1",)),
        mask_smallest(graph, 0.5, scope="global", skip=("conv1",)),
        mask_n_of_m(graph, skip=("conv1",)),
    ):
        assert "conv1" not in masks.keep
        assert masks.left["conv1"] == "left out on request"


def test_two_of_four_along_the_input_axis():
    graph = fold(models.trace_tiny("residual"))
    masks = mask_n_of_m(graph)
    values, keep = weight(graph, "layer2.conv1").abs(), masks.keep["layer2.conv1"]
    out, inputs, height, width = values.shape
    for o, h, w in np.ndindex(out, height, width):
        for start in range(0, inputs, 4):
            four = values[o, start : start + 4, h, w]
            chosen = keep[o, start : start + 4, h, w]
            assert int(chosen.sum()) == 2
            assert four[chosen].min() >= four[~chosen].max()
    # The stem reads three channels.
    assert masks.left == {"conv1": "3 input channels are no multiple of 4"}
    assert masks.keep["head.fc"].reshape(10, 4, 4).sum(2).eq(2).all()


def test_layers_without_sparse_kernels_stay_dense():
    left = mask_n_of_m(models.trace_tiny("depthwise")).left
    assert left["depthwise.0"] == "a depthwise or grouped convolution"
    assert mask_n_of_m(models.trace_tiny("grouped")).left["grouped"] == left["depthwise.0"]
    transposed = mask_n_of_m(models.trace_tiny("transposed")).left
    assert transposed["up"] == transposed["group"] == "a transposed convolution"


def test_other_patterns():
    def forward(module, x):
        return module.fc(x.mean((2, 3)))

    graph = models.trace_module(Function(forward, fc=nn.Linear(3, 2)))
    graph.module.fc.weight.data.copy_(torch.tensor([[3.0, -4.0, 1.0], [0.0, 0.0, -0.1]]))
    assert mask_n_of_m(graph, 1, 3).keep["fc"].tolist() == [
        [False, True, False],
        [False, False, True],
    ]
    assert mask_n_of_m(graph, 2, 3).keep["fc"].tolist() == [
        [True, True, False],
        [True, False, True],
    ]


def test_applied_masks_are_zeros_and_nothing_else_changes():
    graph = fold(models.trace_tiny("residual"))
    before = {path: weight(graph, path).clone() for path, _ in layer_nodes(graph)}
    masks = mask_n_of_m(graph)
    sparse = apply_masks(graph, masks.keep)
    verify(sparse, "test")
    for path, dense in before.items():
        keep = masks.keep.get(path, torch.ones_like(dense, dtype=torch.bool))
        assert torch.equal(weight(sparse, path), torch.where(keep, dense, 0.0))
        assert torch.equal(weight(graph, path), dense)  # the input is as it was
    x = models.images()
    assert not torch.allclose(sparse.module(x), graph.module(x))
    whole = {path: torch.ones_like(w, dtype=torch.bool) for path, w in before.items()}
    assert torch.equal(apply_masks(graph, whole).module(x), graph.module(x))


def test_wrong_requests_are_refused():
    graph = models.trace_tiny("no_norm")
    with pytest.raises(UsageError, match="from 0 to below 1"):
        mask_smallest(graph, 1.0)
    with pytest.raises(UsageError, match="4:2"):
        mask_n_of_m(graph, 4, 2)
    with pytest.raises(ValueError, match="no such layer"):
        apply_masks(graph, {"conv9": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"mask of \(1,\)"):
        apply_masks(graph, {"conv1": torch.ones(1, dtype=torch.bool)})
