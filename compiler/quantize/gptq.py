"""Column-wise rounding that compensates its own errors (GPTQ), from images or batch norms.

In: a folded graph, calibration images and a plan. Out: a `QuantState`, in seconds: the second
moments of every layer's input say which errors cancel (Frantar et al. 2023). The moments are
measured on the images, in the network quantized so far, or derived from batch-norm statistics.

Damping is ten times the published 0.01, and fifty times where weights make up for the error of the
layers before: what synthetic images correlate, real ones do less. Top-1 (divergence from the float
network) on real images, 256 and 64 genie images, 0.01 for both / these: ResNet-20 W3A3 88.4 (0.206)
/ 89.1 (0.165), W4A4 91.0 (0.063) / 90.8 (0.055); MobileNetV1-0.25 W8A8 57.8 (0.030) / 58.9 (0.016),
W4A8 47.2 (0.56) / 46.7 (0.55), W4A4 4.8 (4.3) / 16.3 (2.9). On two networks that it was not chosen
by, W3A3: ResNet-8 78.0 / 81.5, SimpleNet 51.6 / 56.4.

The range that loses least of the weights is not the one that loses least of the output, nor is one
pass through the columns their best rounding: below 8 bits every channel tries nine more scales and
then improves code by code. Divergence on real images without / with both, 8-bit ends, 256 images:
ResNet-8 W4A8 0.038 / 0.028, W4A4 0.075 / 0.068, W2A4 0.51 / 0.47; SimpleNet 0.061 / 0.054, 0.182 /
0.178, 0.78 / 0.66; ResNet-20 W4A4 0.058 / 0.059, W3A3 0.153 / 0.174, W2A4 0.237 / 0.195;
MobileNetV1-0.25 W4A8 with real images 0.298 / 0.258.

A quarter of the Hessian of synthetic images is the one that the batch norms imply: it knows less of
what goes together, but what it knows is of the real data (of the image itself, a prior of natural
ones). Divergence without / with it, as above:
ResNet-8 W4A8 0.033 / 0.029, W4A4 0.080 / 0.069, W3A3 0.206 / 0.205, W2A4 0.469 / 0.380; MobileNetV1
W4A8 0.508 / 0.481, W4A4 2.83 / 2.64; SimpleNet 0.058 / 0.057, 0.184 / 0.170, 0.501 / 0.550, 0.643 /
0.672; ResNet-20 0.0118 / 0.0116, 0.050 / 0.054, 0.168 / 0.174, 0.207 / 0.186. Half of it is as good
on average and differs more between networks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from dfqc.compiler import affine
from dfqc.compiler.contracts import (
    CalibSet,
    Progress,
    QParams,
    QTensor,
    QuantizerSupplies,
    QuantState,
    silent,
)
from dfqc.compiler.graph import Graph, has_batch_norm, layer_nodes
from dfqc.compiler.moments import Moments, folded_moments
from dfqc.compiler.quantize import _gptq_check, rtn
from dfqc.compiler.quantize._hessian import (
    SecondMoments,
    blend_moments,
    derive_moments,
    hessian_bytes,
    hessian_room,
    measure_moments,
)
from dfqc.compiler.quantize._layer_codes import Rounding, round_weight
from dfqc.compiler.quantize._walk import Walk, live_bytes
from dfqc.compiler.spec import LayerPlan, Plan

log = logging.getLogger(__name__)

MEMORY_BYTES = 4 << 30  # of images, where nobody set a limit


class Options(rtn.Options, Rounding):
    """Options of column-wise rounding; the ranges are those of round-to-nearest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hessian: Literal["images", "bn"] = "images"
    images: int = Field(256, ge=1, description="images of the calibration set to measure on")
    patches: int = Field(1 << 13, ge=1, description="input patches per layer to measure on")
    norms: float = Field(
        0.25, ge=0, le=1, description="part of a synthetic Hessian that batch norms give"
    )
    asymmetric: bool = Field(True, description="make up for the error of the layers before")


PRESETS: dict[str, dict[str, object]] = {"quick": {}, "standard": {}, "max": {}}
check_given, check_graph = _gptq_check.check_given, _gptq_check.check_graph
_SOLVING = 10.0  # of gathering moments and rounding, in passes of the images that are walked


def count_passes(options: Options, samples: int, narrow: float = 1.0) -> float:
    """Return the images that go through the network: for ranges, and along both lanes."""
    return rtn.count_passes(options, samples) + (2 + _SOLVING) * min(options.images, samples)


