"""Bias correction: a quantized state in, the same state with biases that undo the mean error.

Rounding shifts the mean of every output channel. Analytic: the shift is (W^ - W) applied to the
expected input, known from batch-norm statistics (Nagel et al. 2019, section 4.2). Empirical: the
shift is measured on the calibration set, layer by layer, on the simulated network.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqc.compiler import affine
from dfqc.compiler.contracts import CalibSet, Progress, QTensor, QuantState, silent
from dfqc.compiler.graph import Graph
from dfqc.compiler.moments import folded_inputs
from dfqc.compiler.simulate import simulated, snapped_bias
from dfqc.compiler.spec import LayerPlan

log = logging.getLogger(__name__)

METHODS = ("none", "analytic", "empirical")  # in the order of ties: the simplest wins
JUDGE_IMAGES = 64


class Options(BaseModel):
    """Options of bias correction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["auto", "empirical", "analytic", "none"] = "auto"
    images: int = Field(256, ge=1, description="images of the calibration set to measure on")
    batch_size: int = Field(32, ge=1)


def correct(
    graph: Graph,
    unfolded: Graph,
    state: QuantState,
    calib: CalibSet,
    options: Options,
    *,
    device: torch.device,
    progress: Progress = silent,
) -> QuantState:
    """Return `state` with corrected biases.

    `auto` makes all of them and keeps the one whose simulated outputs are nearest to the float
    ones, on calibration images that the empirical fit did not see.

    Args:
        graph: folded graph (what the state belongs to).
        unfolded: the same model with its batch norms (for `analytic`).
        state: quantizer's decisions; not modified.
        calib: calibration images (for `empirical`).
        options: which method, and how many images.
        device: where the measurement runs.
        progress: called per layer.
    """

    def fit(method: str, images: Tensor) -> QuantState:
        if method == "none":
            return _corrected(state, {}, {"method": "none"})
        if method == "analytic":
            biases, info = analytic_biases(graph, unfolded, state)
        else:
            biases = empirical_biases(
                graph, state, images, batch=options.batch_size, device=device, progress=progress
            )
            info = {"images": len(images)}
        return _corrected(state, biases, {"method": method, **info})

    images = calib.images[: options.images]
    if options.method != "auto":
        return fit(options.method, images)
    seen, unseen = _split(images)
    scores = {m: output_sqnr(graph, fit(m, seen), unseen, device=device) for m in METHODS}
    best = max(METHODS, key=lambda method: scores[method])
    log.info("bias correction: %s of %s", best, scores)
    chosen = fit(best, images)
    info = {**chosen.info["bias_correction"], "output_sqnr_db": scores}
    return _corrected(state, chosen.biases, info)


def output_sqnr(
    graph: Graph, state: QuantState, images: Tensor, *, device: torch.device, batch: int = 32
) -> float:
    """Return the SQNR in dB of the simulation's outputs against the float ones on `images`."""
    simulation = simulated(graph, state).module.to(device)
    outputs: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode():
        for chunk in images.split(batch):
            x = chunk.to(device)
            outputs.append((graph.module.to(device)(x).cpu(), simulation(x).cpu()))
    floats, quantized = (torch.cat(part) for part in zip(*outputs, strict=True))
    return affine.sqnr_db(floats, quantized)


