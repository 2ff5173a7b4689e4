"""Round to nearest with calibrated ranges: the baseline that every heavier method must beat.

In: a folded graph, calibration images and a plan. Out: a `QuantState`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from dfqc.compiler import affine
from dfqc.compiler.contracts import (
    CalibSet,
    Progress,
    QParams,
    QTensor,
    QuantizerSupplies,
    QuantState,
    WeightGrid,
    silent,
)
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph
from dfqc.compiler.quantize import _given
from dfqc.compiler.quantize._norm_ranges import norm_histograms
from dfqc.compiler.quantize._ranges import (
    Histogram,
    activation_qparams,
    collect_histograms,
    weight_grid,
)
from dfqc.compiler.spec import LayerPlan, Plan, Quantizer

log = logging.getLogger(__name__)

Acts = Literal["mse", "minmax", "percentile", "bn"]


class Options(BaseModel):
    """Options of the round-to-nearest quantizer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Literal["mse", "minmax"] = "mse"
    acts: Acts = Field("mse", description="ranges of activations; bn: from batch norms, no images")
    percentile: float = Field(99.99, gt=50, le=100)
    batch_size: int = Field(64, ge=1)


_TIE, _TIES = 0.01, 0.5  # of a code from halfway; a part of the pixel values

PRESETS: dict[str, dict[str, object]] = {"quick": {}, "standard": {}, "max": {}}
check_given = _given.check_given("rtn", _given.RANGES)


def count_passes(options: Options, samples: int, narrow: float = 1.0) -> float:
    """Return the images that go through the network: twice for the ranges, and their counting."""
    return 0.0 if options.acts == "bn" else 3.0 * samples


def count_bytes(
    options: Options,
    graph: Graph,
    samples: int,
    memory_bytes: int | None = None,
    unpruned: Graph | None = None,
) -> int:
    """Return what is kept: histograms, which are small."""
    return 0


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
    """Choose activation grids from the images, then round every weight to its grid.

    Args:
        graph: folded graph.
        calib: images (n, c, h, w) in normalized space.
        plan: what each layer and tensor gets.
        options: range estimators.
        rng: unused, rounding to nearest is deterministic.
        device: where the images are run through the graph.
        progress: called per batch.
        supplies: `unfolded` for `acts=bn`.

    Raises:
        UsageError: of `activation_grids`.
    """
    del rng
    graph.module.to(device)
    acts, notes = activation_grids(
        *(graph, calib, plan, options, supplies.unfolded), device=device, progress=progress
    )
    weights, biases = {}, {}
    for layer in plan.layers.values():
        if layer.weight is None:
            continue
        module = graph.module.get_submodule(layer.name)
        bias = layer_bias(module)
        weights[layer.name] = round_weight(module, layer, acts, options.weights)
        if bias is not None:
            biases[layer.name] = bias
    return QuantState(plan, weights, biases, acts, {"quantizer": "rtn", **notes})


