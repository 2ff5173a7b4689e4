"""Pruning and rounding in one closed form: graph, plan and kept channels in, `QuantState` out.

After the idea of UDFC (Bai et al. 2023): a damaged channel is a linear combination of others, so
what it lost is put back at the layers that read it. Layer by layer: restore what the layers before
lost, put mean and variance of the outputs back, round, put them back again. Batch norms say what
activations are like; images are only needed for activation grids, with `acts=bn` not at all. The
formulas are our own.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from pydantic import ConfigDict, model_validator
from torch import Tensor, nn

from dfqc.compiler import affine
from dfqc.compiler.channels import remove
from dfqc.compiler.contracts import (
    CalibSet,
    Progress,
    Pruned,
    QParams,
    QTensor,
    QuantizerSupplies,
    QuantState,
    WeightGrid,
    silent,
)
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph, copy_graph, layer_nodes
from dfqc.compiler.passes._outputs import Outputs
from dfqc.compiler.passes.bias import RESTORED
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.passes.restore import Compensation, Restorer
from dfqc.compiler.passes.restore import Options as RestoreOptions
from dfqc.compiler.quantize import _given, rtn
from dfqc.compiler.quantize._ranges import weight_grid
from dfqc.compiler.quantize.squant import flip_codes
from dfqc.compiler.spec import LayerPlan, Plan

log = logging.getLogger(__name__)

_FITTING = ("patches", "moments")  # forms of restoration that know what rounded channels are like


class Options(RestoreOptions):
    """Options of the joint closed form: those of the restoration, and how weights are rounded.

    `compensate` says what users do about rounded channels beside mean and variance: nothing, one
    factor per channel, or a new fit (by `patches` and `moments`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    compensate: Compensation = "none"
    rounding: Literal["nearest", "squant"] = "nearest"
    weights: Literal["mse", "minmax"] = "mse"
    acts: rtn.Acts = "mse"
    percentile: float = 99.99
    batch_size: int = 64

    @model_validator(mode="after")
    def _check_compensation(self) -> Options:
        """Refuse a fit to rounded channels by forms that only look at the original's filters."""
        if self.compensate == "users" and self.method not in _FITTING:
            raise UsageError(
                f"udfc: compensate=users with method {self.method}: that form never sees what was "
                f"rounded, and nothing would change; use --restore {' or '.join(_FITTING)}, or "
                "compensate=scales"
            )
        return self

    def ranges(self) -> rtn.Options:
        """Return the range estimators of the activations."""
        return rtn.Options(acts=self.acts, percentile=self.percentile, batch_size=self.batch_size)


PRESETS: dict[str, dict[str, object]] = {"quick": {}, "standard": {}, "max": {}}
check_given = _given.check_given("udfc", _given.RANGES)
SAME = 1e-4  # relative; codes and folded weight beyond it are not of one layer


def count_passes(options: Options, samples: int, narrow: float = 1.0) -> float:
    """Return the images that go through the network: for the ranges of activations."""
    return rtn.count_passes(options.ranges(), samples)


def count_bytes(
    options: Options,
    graph: Graph,
    samples: int,
    memory_bytes: int | None = None,
    unpruned: Graph | None = None,
) -> int:
    """Return what is kept: copies of the model, and the largest matrix a few times."""
    size = sum(p.numel() * p.element_size() for p in graph.module.parameters())
    widest = max((p[0].numel() for p in graph.module.parameters() if p.dim() > 1), default=0)
    return 3 * size + 5 * 8 * min(2 * widest, options.largest) ** 2


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
    """Restore, correct and round layer by layer.

    Weights that the plan leaves in float keep the values of `graph`.

    Args:
        graph: folded graph, pruned already if `supplies.unpruned` is given.
        calib: images (n, c, h, w) in normalized space, for activation ranges only; with `acts=bn`
            not for those either.
        plan: what each layer and tensor gets.
        options: of the closed form.
        rng: unused, nothing here is random.
        device: where the images are run; the closed form runs on the CPU.
        progress: called per batch, then per layer.
        supplies: `unpruned`, or `unfolded` where nothing was pruned (and for `acts=bn`).

    Raises:
        UsageError: the original does not belong to `graph`; of `rtn.activation_grids`.
    """
    del rng
    origin = _find_origin(graph, supplies)
    graph.module.to(device)
    acts, notes = rtn.activation_grids(
        *(graph, calib, plan, options.ranges(), supplies.unfolded),
        device=device,
        progress=progress,
    )
    graph.module.cpu()
    rounder = _Rounder(graph, origin, plan, options, progress)
    restorer = Restorer(
        origin.graph,
        origin.keep,
        options,
        round_layer=rounder.round,
        compensate=options.compensate,
    )
    folded = fold(remove(restorer.run(), origin.keep))
    state = rounder.state(folded, acts)
    return dataclasses.replace(state, info={**state.info, **notes})


def _find_origin(graph: Graph, supplies: QuantizerSupplies) -> Pruned:
    """Return the model to restore; without batch norms the weights alone say what values are."""
    if supplies.unpruned is not None:
        return supplies.unpruned
    if supplies.unfolded is None:
        log.warning("udfc: no batch norms given: moments are derived from weights and pixels")
    return Pruned(supplies.unfolded or graph, {})


@dataclasses.dataclass(frozen=True)
class _Codes:
    """One layer's codes on a grid, and what folding multiplied its outputs by then."""

    weight: QTensor
    folding: Tensor
    outputs: Outputs


class _Rounder:
    """Rounds the layers of the full-size graph as they will be when folded and cut."""

    def __init__(
        self, graph: Graph, origin: Pruned, plan: Plan, options: Options, progress: Progress
    ) -> None:
        self.graph, self.plan, self.options, self.progress = graph, plan, options, progress
        self.kept = _kept_weights(origin)
        self.codes: dict[str, _Codes] = {}
        self.again: list[str] = []  # rounded anew after folding
        self.zeros: dict[str, Tensor] = {}  # weights that are pruned one by one
        for layer in plan.layers.values():
            own = cast(Any, graph.module.get_submodule(layer.name))
            self.zeros[layer.name] = own.weight.detach().cpu() == 0
            if layer.name in self.kept and self.kept[layer.name].shape != own.weight.shape:
                raise UsageError(
                    f"udfc: {layer.name} has a weight of {tuple(own.weight.shape)}, the original "
                    f"without its pruned channels one of {tuple(self.kept[layer.name].shape)}"
                )

    def round(self, path: str, layer: nn.Conv2d | nn.Linear, outputs: Outputs) -> Tensor | None:
        """Return the layer's weight on its grid, at full size and before folding."""
        planned = self.plan.layers.get(path)
        if planned is None or planned.weight is None or planned.weight.axis != 0:
            return None
        kept = self.kept[path]
        real = layer.weight.detach().cpu().double()
        rows = (kept.flatten(1)[:, 0] // real[0].numel()).long()
        folding = outputs.scale()[rows]
        small = real.flatten()[kept].masked_fill(self.zeros[path], 0)
        view = folding.view(-1, *[1] * (small.dim() - 1))
        grid = weight_grid((small * view).float(), planned.weight, self.options.weights)
        weight = self._round(small * view, grid)
        self.codes[path] = _Codes(weight, folding, outputs)
        self.progress(len(self.codes), len(self.plan.layers), "closed form")
        back = affine.dequantize_weight(weight, 0).double() / torch.where(view == 0, 1, view)
        full = torch.zeros_like(real)
        full.view(-1)[kept.flatten()] = back.flatten()
        return full

    def state(self, folded: Graph, acts: Mapping[str, QParams]) -> QuantState:
        """Return the codes with the scales and biases that the fixes ended at."""
        weights: dict[str, QTensor] = {}
        biases: dict[str, Tensor] = {}
        for layer in self.plan.layers.values():
            if layer.weight is None:
                continue
            module = folded.module.get_submodule(layer.name)
            weight = self._final(layer, module)
            bias = rtn.layer_bias(module)
            if bias is not None:
                biases[layer.name] = bias
                if layer.input is not None:
                    least = rtn.smallest_weight_scale(bias, acts[layer.input].scale)
                    weight = dataclasses.replace(weight, scale=weight.scale.maximum(least))
            weights[layer.name] = weight
        info = {
            "quantizer": "udfc",
            "method": self.options.method,
            "restored_means": self.options.mean_fix,
            "rounded_last": self.again,
            RESTORED: True,
        }
        return QuantState(self.plan, weights, biases, acts, info)

    def _final(self, layer: LayerPlan, module: nn.Module) -> QTensor:
        """Return a layer's codes with the scale that they have after the last fix."""
        found = self.codes.get(layer.name)
        exact = cast(Tensor, module.weight).detach()
        exact = exact.masked_fill(self.zeros[layer.name], 0)
        if found is not None:
            rows = self.kept[layer.name].flatten(1)[:, 0]
            rows = (rows // found.outputs.layer.weight[0].numel()).long()
            ratio = found.outputs.scale()[rows] / found.folding
            ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
            scale = (found.weight.scale.double() * ratio).float()
            weight = dataclasses.replace(found.weight, scale=scale)
            error = (affine.dequantize_weight(weight, 0).double() - exact).abs().max()
            if error <= SAME * exact.abs().max():
                return weight
        # A transposed convolution, one scale for all channels, or a batch norm that folds
        # elsewhere: nearest codes of the restored weight.
        self.again.append(layer.name)
        assert layer.weight is not None
        grid = weight_grid(exact, layer.weight, self.options.weights)
        return affine.round_to_grid(exact, grid, layer.weight.axis or 0)

    def _round(self, weight: Tensor, grid: WeightGrid) -> QTensor:
        real = weight.float()
        if self.options.rounding == "nearest":
            return affine.round_to_grid(real, grid, 0)
        kernels = real.flatten(2) if real.dim() > 2 else real[:, :, None]
        codes = flip_codes(kernels, grid).view(real.shape)
        return QTensor(codes.contiguous().to(torch.int8), grid.scale)


def _kept_weights(origin: Pruned) -> dict[str, Tensor]:
    """Return, per layer, the places in the full-size weight of what stays, in its new shape."""
    numbered = copy_graph(origin.graph)
    numbered.module.double()  # holds every number exactly, and one type throughout
    paths = [path for path, _ in layer_nodes(numbered)]
    for path in paths:
        layer = cast(Any, numbered.module.get_submodule(path))
        places = torch.arange(layer.weight.numel(), dtype=torch.float64).view(layer.weight.shape)
        layer.weight = nn.Parameter(places, requires_grad=False)
    cut = remove(numbered, origin.keep) if origin.keep else numbered
    return {path: cast(Tensor, cut.module.get_submodule(path).weight).long() for path in paths}