def count_bytes(
    options: Options,
    graph: Graph,
    samples: int,
    memory_bytes: int | None = None,
    unpruned: Graph | None = None,
) -> int:
    """Return what is kept: the walked images' live activations in both lanes, and a Hessian's."""
    layers = [graph.module.get_submodule(name) for name, _ in layer_nodes(graph)]
    room = hessian_room(memory_bytes)
    largest = max((size for size in map(hessian_bytes, layers) if size <= room), default=0)
    walked = max(0, _image_room(memory_bytes, largest))
    return min(walked, min(options.images, samples) * 2 * live_bytes(graph)) + largest


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
    """Choose activation grids as `rtn` does, then round layer by layer in the order they run.

    Given images (`--calib-data`) are all that is measured on: they may be of other data than the
    batch norms, on purpose. Layers for which there are no second moments (transposed
    convolutions; with `bn`, inputs that no batch norm describes) are rounded to nearest; the info
    names them.

    Args:
        graph: folded graph.
        calib: images (n, c, h, w) in normalized space; `bn` takes activation ranges
            alone, with `acts=bn` nothing.
        plan: what each layer and tensor gets.
        options: where the Hessian comes from, and how columns are rounded.
        rng: unused, nothing here is random.
        device: where everything is computed.
        progress: called per batch of the ranges, then per layer.
        supplies: `unfolded` for `bn`, `norms` and `acts=bn`; `memory_bytes` bounds the images that
            are held; after `seconds` the layers that are left are rounded to nearest.

    Raises:
        UsageError: `bn` without the unfolded graph, or with options of the images' Hessian; of
            `rtn.activation_grids`.
    """
    _gptq_check.check_options(options)
    del rng
    start = time.monotonic()
    deadline = None if supplies.seconds is None else start + supplies.seconds
    known = _read_norms(graph, calib, options, supplies.unfolded)
    graph.module.to(device)
    acts, notes = rtn.activation_grids(
        *(graph, calib, plan, options, supplies.unfolded), device=device, progress=progress
    )
    room = hessian_room(supplies.memory_bytes)
    rounder = _Rounder(graph, plan, acts, options, progress, room, known, info=notes)
    if options.hessian == "bn":
        rounder.round_from(device, deadline)
    else:
        rounder.round_along(calib.images, device, deadline, supplies.memory_bytes)
    return rounder.state()


def _read_norms(
    graph: Graph, calib: CalibSet, options: Options, unfolded: Graph | None
) -> Mapping[str, Moments]:
    """Return the moments of layers' inputs that the Hessian, or a part of it, is made from."""
    _gptq_check.check_graph(options, unfolded, synthetic=calib.synthetic)
    asked = options.hessian == "bn" or (options.norms > 0 and calib.synthetic)
    if not asked or unfolded is None or not has_batch_norm(unfolded):
        return {}
    return folded_moments(unfolded, graph)