def activation_grids(
    graph: Graph,
    calib: CalibSet,
    plan: Plan,
    options: Options,
    unfolded: Graph | None = None,
    *,
    device: torch.device,
    progress: Progress = silent,
) -> tuple[dict[str, QParams], dict[str, Any]]:
    """Return the grid of every quantizer, and notes on them for the state's info.

    Tied quantizers repeat the grid that they are tied to. With `acts=bn` images are for tensors
    that no batch norm describes: `ranges_from_images` of the notes names them.

    Args:
        graph: folded graph.
        calib: images (n, c, h, w) in normalized space.
        plan: what each tensor gets.
        options: range estimators.
        unfolded: the same model with its batch norms, for `acts=bn`.
        device: where the images are run through the graph.
        progress: called per batch.

    Raises:
        UsageError: `acts=bn` without `unfolded`; images are needed, and there are none.
    """
    inputs = {n.name for n in graph.module.graph.nodes if n.op == "placeholder"}
    own = [q for q in plan.quantizers.values() if q.tied is None]
    observed = sorted({q.source for q in own} - inputs)
    hists: dict[str, Histogram] = {}
    notes: dict[str, Any] = {}
    if options.acts == "bn":
        if unfolded is None:
            raise UsageError(
                "acts=bn: activation ranges need the model with its batch norms, got none; use "
                "acts=mse, which takes them from images"
            )
        hists.update(norm_histograms(unfolded, graph, observed))
        observed = [source for source in observed if source not in hists]
        notes["ranges_from_images"] = observed
        _warn_of(observed, len(hists))
    if observed:
        if not len(calib.images):
            raise UsageError(
                f"activation ranges of {', '.join(observed)} need images, got none; give "
                "calibration images, or leave the layers that read them in float"
            )
        batch = options.batch_size
        hists.update(
            collect_histograms(
                graph, observed, calib.images, batch=batch, device=device, progress=progress
            )
        )
    method = "mse" if options.acts == "bn" else options.acts
    acts: dict[str, QParams] = {}
    for quantizer in plan.quantizers.values():
        if quantizer.tied is not None:
            acts[quantizer.name] = acts[quantizer.tied]
        elif quantizer.source in inputs:
            acts[quantizer.name] = _image_grid(graph, quantizer)
        else:
            acts[quantizer.name] = activation_qparams(
                *(hists[quantizer.source], quantizer.scheme, method),
                percentile=options.percentile,
            )
    return acts, notes


def _warn_of(sources: Sequence[str], known: int) -> None:
    """Say which tensors no batch norm describes."""
    if sources:
        log.warning(
            "acts=bn: no batch norm describes %d of %d tensors; their ranges come from the "
            "images: %s",
            *(len(sources), len(sources) + known, ", ".join(sources)),
        )


def round_weight(
    module: nn.Module, layer: LayerPlan, acts: Mapping[str, QParams], method: str
) -> QTensor:
    """Return the codes of one layer's weight, nearest on `layer_grid`."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    assert layer.weight is not None
    grid = layer_grid(module, layer, acts, method)
    return affine.round_to_grid(weight.detach().cpu(), grid, layer.weight.axis or 0)


def layer_grid(
    module: nn.Module, layer: LayerPlan, acts: Mapping[str, QParams], method: str
) -> WeightGrid:
    """Return the grids of one layer's weight with scales that leave room for its bias."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    assert layer.weight is not None
    grid = weight_grid(weight.detach().cpu(), layer.weight, method)
    bias = layer_bias(module)
    if layer.input is None or bias is None:
        return grid
    least = smallest_weight_scale(bias, acts[layer.input].scale)
    return dataclasses.replace(grid, scale=torch.maximum(grid.scale, least))


def smallest_weight_scale(bias: Tensor, input_scale: float) -> Tensor:
    """Return the least scale per channel at which the bias still fits the int32 grid.

    Batch norm leaves channels with weights near zero and an ordinary bias (common in depthwise
    layers); their bias would overflow int32, silently, in the engine.
    """
    return bias.abs() / (input_scale * affine.BIAS_LIMIT)


def _image_grid(graph: Graph, quantizer: Quantizer) -> QParams:
    """Return the grid of the network input: every valid pixel, whatever the images held.

    With mean 0.5 and std 0.5, the 8-bit grid of the range puts every pixel value halfway between
    two codes, and engines that divide or multiply by the reciprocal round half of an image to other
    codes (MobileNetV1-0.25: 4.5 % other classes by OpenVINO). One code less over the range.
    """
    image, scheme = graph.image, quantizer.scheme
    low, high = image.pixel_range()
    grid = affine.affine_qparams(low, high, scheme)
    values = torch.arange(256, dtype=torch.float64)[:, None] / 255
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (image.mean, image.std))
    codes = (values - mean) / std / grid.scale
    halfway = ((codes - codes.floor() - 0.5).abs() < _TIE).double().mean()
    if halfway < _TIES:
        return grid
    wider = scheme.levels / (scheme.levels - 1)
    return affine.affine_qparams(low * wider, high * wider, scheme)


def layer_bias(module: nn.Module) -> Tensor | None:
    """Return a layer's own bias as float32 on the CPU, if it has one."""
    bias = module.bias
    return bias.detach().cpu().float() if isinstance(bias, Tensor) else None
