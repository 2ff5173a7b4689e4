"""SQuant: nearest codes, then flips that cancel the sum of errors in kernels and channels.

In: a folded graph, calibration images (for activation ranges only; `acts=bn` takes them from batch
norms) and a plan. Out: a `QuantState`, in milliseconds: no data and no Hessian are needed for the
weights (Guo et al. 2022, sections 3.2 and 3.3: an expected Hessian whose off-diagonal entries are
equal within a kernel, and within a channel, makes the sums of errors count).
"""

from __future__ import annotations

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from dfqc.compiler import affine
from dfqc.compiler.contracts import (
    CalibSet,
    Progress,
    QTensor,
    QuantizerSupplies,
    QuantState,
    WeightGrid,
    silent,
)
from dfqc.compiler.graph import Graph
from dfqc.compiler.quantize import _given, rtn
from dfqc.compiler.spec import Plan


class Options(rtn.Options):
    """Options of SQuant: the range estimators of round-to-nearest."""

    model_config = ConfigDict(frozen=True, extra="forbid")


PRESETS: dict[str, dict[str, object]] = {"quick": {}, "standard": {}, "max": {}}
check_given = _given.check_given("squant", _given.RANGES)
count_passes, count_bytes = rtn.count_passes, rtn.count_bytes


def quantize(
    graph: Graph,
    calib: CalibSet,
    plan: Plan,
    options: Options,
    *,
    rng: torch.Generator,
    device: torch.device,
    progress: Progress = silent,
    supplies: QuantizerSupplies = QuantizerSupplies(),
) -> QuantState:
    """Choose grids as `rtn` does, then round and flip every weight.

    Args:
        graph: folded graph.
        calib: images (n, c, h, w) in normalized space, for activation ranges.
        plan: what each layer and tensor gets.
        options: range estimators.
        rng: unused, nothing here is random.
        device: where the images are run through the graph.
        progress: called per batch.
        supplies: `unfolded` for `acts=bn`.

    Raises:
        UsageError: of `rtn.activation_grids`.
    """
    del rng
    graph.module.to(device)
    acts, notes = rtn.activation_grids(
        *(graph, calib, plan, options, supplies.unfolded), device=device, progress=progress
    )
    weights, biases = {}, {}
    for layer in plan.layers.values():
        if layer.weight is None:
            continue
        module = graph.module.get_submodule(layer.name)
        grid = rtn.layer_grid(module, layer, acts, options.weights)
        weights[layer.name] = _round_layer(module, grid, layer.weight.axis or 0)
        bias = rtn.layer_bias(module)
        if bias is not None:
            biases[layer.name] = bias
    return QuantState(plan, weights, biases, acts, {"quantizer": "squant", **notes})


def _round_layer(module: nn.Module, grid: WeightGrid, axis: int) -> QTensor:
    """Return one layer's codes; a transposed convolution has its channels on another axis."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    real = weight.detach().cpu().float().movedim(axis, 0)
    kernels = real.flatten(2) if real.dim() > 2 else real[:, :, None]
    codes = flip_codes(kernels, grid).view(real.shape).movedim(0, axis)
    return QTensor(codes.contiguous().to(torch.int8), grid.scale)


def flip_codes(kernels: Tensor, grid: WeightGrid) -> Tensor:
    """Return codes (channels, kernels, size) as floats for weights of that shape.

    Where no weight is clipped, the errors of a channel sum to at most half a step. Those of a
    kernel do so before the channel's turn, and to at most one step after it: a channel changes
    one code per kernel. Weights beyond the grid count in the sums, but stay where they are.
    """
    scale, low = (affine.channel_view(v, kernels.dim(), 0) for v in (grid.scale, grid.low))
    real = kernels / scale
    codes = affine.nearest_codes(kernels, scale, low, grid.levels)
    clipped = (real < low) | (real > low + (grid.levels - 1))
    if kernels.shape[2] > 1:
        codes = _flip(real, codes, clipped)
    error = codes - real
    total = error.sum(2)
    # Per kernel, the code that is farthest off on the side of the channel's sum.
    sign = total.sum(1).sign()[:, None, None]
    farthest = torch.where(clipped, -torch.inf, error * sign).argmax(2, keepdim=True)
    nominee = [v.gather(2, farthest).movedim(2, 1) for v in (real, codes, clipped)]
    # A kernel whose own sum points the other way would be driven beyond one step.
    against = (total[:, None, :] * sign <= 0) if kernels.shape[2] > 1 else nominee[2]
    flipped = _flip(nominee[0], nominee[1], nominee[2] | against, error.sum((1, 2))[:, None])
    return codes.scatter(2, farthest, flipped.movedim(1, 2))


def _flip(real: Tensor, codes: Tensor, fixed: Tensor, total: Tensor | None = None) -> Tensor:
    """Move the codes that are farthest off to the other side until their errors sum to <= 1/2.

    Sums run over the last dimension; `total` replaces them, `fixed` codes do not move.
    """
    error = codes - real
    total = error.sum(-1) if total is None else total
    count = total.abs().round()[..., None]
    sign = total.sign()[..., None]
    movable = ~fixed & (error * sign > 0)
    score = torch.where(movable, error * sign, -torch.inf)
    rank = score.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    return torch.where(movable & (rank < count), codes - sign, codes)