@dataclass
class _Rounder:
    """Collects the decided layers of one run."""

    graph: Graph
    plan: Plan
    acts: Mapping[str, QParams]
    options: Options
    progress: Progress
    room: int  # bytes that a layer's Hessian may take; others are rounded to nearest
    known: Mapping[str, Moments]  # of layers' inputs, from batch norms
    weights: dict[str, QTensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)

    def round_from(self, device: torch.device, deadline: float | None) -> None:
        """Round every layer whose input's mean and variance are known."""
        for layer in self._planned():
            module = self.graph.module.get_submodule(layer.name)
            if deadline is not None and time.monotonic() > deadline:
                return
            derived = self._derive(layer, module, device)
            if derived is not None and self._can_measure(module):
                self._round(layer, module, derived)
            else:
                self._round_nearest(layer, module)

    def round_along(
        self, images: Tensor, device: torch.device, deadline: float | None, memory: int | None
    ) -> None:
        """Round every layer on its inputs in the network quantized so far."""
        options = self.options
        paired = options.asymmetric
        walk = Walk(self.graph, self.plan, self.acts, paired=paired, device=device)
        used = min(len(images), options.images, self._count_fitting(walk.bytes_per_image, memory))
        self.info["images"] = used
        if used < (asked := min(len(images), options.images)):
            level = logging.INFO if memory is None else logging.WARNING
            log.log(level, "gptq: measured on %d of %d images: memory holds no more", used, asked)
        walk.run(images[:used], self._decide, batch=options.batch_size, deadline=deadline)

    def state(self) -> QuantState:
        """Return what was decided; layers that time did not suffice for are rounded to nearest."""
        planned, biases = self._planned(), {}
        late = [layer for layer in planned if layer.name not in self.weights]
        for layer in late:
            self._round_nearest(layer, self.graph.module.get_submodule(layer.name))
        if self.unmeasured:
            counts = f"{len(self.unmeasured)} of {len(planned)} layers"
            log.warning("gptq: %s rounded to nearest: %s", counts, ", ".join(self.unmeasured))
        for layer in planned:
            bias = rtn.layer_bias(self.graph.module.get_submodule(layer.name))
            if bias is not None:
                biases[layer.name] = bias
        info = {
            "quantizer": "gptq",
            "hessian": self.options.hessian,
            **self.info,
            "rounded_to_nearest": self.unmeasured,
            "shortened": bool(late),
        }
        weights = {layer.name: self.weights[layer.name] for layer in planned}
        return QuantState(self.plan, weights, biases, self.acts, info)

    def _decide(
        self,
        layer: LayerPlan,
        module: nn.Module,
        quantized: Sequence[Tensor],
        floats: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Round one layer; return its weight, and a bias that keeps the mean output.

        The bias is for the walk only: correcting it for good is a later stage.
        """
        bias = rtn.layer_bias(module)
        if not self._can_measure(module):
            self._round_nearest(layer, module)
            return self._real(layer), bias
        moments = measure_moments(module, quantized, floats, limit=self.options.patches)
        share = self.options.norms
        derived = self._derive(layer, module, quantized[0].device) if share else None
        if derived is None:
            self._round(layer, module, moments)
        else:
            self.info["layers_with_norms"] = self.info.get("layers_with_norms", 0) + 1
            self._round(layer, module, blend_moments(moments, derived, share))
        real = self._real(layer)
        shift = _mean_error(module.weight.detach().cpu(), real, moments)
        return real, shift if bias is None else bias + shift

    def _round(
        self, layer: LayerPlan, module: nn.Conv2d | nn.Linear, moments: SecondMoments
    ) -> None:
        weight = module.weight.detach()
        grid = rtn.layer_grid(module, layer, self.acts, self.options.weights)
        bias, least = rtn.layer_bias(module), None
        if layer.input is not None and bias is not None:
            least = rtn.smallest_weight_scale(bias, self.acts[layer.input].scale)
        codes, grid = round_weight(weight.flatten(1), moments, grid, least, self.options)
        self._keep(layer, QTensor(codes.cpu().view(weight.shape), grid.scale.cpu()))

    def _derive(
        self, layer: LayerPlan, module: nn.Module, device: torch.device
    ) -> SecondMoments | None:
        """Return the second moments that batch norms imply, None where they say nothing."""
        input_ = self.known.get(layer.name)
        if input_ is None or not self._can_measure(module):
            return None
        moved = Moments(input_.mean.to(device), input_.var.to(device))
        return derive_moments(module, moved, limit=self.options.patches)

    def _round_nearest(self, layer: LayerPlan, module: nn.Module) -> None:
        self.unmeasured.append(layer.name)
        self._keep(layer, rtn.round_weight(module, layer, self.acts, self.options.weights))

    def _keep(self, layer: LayerPlan, weight: QTensor) -> None:
        self.weights[layer.name] = weight
        self.progress(len(self.weights), len(self._planned()), "rounding")

    def _real(self, layer: LayerPlan) -> Tensor:
        assert layer.weight is not None
        return affine.dequantize_weight(self.weights[layer.name], layer.weight.axis)

    def _planned(self) -> list[LayerPlan]:
        return [layer for layer in self.plan.layers.values() if layer.weight is not None]

    def _count_fitting(self, per_image: int, memory: int | None) -> int:
        """Return how many images may be held; half the memory is for the model and the runtime.

        The largest layer that is measured keeps its Hessian beside them.
        """
        modules = [self.graph.module.get_submodule(layer.name) for layer in self._planned()]
        largest = max((hessian_bytes(m) for m in modules if self._can_measure(m)), default=0)
        return max(1, _image_room(memory, largest) // max(1, per_image))

    def _can_measure(self, module: nn.Module) -> TypeGuard[nn.Conv2d | nn.Linear]:
        """Report whether a layer has a Hessian that fits."""
        known = isinstance(module, (nn.Conv2d, nn.Linear))
        return known and hessian_bytes(module) <= self.room


def _image_room(memory: int | None, largest: int) -> int:
    """Return the bytes that images may take beside the largest Hessian."""
    return memory // 2 - largest if memory else MEMORY_BYTES // 2


def _mean_error(weight: Tensor, rounded: Tensor, moments: SecondMoments) -> Tensor:
    """Return what the mean output of every channel lost, (channels,) float32."""
    mean = moments.quantized_mean.cpu()
    wanted = mean if moments.float_mean is None else moments.float_mean.cpu()
    parts = [
        (matrix.double().view(len(mean), -1, mean.shape[1]) @ vector[:, :, None]).flatten()
        for matrix, vector in ((weight, wanted), (rounded, mean))
    ]
    return (parts[0] - parts[1]).float()
