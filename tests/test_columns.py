import dataclasses

import numpy as np
import pytest
import torch

from dfqc.compiler import affine
from dfqc.compiler.contracts import WeightGrid
from dfqc.compiler.quantize import _columns
from dfqc.compiler.quantize._columns import (
    descend,
    factorize,
    output_errors,
    refit_scales,
    round_columns,
    round_factored,
    shift_target,
)
from dfqc.compiler.quantize._ranges import weight_grid
from dfqc.compiler.spec import QScheme

SYMMETRIC = QScheme(3, True, True, 0)
SHIFTED = QScheme(2, True, False, 0)


def problem(channels=6, dim=10, groups=1, seed=0, scheme=SYMMETRIC):
    """Weights, a badly conditioned Hessian per group, and grids."""
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.standard_normal((channels, dim)))
    mixing = rng.standard_normal((groups, dim, dim)) * np.exp(rng.standard_normal((groups, 1, dim)))
    inputs = np.einsum("gij,gnj->gni", mixing, rng.standard_normal((groups, 40, dim)))
    hessian = torch.from_numpy(np.einsum("gni,gnj->gij", inputs, inputs) / 40)
    return rows, hessian, weight_grid(rows.float(), scheme, "mse")


def brute_force(row, hessian, scale, low, levels, damping, order):
    """Optimal brain quantization of one row, with an explicit inverse of what is left."""
    dim = len(row)
    damped = hessian + damping * np.trace(hessian) / dim * np.eye(dim)
    left, row = list(order), row.copy()
    codes = np.zeros(dim)
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        column = left[0]
        codes[column] = np.clip(np.rint(row[column] / scale), low, low + levels - 1)
        error = (row[column] - codes[column] * scale) / inverse[0, 0]
        row[left] -= error * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize("scheme", [SYMMETRIC, SHIFTED], ids=["symmetric", "shifted"])
