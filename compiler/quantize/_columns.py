"""Column-wise rounding with error compensation: weights, their Hessian and grids in, codes out.

The columns of a weight are rounded one after the other, and what is still to be rounded takes up
the error made so far (OBQ, Frantar and Alistarh 2022; in a fixed order GPTQ, Frantar et al.
2023). With H = R R^T, R upper triangular, the error is (w - q) H (w - q)^T = |R^T (w - q)|^2, so
column i is best rounded from w_i + sum_{j<i} R_ji (w_j - q_j) / R_ii: the same numbers as
GPTQ's, without an inverse. What one pass in one order has left is then improved code by code
(cyclic coordinate descent, Behdin et al., QuantEase, 2023).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dfqc.compiler import affine
from dfqc.compiler.contracts import WeightGrid

Order = Literal["natural", "diagonal"]
RETRIES = 8  # each with ten times the damping


@dataclass(frozen=True)
class Factor:
    """A damped Hessian, ready for rounding, per group.

    Attributes:
        hessian: damped, (groups, dim, dim) float64, columns in their own order.
        order: the columns in the order they are rounded, (groups, dim).
        upper: R of hessian = R R^T with its columns in that order, (groups, dim, dim) float64.
        damping: what was added to the diagonal, in parts of its mean, (groups,).
    """

    hessian: Tensor
    order: Tensor
    upper: Tensor
    damping: Tensor


def round_columns(
    rows: Tensor,
    hessian: Tensor,
    grid: WeightGrid,
    *,
    damping: float = 0.01,
    block: int = 128,
    order: Order = "diagonal",
    zero: Tensor | None = None,
) -> Tensor:
    """Return the codes of a weight, (channels, dim) int8.

    Args:
        rows: (channels, dim); consecutive channels form the groups.
        hessian: E[x x^T] of each group's input, (groups, dim, dim).
        grid: one grid per channel.
        damping: added to the diagonal, in parts of its mean.
        block: columns whose feedback is applied one by one; that of earlier ones is one product.
        order: `diagonal` rounds the columns with the largest inputs first.
        zero: (channels, dim), True where the code must be 0.
    """
    factor = factorize(hessian, damping, order)
    return round_factored(rows, factor, grid, block=block, zero=zero)


def factorize(hessian: Tensor, damping: float, order: Order) -> Factor:
    """Damp and factor Hessians (groups, dim, dim); columns without inputs stay by themselves.

    A Hessian that is not positive definite in float64 gets ten times the damping, and again.
    """
    hessian = hessian.double()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    columns = torch.arange(hessian.shape[1], device=hessian.device).expand_as(diagonal)
    if order == "diagonal":
        columns = diagonal.sort(dim=1, descending=True, stable=True).indices
    parts = torch.full_like(mean, damping)
    for _ in range(RETRIES):
        damped = hessian + torch.diag_embed((parts * mean)[:, None].expand_as(diagonal))
        # The factor of the matrix read backwards, itself read backwards, is upper triangular.
        turned = _permuted(damped, columns.flip(1))
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not failed.any():
            return Factor(damped, columns, lower.flip(1, 2), parts)
        parts = torch.where(failed > 0, (10 * parts).clamp_min(1e-8), parts)
    raise ValueError("a Hessian is not positive definite, whatever its damping: it is not finite")


def round_factored(
    rows: Tensor,
    factor: Factor,
    grid: WeightGrid,
    *,
    block: int = 128,
    zero: Tensor | None = None,
) -> Tensor:
    """Return the codes of a weight, (channels, dim) int8; arguments as `round_columns` has them.

    A code that must be 0 takes up nothing of the error so far, and what is missing there is passed
    on like any other error (SparseGPT, Frantar and Alistarh 2023, for a given mask).
    """
    groups, dim = factor.order.shape
    order = factor.order[:, None, :].expand(groups, len(rows) // groups, dim)
    wanted = rows.view(groups, -1, dim).gather(2, order)
    held = None if zero is None else zero.view(groups, -1, dim).gather(2, order)
    # R_ji / R_ii at (j, i): what column i takes up of the error of column j.
    feedback = (factor.upper / factor.upper.diagonal(dim1=1, dim2=2)[:, None, :]).to(wanted.dtype)
    scale, low = (v.to(wanted).view(groups, -1) for v in (grid.scale, grid.low))
    codes, error = torch.empty_like(wanted), torch.zeros_like(wanted)
    for start in range(0, dim, block):
        stop = min(start + block, dim)
        carried = error[:, :, :start] @ feedback[:, :start, start:stop]
        inner = feedback[:, start:stop, start:stop]
        for i in range(start, stop):
            at = i - start
            own = (error[:, :, start:i] @ inner[:, :at, at : at + 1]).squeeze(2)
            target = wanted[:, :, i] + carried[:, :, at] + own
            chosen = affine.nearest_codes(target, scale, low, grid.levels)
            if held is not None:
                chosen = chosen.masked_fill(held[:, :, i], 0)
            codes[:, :, i] = chosen
            error[:, :, i] = wanted[:, :, i] - chosen * scale
    result = torch.empty_like(codes).scatter_(2, order, codes)
    return result.view_as(rows).to(torch.int8)


def descend(
    rows: Tensor,
    codes: Tensor,
    hessian: Tensor,
    grid: WeightGrid,
    *,
    sweeps: int,
    block: int = 128,
    zero: Tensor | None = None,
) -> Tensor:
    """Return codes (channels, dim) int8 with no larger error, each the best for all the others.

    With e = w - q and g = e H, column i is best rounded from q_i + g_i / H_ii (QuantEase, section
    3); as in `round_factored`, columns beyond a block learn of its changes by one product.

    Args:
        rows: (channels, dim) weights.
        codes: (channels, dim), rounded on `grid`.
        hessian: damped, (groups, dim, dim).
        grid: one per channel.
        sweeps: most passes through the columns; it ends where none changes a code.
        block: columns whose changes are applied one by one.
        zero: (channels, dim), True where the code must be 0.
    """
    found = codes.double().view(len(hessian), -1, codes.shape[1])
    dim = found.shape[2]
    held = None if zero is None else zero.view_as(found)
    scale, low = (v.to(found).view(len(hessian), -1) for v in (grid.scale, grid.low))
    error = rows.double().view_as(found) - found * scale[:, :, None]
    # Where nothing comes in, the gradient is 0 as well, and the code stays.
    diagonal = hessian.diagonal(dim1=1, dim2=2).clamp_min(1e-300)
    for _ in range(sweeps):
        before, gradient = found.clone(), error @ hessian
        for start in range(0, dim, block):
            stop = min(start + block, dim)
            own = gradient[:, :, start:stop]
            inner = hessian[:, start:stop, start:stop]
            change = torch.zeros_like(own)
            for i in range(stop - start):
                old = found[:, :, start + i].clone()
                target = old * scale + own[:, :, i] / diagonal[:, None, start + i]
                chosen = affine.nearest_codes(target, scale, low, grid.levels)
                if held is not None:
                    chosen = chosen.masked_fill(held[:, :, start + i], 0)
                change[:, :, i] = (old - chosen) * scale
                own += change[:, :, i, None] * inner[:, None, i]
                found[:, :, start + i] = chosen
            gradient[:, :, stop:] += change @ hessian[:, start:stop, stop:]
            error[:, :, start:stop] += change
        if torch.equal(found, before):
            break
    return found.view_as(codes).to(torch.int8)


def refit_scales(
    rows: Tensor, codes: Tensor, hessian: Tensor, grid: WeightGrid, least: Tensor | None = None
) -> WeightGrid:
    """Return the grid with the scales that are best for given codes: (w H q) / (q H q).

    Args:
        rows: (channels, dim) weights.
        codes: (channels, dim), rounded on `grid`.
        hessian: (groups, dim, dim).
        grid: keeps its place where the codes are all zero or the best scale is not positive.
        least: smallest scale per channel.
    """
    q = codes.double().view(len(hessian), -1, codes.shape[1])
    weighted = q @ hessian
    fit = (weighted * rows.double().view_as(q)).sum(2).flatten()
    norm = (weighted * q).sum(2).flatten()
    scale = (fit / norm.clamp_min(1e-300)).float()
    scale = torch.where((norm > 0) & (scale > affine.SMALLEST_SCALE), scale, grid.scale.to(scale))
    if least is not None:
        scale = torch.maximum(scale, least.to(scale))
    return dataclasses.replace(grid, scale=scale)


def output_errors(rows: Tensor, codes: Tensor, hessian: Tensor, grid: WeightGrid) -> Tensor:
    """Return (w - q) H (w - q)^T of every channel, (channels,) float64."""
    error = rows.double() - codes.double() * grid.scale.to(rows.device).double()[:, None]
    error = error.view(len(hessian), -1, codes.shape[1])
    return ((error @ hessian) * error).sum(2).flatten()


def shift_target(rows: Tensor, factor: Factor, cross: Tensor, hessian: Tensor) -> Tensor:
    """Return the weights that, on quantized inputs, come nearest to the float layer's output.

    W + W (E[x q^T] - E[q q^T]) (E[q q^T] + damping)^-1: the least-squares weights, drawn to W
    (not to zero) by the damping.

    Args:
        rows: (channels, dim).
        factor: of `hessian`.
        cross: E[x q^T], (groups, dim, dim).
        hessian: E[q q^T], undamped.
    """
    groups, dim = factor.order.shape
    moved = rows.double().view(groups, -1, dim) @ (cross - hessian)
    order = factor.order[:, None, :].expand_as(moved)
    half = torch.linalg.solve_triangular(factor.upper, moved.gather(2, order).mT, upper=True)
    solved = torch.linalg.solve_triangular(factor.upper.mT, half, upper=False).mT
    delta = torch.empty_like(moved).scatter_(2, order, solved)
    return rows + delta.reshape_as(rows).to(rows)


def _permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """Return (groups, dim, dim) matrices with rows and columns in another order."""
    rows = matrix.gather(1, order[:, :, None].expand_as(matrix))
    return rows.gather(2, order[:, None, :].expand_as(matrix))
