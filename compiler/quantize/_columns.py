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
_AT_ONCE = 1 << 23  # weights, of all scales that are tried together


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


@dataclass(frozen=True)
class Rounded:
    """Codes of a weight (channels, dim) int8, with the scale and the error of every channel.

    The error is (w - q) H (w - q)^T with the damped Hessian, float64.
    """

    codes: Tensor
    scale: Tensor
    error: Tensor

    def better(self, other: Rounded) -> Rounded:
        """Return, channel by channel, what has the smaller error; of equal ones, the first."""
        better = other.error < self.error
        return Rounded(
            torch.where(better[:, None], other.codes, self.codes),
            torch.where(better, other.scale, self.scale),
            torch.where(better, other.error, self.error),
        )


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
    return round_factored(rows, factor, grid, grid.scale[None], block=block, zero=zero).codes


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
    scales: Tensor,
    *,
    block: int = 128,
    zero: Tensor | None = None,
) -> Rounded:
    """Round every channel on each of several scales, and keep its best.

    A code that must be 0 takes up nothing of the error so far, and what is missing there is passed
    on like any other error (SparseGPT, Frantar and Alistarh 2023, for a given mask).

    Args:
        rows: (channels, dim); consecutive channels form the groups.
        factor: of the groups' Hessians.
        grid: lowest codes and levels.
        scales: (trials, channels); of equal ones the first is kept.
        block: see `round_columns`.
        zero: (channels, dim), True where the code must be 0.
    """
    at_once = max(1, _AT_ONCE // rows.numel())
    parts = [_round_trials(rows, factor, grid, p, block, zero) for p in scales.split(at_once)]
    best = parts[0]
    for part in parts[1:]:
        best = best.better(part)
    return best


def _round_trials(
    rows: Tensor, factor: Factor, grid: WeightGrid, scales: Tensor, block: int, zero: Tensor | None
) -> Rounded:
    """Round as `round_factored` does, all scales in one go through the columns."""
    groups, dim = factor.order.shape
    trials, width = len(scales), len(rows) // groups
    order = factor.order[:, None, :].expand(groups, width, dim)
    # Column by column: (groups, dim, channels), so that what belongs to a column lies together.
    wanted = rows.view(groups, -1, dim).gather(2, order).mT.contiguous()
    held = None
    if zero is not None and bool(zero.any()):
        held = zero.view(groups, -1, dim).gather(2, order).mT.contiguous()
    diagonal = factor.upper.diagonal(dim1=1, dim2=2)
    # R_ji / R_ii at (i, j): what column i takes up of the error of column j.
    feedback = (factor.upper / diagonal[:, None, :]).mT.to(wanted.dtype).contiguous()
    scale = scales.to(wanted).view(trials, groups, width).transpose(0, 1)
    low = grid.low.to(wanted).view(groups, 1, width)
    error = wanted.new_zeros(groups, dim, trials, width)
    codes = torch.empty_like(error, dtype=torch.int8)
    found = diagonal.new_zeros(groups, trials, width)
    flat = error.view(groups, dim, trials * width)
    for start in range(0, dim, block):
        stop = min(start + block, dim)
        carried = (feedback[:, start:stop, :start] @ flat[:, :start]).view_as(error[:, start:stop])
        missed = torch.empty_like(carried)
        for i in range(start, stop):
            own = (feedback[:, i : i + 1, start:i] @ flat[:, start:i]).view_as(scale)
            target = wanted[:, i, None] + carried[:, i - start] + own
            chosen = affine.nearest_codes(target, scale, low, grid.levels)
            if held is not None:
                chosen = chosen.masked_fill(held[:, i, None], 0)
            codes[:, i] = chosen
            value = chosen * scale
            torch.sub(wanted[:, i, None], value, out=error[:, i])
            torch.sub(target, value, out=missed[:, i - start])
        # (R^T (w - q))_i is what is missing at column i, times R_ii: the error without H.
        weight = diagonal[:, start:stop, None, None]
        found += (missed.double() * weight).square().sum(1)
    best = found.argmin(1, keepdim=True)
    kept = codes.gather(2, best[:, None].expand(groups, dim, 1, width)).squeeze(2).mT
    result = torch.empty_like(kept, memory_format=torch.contiguous_format)
    result.scatter_(2, order, kept)
    return Rounded(
        result.view_as(rows),
        scales.to(wanted).gather(0, best.transpose(0, 1).reshape(1, -1)).squeeze(0),
        found.gather(1, best).flatten(),
    )


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

    With e = w - q and g = H e, column i is best rounded from q_i + g_i / H_ii (QuantEase, section
    3); a block's gradient is one product, and within it a change is passed on one by one.

    Args:
        rows: (channels, dim) weights.
        codes: (channels, dim), rounded on `grid`.
        hessian: damped, (groups, dim, dim).
        grid: one per channel.
        sweeps: most passes through the columns; it ends where none changes a code.
        block: columns whose changes are applied one by one.
        zero: (channels, dim), True where the code must be 0.
    """
    shape = (len(hessian), -1, codes.shape[1])
    # Column by column: (groups, dim, channels), so that what belongs to a column lies together.
    found = codes.double().view(shape).mT.contiguous()
    held = None if zero is None or not bool(zero.any()) else zero.view(shape).mT.contiguous()
    scale, low = (v.to(found).view(len(hessian), -1) for v in (grid.scale, grid.low))
    error = rows.double().view(shape).mT.contiguous() - found * scale[:, None]
    # Where nothing comes in, the gradient is 0 as well, and the code stays.
    diagonal = hessian.diagonal(dim1=1, dim2=2).clamp_min(1e-300)
    for _ in range(sweeps):
        before = found.clone()
        for start in range(0, found.shape[1], block):
            part = hessian[:, start : start + block]
            gradient = part @ error
            changes = torch.empty_like(gradient)
            for at in range(gradient.shape[1]):
                i = start + at
                own = (part[:, at : at + 1, start:i] @ changes[:, :at]).squeeze(1)
                own += gradient[:, at]
                target = found[:, i] * scale + own / diagonal[:, i, None]
                chosen = affine.nearest_codes(target, scale, low, grid.levels)
                if held is not None:
                    chosen = chosen.masked_fill(held[:, i], 0)
                torch.mul(found[:, i] - chosen, scale, out=changes[:, at])
                found[:, i] = chosen
            error[:, start : start + block] += changes
        if torch.equal(found, before):
            break
    return found.mT.reshape(codes.shape).to(torch.int8)


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
