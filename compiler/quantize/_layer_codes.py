"""The codes of one layer, channel by channel the best of several: weights and moments in.

Tried are ranges around the one that loses least of the weights, each with the errors of earlier
columns compensated; what is best of them is improved code by code.
"""

from __future__ import annotations

import dataclasses

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dfqc.compiler import affine
from dfqc.compiler.contracts import WeightGrid
from dfqc.compiler.quantize._columns import (
    Order,
    Rounded,
    descend,
    factorize,
    output_errors,
    refit_scales,
    round_factored,
    shift_target,
)
from dfqc.compiler.quantize._hessian import SecondMoments

_RATIOS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15)  # tried of a channel's scale
_PLENTY = 255  # levels that are enough as they are


class Rounding(BaseModel):
    """How the columns of a layer are rounded; `gptq` has more options beside these."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    damping: float = Field(0.1, ge=0, description="parts of the Hessian's mean diagonal")
    shift_damping: float = Field(0.5, ge=0, description="the same, for what `asymmetric` adds")
    block_size: int = Field(128, ge=1)
    order: Order = "diagonal"
    refits: int = Field(0, ge=0, description="rounds of best scales for given codes")
    search: bool = Field(True, description="below 8 bits, try other scales per channel")
    sweeps: int = Field(3, ge=0, description="below 8 bits, rounds of coordinate descent")


def round_weight(
    rows: Tensor, moments: SecondMoments, grid: WeightGrid, least: Tensor | None, options: Rounding
) -> tuple[Tensor, WeightGrid]:
    """Return codes (channels, dim) int8 and their grid, channel by channel the best tried.

    Tried are the nearest codes, the compensated ones, those on refitted and, below 8 bits, on other
    scales; what is best of them descends code by code.

    Args:
        rows: (channels, dim) float weights; those that are exactly zero (pruned) stay zero.
        moments: of the input.
        grid: to round on.
        least: smallest scale per channel.
        options: damping, order, search and the like.
    """
    grid = dataclasses.replace(grid, scale=grid.scale.to(rows), low=grid.low.to(rows))
    least = None if least is None else least.to(rows)
    zero = rows == 0
    factor = factorize(moments.quantized, options.damping, options.order)
    target = rows
    if moments.cross is not None:
        drawn = factorize(moments.quantized, options.shift_damping, options.order)
        target = shift_target(rows, drawn, moments.cross, moments.quantized)

    def rounded(codes: Tensor, scale: Tensor) -> Rounded:
        trial = dataclasses.replace(grid, scale=scale)
        return Rounded(codes, scale, output_errors(target, codes, factor.hessian, trial))

    def compensated(scales: Tensor) -> Rounded:
        scales = scales if least is None else torch.maximum(scales, least)
        return round_factored(target, factor, grid, scales, block=options.block_size, zero=zero)

    few = grid.levels < _PLENTY
    nearest = affine.round_to_grid(target, grid, 0).codes.masked_fill(zero, 0)
    ratios = grid.scale.new_tensor((1.0, *(_RATIOS if few and options.search else ())))
    best = rounded(nearest, grid.scale).better(compensated(ratios[:, None] * grid.scale))
    for _ in range(options.refits):
        start = dataclasses.replace(grid, scale=best.scale)
        scale = refit_scales(target, best.codes, factor.hessian, start, least).scale
        best = best.better(rounded(best.codes, scale)).better(compensated(scale[None]))
    grid = dataclasses.replace(grid, scale=best.scale)
    if few and options.sweeps:
        lower = descend(
            *(target, best.codes, factor.hessian, grid),
            sweeps=options.sweeps,
            block=options.block_size,
            zero=zero,
        )
        best = best.better(rounded(lower, best.scale))
    return best.codes, grid