@pytest.mark.parametrize("order", ["natural", "diagonal"])
@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize("groups", [1, 3])
def test_codes_are_those_of_brute_force(scheme, order, block, groups):
    rows, hessian, grid = problem(groups=groups, scheme=scheme)
    codes = round_columns(rows, hessian, grid, damping=0.02, block=block, order=order)
    assert codes.dtype == torch.int8
    for channel, row in enumerate(rows.numpy()):
        matrix = hessian[channel * groups // len(rows)].numpy()
        columns = np.arange(len(row))
        if order == "diagonal":
            columns = np.argsort(-np.diag(matrix), kind="stable")
        expected = brute_force(
            row, matrix, float(grid.scale[channel]), float(grid.low[channel]), grid.levels,
            0.02, columns,
        )  # fmt: skip
        np.testing.assert_array_equal(codes[channel], expected)


@pytest.mark.parametrize("seed", range(5))
def test_the_output_error_is_below_that_of_nearest_codes(seed):
    rows, hessian, grid = problem(channels=32, dim=40, seed=seed)
    codes = round_columns(rows, hessian, grid, damping=0.01)
    nearest = affine.round_to_grid(rows, grid, 0).codes
    found, plain = (output_errors(rows, c, hessian, grid).sum() for c in (codes, nearest))
    assert found < 0.6 * plain


def test_an_error_is_the_distance_of_the_outputs():
    rows, _, grid = problem()
    inputs = torch.from_numpy(np.random.default_rng(1).standard_normal((500, rows.shape[1])))
    codes = affine.round_to_grid(rows, grid, 0)
    hessian = (inputs.T @ inputs / len(inputs))[None]
    distance = inputs @ (rows - codes.codes.double() * codes.scale.double()[:, None]).T
    found = output_errors(rows, codes.codes, hessian, grid)
    np.testing.assert_allclose(found, distance.square().mean(0), rtol=1e-9)


@pytest.mark.parametrize("order", ["natural", "diagonal"])
def test_weights_on_the_grid_stay(order):
    rng = np.random.default_rng(2)
    codes = torch.from_numpy(rng.integers(-4, 4, (5, 12)))
    scale = torch.from_numpy(rng.uniform(0.5, 2, 5).astype(np.float32))
    grid = WeightGrid(scale, torch.full((5,), -4.0), 8)
    _, hessian, _ = problem(dim=12)
    found = round_columns(codes.float() * scale[:, None], hessian, grid, order=order)
    assert torch.equal(found.long(), codes)


def test_without_correlations_the_nearest_codes_are_best():
    rows, _, grid = problem()
    diagonal = torch.diag(torch.arange(1.0, 11.0))[None]
    codes = round_columns(rows, diagonal, grid)
    assert torch.equal(codes, affine.round_to_grid(rows, grid, 0).codes)


def test_columns_without_inputs_are_rounded_to_nearest():
    rows, hessian, grid = problem()
    hessian[:, [2, 7]] = 0
    hessian[:, :, [2, 7]] = 0
    nearest = affine.round_to_grid(rows, grid, 0).codes
    codes = round_columns(rows, hessian, grid)
    assert torch.equal(codes[:, [2, 7]], nearest[:, [2, 7]])
    assert not torch.equal(codes, nearest)
    silent = round_columns(rows, torch.zeros_like(hessian), grid)
    assert torch.equal(silent, nearest)


def test_a_singular_hessian_gets_more_damping():
    rows, _, grid = problem(dim=10)
    direction = torch.arange(1.0, 11.0, dtype=torch.float64)
    singular = torch.outer(direction, direction)
    good = torch.eye(10, dtype=torch.float64)
    factor = factorize(torch.stack((singular - 1e-3 * good, good)), 0.0, "diagonal")
    assert factor.damping[0] > 0
    assert factor.damping[1] == 0
    found = round_factored(rows, factor, grid, grid.scale[None])
    assert found.codes.shape == rows.shape
    assert found.error.isfinite().all()


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        factorize(torch.full((1, 3, 3), torch.nan), 0.01, "natural")


@pytest.mark.parametrize("order", ["natural", "diagonal"])
def test_a_factor_is_of_the_damped_hessian(order):
    _, hessian, _ = problem(groups=2)
    factor = factorize(hessian, 0.05, order)
    for matrix, columns, upper in zip(hessian, factor.order, factor.upper, strict=True):
        damped = matrix + 0.05 * matrix.diagonal().mean() * torch.eye(len(matrix)).double()
        np.testing.assert_allclose(
            upper @ upper.T, damped[columns][:, columns], rtol=1e-9, atol=1e-9
        )
        assert torch.equal(upper, upper.triu())


@pytest.mark.parametrize("groups", [1, 3])
def test_refitted_scales_are_least_squares(groups):
    rows, hessian, grid = problem(groups=groups)
    codes = affine.round_to_grid(rows, grid, 0).codes
    fitted = refit_scales(rows, codes, hessian, grid)
    for channel, (row, q) in enumerate(zip(rows.numpy(), codes.double().numpy(), strict=True)):
        root = np.linalg.cholesky(hessian[channel * groups // len(rows)].numpy()).T
        expected = np.linalg.lstsq((root @ q)[:, None], root @ row, rcond=None)[0]
        np.testing.assert_allclose(fitted.scale[channel], expected[0], rtol=1e-5)
    before, after = (output_errors(rows, codes, hessian, g) for g in (grid, fitted))
    assert (after <= before * (1 + 1e-6)).all()


@pytest.mark.parametrize("scheme", [SYMMETRIC, SHIFTED], ids=["symmetric", "shifted"])
@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize("groups", [1, 3])
def test_descended_codes_are_each_the_best_for_the_others(scheme, block, groups):
    rows, hessian, grid = problem(dim=9, groups=groups, scheme=scheme, seed=3)
    start = affine.round_to_grid(rows, grid, 0).codes
    zero = torch.zeros_like(start, dtype=torch.bool)
    zero[1, 4] = zero[2, 0] = True
    start = start.masked_fill(zero, 0)
    found = descend(rows, start, hessian, grid, sweeps=50, block=block, zero=zero)
    assert found.dtype == torch.int8
    assert (found[zero] == 0).all()
    low, high = grid.low[:, None], grid.low[:, None] + grid.levels - 1
    assert ((found >= low) & (found <= high)).all()
    error = output_errors(rows, found, hessian, grid)
    begun = output_errors(rows, start, hessian, grid)
    assert (error <= begun).all()
    assert error.sum() < 0.9 * begun.sum()
    for column in range(rows.shape[1]):
        for code in range(int(low.min()), int(high.max()) + 1):
            allowed = (low[:, 0] <= code) & (code <= high[:, 0]) & ~zero[:, column]
            tried = found.clone()
            tried[allowed, column] = code
            assert (output_errors(rows, tried, hessian, grid) >= error - 1e-9).all()


def test_one_sweep_goes_down_and_blocks_change_nothing():
    rows, hessian, grid = problem(channels=16, dim=40, seed=4)
    start = round_columns(rows, hessian, grid)
    once, more = (descend(rows, start, hessian, grid, sweeps=n) for n in (1, 3))
    errors = [output_errors(rows, codes, hessian, grid) for codes in (start, once, more)]
    assert (errors[1] <= errors[0]).all()
    assert (errors[2] <= errors[1]).all()
    assert errors[2].sum() < errors[0].sum()
    for block in (1, 7, 40):
        blocked = descend(rows, start, hessian, grid, sweeps=3, block=block)
        assert torch.equal(blocked, more)


def test_columns_without_inputs_keep_their_codes():
    rows, hessian, grid = problem()
    hessian[:, [2, 7]] = 0
    hessian[:, :, [2, 7]] = 0
    start = affine.round_to_grid(rows, grid, 0).codes
    found = descend(rows, start, hessian, grid, sweeps=3)
    assert torch.equal(found[:, [2, 7]], start[:, [2, 7]])
    assert not torch.equal(found, start)


def test_scales_that_cannot_be_fitted_stay():
    rows, hessian, grid = problem(channels=3)
    codes = affine.round_to_grid(rows, grid, 0).codes
    codes[0] = 0
    codes[1] *= -1
    fitted = refit_scales(rows, codes, hessian, grid, 10 * grid.scale)
    assert torch.equal(fitted.scale, 10 * grid.scale)
    free = refit_scales(rows, codes, hessian, grid)
    assert torch.equal(free.scale[:2], grid.scale[:2])


@pytest.mark.parametrize("order", ["natural", "diagonal"])
def test_shifted_targets_are_least_squares_on_the_quantized_inputs(order):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 300, 7)) @ rng.standard_normal((7, 7))
    q = np.round(x * 2) / 2 + 0.1
    rows = torch.from_numpy(rng.standard_normal((4, 7)))
    hessian, cross = (torch.from_numpy(np.einsum("gni,gnj->gij", a, q) / 300) for a in (q, x))
    found = shift_target(rows, factorize(hessian, 0.0, order), cross, hessian)
    for group in range(2):
        own = rows[2 * group : 2 * group + 2].numpy()
        expected = np.linalg.lstsq(q[group], x[group] @ own.T, rcond=None)[0].T
        np.testing.assert_allclose(found[2 * group : 2 * group + 2], expected, rtol=1e-8)
    same = shift_target(rows, factorize(hessian, 0.1, order), hessian, hessian)
    assert torch.equal(same, rows)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("at_once", [1, 1 << 23])
def test_of_several_scales_every_channel_gets_the_one_with_the_least_error(
    groups, at_once, monkeypatch
):
    monkeypatch.setattr(_columns, "_AT_ONCE", at_once)  # one scale after the other; all together
    rows, hessian, grid = problem(groups=groups)
    zero = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    factor = factorize(hessian, 0.02, "diagonal")
    scales = torch.tensor([[1.0], [0.7], [1.3], [0.7]]) * grid.scale
    alone = []
    for scale in scales:
        trial = dataclasses.replace(grid, scale=scale)
        codes = round_columns(rows, hessian, trial, damping=0.02, zero=zero)
        alone.append((output_errors(rows, codes, factor.hessian, trial), codes))
    best = torch.stack([error for error, _ in alone]).argmin(0)  # of equal ones the first
    assert len(set(best.tolist())) > 1
    found = round_factored(rows, factor, grid, scales, zero=zero)
    for channel, number in enumerate(best.tolist()):
        error, codes = alone[number]
        assert torch.equal(found.codes[channel], codes[channel])
        assert found.scale[channel] == scales[number, channel]
        torch.testing.assert_close(found.error[channel], error[channel])
