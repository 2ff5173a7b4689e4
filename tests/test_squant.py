import numpy as np
import pytest
import torch

import quantized
from dfqc.compiler import affine
from dfqc.compiler.contracts import WeightGrid
from dfqc.compiler.quantize import rtn, squant
from dfqc.compiler.quantize._ranges import weight_grid
from dfqc.compiler.spec import QScheme

SCHEMES = [QScheme(4, True, True, 0), QScheme(3, True, False, 0)]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=["symmetric", "shifted"])


def kernels(shape=(12, 20, 9), seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_t(5, shape).astype(np.float32))


def flipped(weight, scheme, method="minmax"):
    """Codes, their errors in steps, the nearest codes' errors, and the grid."""
    grid = weight_grid(weight, scheme, method)
    codes = squant.flip_codes(weight, grid)
    real = weight.double() / grid.scale.double()[:, None, None]
    nearest = affine.round_to_grid(weight, grid, 0).codes
    return codes, codes - real, nearest - real, grid


@each_scheme
@pytest.mark.parametrize("shape", [(12, 20, 9), (7, 1, 25), (5, 64, 1), (4, 3, 2)])
def test_errors_of_kernels_and_channels_cancel(scheme, shape):
    codes, error, nearest, grid = flipped(kernels(shape), scheme)
    rounding = 1e-4
    if scheme.symmetric:  # minmax covers everything: nothing is clipped
        assert error.sum((1, 2)).abs().max() <= 0.5 + rounding
        assert error.sum(2).abs().max() <= 1 + rounding
    assert error.abs().max() <= max(1.0, float(nearest.abs().max())) + rounding
    assert (codes >= grid.low[:, None, None]).all()
    assert (codes <= grid.low[:, None, None] + grid.levels - 1).all()
    assert error.sum((1, 2)).abs().mean() < 0.7 * nearest.sum((1, 2)).abs().mean()


@each_scheme
def test_a_code_moves_by_one_at_most_and_to_its_second_nearest(scheme):
    codes, error, nearest, _ = flipped(kernels(), scheme, "mse")
    moved = error - nearest
    assert set(moved.round().unique().tolist()) == {-1.0, 0.0, 1.0}
    changed = moved.abs() > 0.5
    assert (nearest[changed] * moved[changed] < 0).all()
    assert nearest[changed].abs().max() <= 0.5 + 1e-4  # clipped weights stay
    assert torch.equal(codes, codes.round())


def test_the_channel_changes_one_code_per_kernel_at_most():
    weight = kernels()
    grid = weight_grid(weight, SCHEMES[0], "minmax")
    alone = torch.stack([squant.flip_codes(weight[:, [k]], grid)[:, 0] for k in range(20)], 1)
    together = squant.flip_codes(weight, grid)
    # A kernel that is a channel of its own ends within half a step: the channel's turn is idle.
    own = (alone - weight / grid.scale[:, None, None]).sum(2)
    assert own.abs().max() <= 0.5 + 1e-4
    assert ((together - alone) != 0).sum(2).max() == 1
    assert (together - alone).abs().max() == 1


def test_pointwise_weights_flip_the_largest_errors_of_a_channel():
    steps = torch.tensor([[0.4, 1.3, 2.2, -0.9, 0.45, 3.3]])  # errors -.4 -.3 -.2 -.1 -.45 -.3
    grid = WeightGrid(torch.ones(1), torch.tensor([-8.0]), 16)
    codes = squant.flip_codes(steps[:, :, None], grid)[0, :, 0]
    assert codes.tolist() == [1.0, 1.0, 2.0, -1.0, 1.0, 3.0]  # the sum was -1.75


def test_weights_on_the_grid_stay():
    codes = torch.arange(-4.0, 4.0).view(1, 2, 4).repeat(3, 1, 1)
    scale = torch.tensor([0.5, 1.0, 0.3])
    grid = WeightGrid(scale, torch.full((3,), -4.0), 8)
    assert torch.equal(squant.flip_codes(codes * scale[:, None, None], grid), codes)


@pytest.mark.parametrize("net", ["residual", "depthwise", "transposed"])
def test_grids_and_biases_are_those_of_rtn(net):
    graph = quantized.folded(net)
    plan = quantized.plan(graph, "w4a4")
    plain = quantized.quantize(graph, plan)
    state = squant.quantize(
        graph, quantized.calib(), plan, squant.Options(),
        rng=torch.Generator(), device=quantized.CPU,
    )  # fmt: skip
    assert state.acts == plain.acts
    assert state.info["quantizer"] == "squant"
    changed = False
    for name, weight in state.weights.items():
        assert torch.equal(weight.scale, plain.weights[name].scale)
        assert torch.equal(state.biases[name], plain.biases[name])
        distance = (weight.codes.int() - plain.weights[name].codes.int()).abs()
        assert distance.max() <= 1
        changed |= bool(distance.any())
    assert changed


def test_the_mean_output_moves_less_than_with_nearest_codes():
    graph = quantized.folded("residual")
    plan = quantized.plan(graph, "w3a8")
    states = [
        module.quantize(
            graph, quantized.calib(), plan, module.Options(),
            rng=torch.Generator(), device=quantized.CPU,
        )
        for module in (rtn, squant)
    ]  # fmt: skip
    weight = graph.module.get_submodule("layer2.conv2").weight
    sums = [
        (affine.dequantize_weight(s.weights["layer2.conv2"], 0) - weight).flatten(1).sum(1)
        for s in states
    ]
    assert sums[1].abs().mean() < 0.5 * sums[0].abs().mean()