def _split(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images to fit on and up to 64 to judge by; a single image serves for both."""
    if len(images) < 2:
        return images, images
    judge = min(len(images) // 2, JUDGE_IMAGES)
    return images[:-judge], images[-judge:]


def _corrected(
    state: QuantState, biases: Mapping[str, Tensor], info: Mapping[str, Any]
) -> QuantState:
    merged = {**state.info, "bias_correction": dict(info)}
    return dataclasses.replace(state, biases={**state.biases, **biases}, info=merged)


def analytic_biases(
    graph: Graph, unfolded: Graph, state: QuantState
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return corrected biases from batch-norm statistics alone, and the layers left out."""
    expected = folded_inputs(unfolded, graph)
    biases: dict[str, Tensor] = {}
    skipped: list[str] = []
    for layer in state.plan.layers.values():
        if layer.weight is None:
            continue
        module = unfolded.module.get_submodule(layer.name)
        folded = graph.module.get_submodule(layer.name)
        if layer.name not in expected:
            skipped.append(layer.name)
            continue
        error = weight_error(folded, layer, state.weights[layer.name])
        shift = _mean_output(module, error, expected[layer.name])
        bias = _float_bias(folded, state.biases.get(layer.name), len(shift))
        biases[layer.name] = bias - shift.float()
    if skipped:
        log.warning("bias correction: no statistics for %d layers: %s", len(skipped), skipped)
    return biases, {"corrected": len(biases), "without_statistics": skipped}


def weight_error(module: nn.Module, layer: LayerPlan, weight: QTensor) -> Tensor:
    """Return W^ - W in float64."""
    assert layer.weight is not None
    original = module.weight
    assert isinstance(original, Tensor)
    rounded = affine.dequantize_weight(weight, layer.weight.axis).double()
    return rounded - original.detach().cpu().double()


def _mean_output(module: nn.Module, weight: Tensor, mean: Tensor) -> Tensor:
    """Return the mean over positions of `weight` applied to an expected input, (channels,)."""
    if isinstance(module, nn.Linear):
        return F.linear(mean, weight).flatten(0, -2).mean(0)
    assert isinstance(module, nn.Conv2d)
    out = F.conv2d(
        mean,
        weight,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
    )
    return out.mean((0, 2, 3))


def _float_bias(module: nn.Module, bias: Tensor | None, channels: int) -> Tensor:
    if bias is not None:
        return bias
    own = module.bias
    return own.detach().cpu().float() if isinstance(own, Tensor) else torch.zeros(channels)


def empirical_biases(
    graph: Graph,
    state: QuantState,
    images: Tensor,
    *,
    batch: int,
    device: torch.device,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Return biases that give every output channel of the simulation its float mean.

    Layers are corrected in graph order, each on inputs that already carry the corrections of
    the layers before it; only live activations of the images (n, c, h, w) are held.
    """
    chunks = [c.to(device) for c in images.split(batch)]
    names = {p.node: p for p in state.plan.layers.values() if p.weight is not None}
    graph.module.to(device)
    floats = _MeanCollector(graph.module, names)
    with torch.inference_mode():
        for chunk in chunks:
            floats.run(chunk)
        quantized = simulated(graph, state, integer=False)
        walker = _Corrector(quantized.module.to(device), names, state, floats.means(), progress)
        walker.run(chunks)
    return walker.biases


def channel_mean(value: Tensor, layer: LayerPlan) -> Tensor:
    """Return the mean of a layer's output per channel, float64 (channels,)."""
    if layer.op == "Linear":
        return value.flatten(0, -2).mean(0).double()
    return value.mean((0, 2, 3)).double()


class _MeanCollector(fx.Interpreter):
    """Accumulates the per-channel mean output of every planned layer of the float graph."""

    def __init__(self, module: fx.GraphModule, layers: Mapping[str, LayerPlan]) -> None:
        super().__init__(module)
        self.layers = layers
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.layers:
            mean = channel_mean(value, self.layers[n.name]) * len(value)
            self.sums[n.name] = self.sums.get(n.name, 0) + mean
            self.counts[n.name] = self.counts.get(n.name, 0) + len(value)
        return value

    def means(self) -> dict[str, Tensor]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}


class _Corrector(fx.Interpreter):
    """Runs the simulation node by node over all chunks, correcting each layer as it is reached.

    Every value is a list with one tensor per chunk.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        layers: Mapping[str, LayerPlan],
        state: QuantState,
        means: Mapping[str, Tensor],
        progress: Progress,
    ) -> None:
        super().__init__(module)
        self.layers, self.state, self.means, self.progress = layers, state, means, progress
        self.biases: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return self.args_iter.__next__()
        if n.op in ("get_attr",):
            return super().run_node(n)
        chunks = max((len(v) for v in self._lists(n)), default=0)
        if n.op == "output":
            return None
        if chunks == 0:
            return super().run_node(n)
        values = [self._run_chunk(n, i) for i in range(chunks)]
        if n.name in self.layers:
            values = self._correct(self.layers[n.name], values)
        return values

    def _lists(self, node: fx.Node) -> list[list[Any]]:
        values = [self.env[a] for a in node.all_input_nodes]
        return [v for v in values if isinstance(v, list)]

    def _run_chunk(self, node: fx.Node, index: int) -> Any:
        def pick(arg: fx.Node) -> Any:
            value = self.env[arg]
            return value[index] if isinstance(value, list) else value

        args = fx.node.map_arg(node.args, pick)
        kwargs = fx.node.map_arg(node.kwargs, pick)
        return getattr(self, node.op)(node.target, args, kwargs)

    def _correct(self, layer: LayerPlan, values: list[Any]) -> list[Any]:
        """Shift the layer's bias so that its mean output is the float one; apply it at once."""
        total = sum(len(v) for v in values)
        mean = sum(channel_mean(v, layer) * len(v) for v in values) / total
        module = self.fetch_attr(layer.name)
        shift = (mean - self.means[layer.node]).cpu().float()
        # The mean was measured with the snapped bias: that is the one to shift.
        old = module.bias.detach().cpu() if module.bias is not None else torch.zeros_like(shift)
        bias = old - shift
        self.biases[layer.name] = bias
        weight = self.state.weights[layer.name]
        delta = (snapped_bias(bias, layer, weight, self.state.acts) - old).to(values[0].device)
        if layer.op != "Linear":
            delta = delta.view(1, -1, 1, 1)
        self.progress(len(self.biases), len(self.layers), "bias correction")
        return [v + delta for v in values]
