"""The simulation of the engine in torch: folded graph and quantizer's decisions in, graph out.

What this module computes is what the lowered file says: weights on their integer grid, biases
snapped to the int32 grid, and a fake-quantizer wherever the plan has one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from dfqc.compiler import affine
from dfqc.compiler.contracts import QParams, QTensor, QuantState
from dfqc.compiler.graph import Graph, copy_graph
from dfqc.compiler.operators import output_end
from dfqc.compiler.spec import LayerPlan, Plan, QScheme, Quantizer


class FakeQuantize(nn.Module):
    """A per-tensor grid: real values in, the nearest values of the grid out."""

    def __init__(self, qparams: QParams, scheme: QScheme, *, stepwise: bool = False) -> None:
        super().__init__()
        self.scheme = scheme
        self.quantize = affine.quantize_by_range if stepwise else affine.quantize
        self.zero_point = qparams.zero_point
        self.register_buffer("scale", torch.tensor(qparams.scale, dtype=torch.float32))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the grid, same shape."""
        return self.codes(x).sub_(self.zero_point).mul_(self.scale)

    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of `x` as floats, same shape."""
        return self.quantize(x, self.scale, self.zero_point, self.scheme)


class IntegerLayer(nn.Module):
    """A Conv2d or Linear as the integer kernel computes it.

    Codes times codes in exact integers, plus the int32 bias, converted to float32 once, times one
    float32 multiplier. With `output`, the multiplier carries the output scale too and the result
    is rounded and saturated on the output grid, as QLinearConv does: two float roundings would
    put about one code in 100,000 on the other side of a boundary. `stepwise` is another engine's
    order: the sum converted to float32, times its step, plus the bias as float32.
    """

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        weight: QTensor,
        bias: Tensor | None,
        grid: QParams,
        output: tuple[QParams, QScheme] | None,
        *,
        stepwise: bool = False,
    ) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)
        self.layer.bias = None
        codes = weight.codes.to(layer.weight.device, torch.float32)
        step = affine.bias_scale(grid.scale, weight.scale)
        # Float32 adds integers exactly below 2^24; wider sums need float64.
        largest = 256 * codes.abs().flatten(1).sum(1).max()
        self.dtype = torch.float32 if largest < 2**24 else torch.float64
        self.layer.weight = _frozen(codes.to(self.dtype))
        self.output = output
        if output is not None:
            step = step / torch.tensor(output[0].scale, dtype=torch.float32)
        ndim = 2 if isinstance(layer, nn.Linear) else 4
        axis = -1 if isinstance(layer, nn.Linear) else 1
        shifts = torch.zeros(len(step), dtype=torch.int32)
        if bias is not None:
            shifts = affine.bias_codes(bias, grid.scale, weight.scale)
        device = layer.weight.device
        self.input_scale = grid.scale
        self.stepwise = stepwise
        if stepwise:
            self.register_buffer(
                "bias", affine.channel_view(shifts.float() * step, ndim, axis).to(device)
            )
        self.register_buffer("shift", affine.channel_view(shifts.double(), ndim, axis).to(device))
        self.register_buffer("multiplier", affine.channel_view(step, ndim, axis).to(device))
        self.shift: Tensor
        self.multiplier: Tensor
        self.bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for `x`, real values on the input grid."""
        total: Tensor = self.layer((x / self.input_scale).round_().to(self.dtype))
        if self.stepwise:
            return total.float().mul_(self.multiplier).add_(self.bias)
        real = total.double().add_(self.shift).float().mul_(self.multiplier)
        if self.output is None:
            return real
        qparams, scheme = self.output
        codes = real.round_().add_(qparams.zero_point).clamp_(scheme.quant_min, scheme.quant_max)
        return codes.sub_(qparams.zero_point).mul_(qparams.scale)


def simulated(graph: Graph, state: QuantState, *, integer: bool = True) -> Graph:
    """Return the graph with every decision of `state` applied; node names stay as they were.

    With `integer`, layers with quantized inputs compute in integers as the engine's kernels do;
    without, they are float layers with fake-quantized weights (differentiable, and about 1e-5 of
    the codes away from the engine).
    """
    result = copy_graph(graph)
    stepwise = state.plan.requantize == "stepwise"
    fused = _fused_outputs(result, state.plan) if integer and not stepwise else {}
    for layer in state.plan.layers.values():
        if layer.weight is None:
            continue
        module = result.module.get_submodule(layer.name)
        if integer and layer.input is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
            grid = state.acts[layer.input]
            name = fused.get(layer.node)
            output = (state.acts[name], state.plan.quantizers[name].scheme) if name else None
            bias = state.biases.get(layer.name)
            weight = state.weights[layer.name]
            exact = IntegerLayer(module, weight, bias, grid, output, stepwise=stepwise)
            result.module.set_submodule(layer.name, exact)
        else:
            apply_layer(module, layer, state)
    insert_quantizers(
        result.module,
        state.plan,
        lambda q: FakeQuantize(state.acts[q.name], q.scheme, stepwise=integer and stepwise),
    )
    return result


def _fused_outputs(graph: Graph, plan: Plan) -> dict[str, str]:
    """Return, per layer node, the quantizer that its kernel applies to its own output."""
    first = {q.source: q for q in plan.quantizers.values() if q.after is None and q.tied is None}
    fused: dict[str, str] = {}
    for layer in plan.layers.values():
        nodes = [n for n in graph.module.graph.nodes if n.name == layer.node]
        end = output_end(nodes[0])
        quantizer = first.get(end.name)
        if layer.op != "Conv2d" or quantizer is None:
            continue
        if {u.name for u in end.users} <= set(quantizer.consumers):
            fused[layer.node] = quantizer.name
    return fused


def apply_layer(module: nn.Module, layer: LayerPlan, state: QuantState) -> None:
    """Put the quantized weight and the snapped bias of one layer into its module."""
    weight = state.weights[layer.name]
    axis = layer.weight.axis if layer.weight else None
    parameter = module.weight
    assert isinstance(parameter, Tensor)
    device = parameter.device
    module.weight = _frozen(affine.dequantize_weight(weight, axis).to(device))
    bias = state.biases.get(layer.name)
    if bias is not None:
        module.bias = _frozen(snapped_bias(bias, layer, weight, state.acts).to(device))


def snapped_bias(
    bias: Tensor, layer: LayerPlan, weight: QTensor, acts: Mapping[str, QParams]
) -> Tensor:
    """Return the float32 bias on its int32 grid; unchanged where the layer's input is float."""
    if layer.input is None:
        return bias.float()
    scale = acts[layer.input].scale
    codes = affine.bias_codes(bias, scale, weight.scale)
    return codes.float() * affine.bias_scale(scale, weight.scale)


def insert_quantizers(
    module: fx.GraphModule, plan: Plan, make: Callable[[Quantizer], nn.Module]
) -> dict[str, fx.Node]:
    """Insert `make(quantizer)` behind the source of every quantizer, in place.

    Returns the new nodes by quantizer name. A source or consumer that is not in the graph is an
    internal error: plan and graph must belong together.
    """
    nodes = {n.name: n for n in module.graph.nodes}
    placed: dict[str, fx.Node] = {}
    for quantizer in plan.quantizers.values():
        missing = {quantizer.source, *quantizer.consumers} - nodes.keys()
        if missing:
            raise KeyError(f"plan names {sorted(missing)}, which the graph does not have")
        source = placed[quantizer.after] if quantizer.after else nodes[quantizer.source]
        target = quantizer_target(quantizer.name)
        module.add_submodule(target, make(quantizer))
        with module.graph.inserting_after(source):
            node = module.graph.call_module(target, (source,))
        for consumer in quantizer.consumers:
            nodes[consumer].replace_input_with(source, node)
        placed[quantizer.name] = node
    module.graph.lint()
    module.recompile()
    return placed


def quantizer_target(name: str) -> str:
    """Return the submodule name of a quantizer (no dots: those would nest)."""
    return "q_" + name.replace(".", "_")


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


class TorchRunner:
    """A graph behind the `Runner` interface: the float control, or the simulation as an oracle."""

    def __init__(self, graph: Graph, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.module = graph.module.to(self.device).eval()

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Run one batch (n, c, h, w) of normalized float32 images."""
        with torch.inference_mode():
            output: Tensor = self.module(torch.from_numpy(images).to(self.device))
        result: np.ndarray = output.float().cpu().numpy()
        return result

    def codes(self, images: np.ndarray, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Run one batch and return the codes of the named quantizers, and `output`."""
        walker = _CodeWalker(self.module, {quantizer_target(name): name for name in names})
        with torch.inference_mode():
            output: Tensor = walker.run(torch.from_numpy(images).to(self.device))
        return {**walker.codes, "output": output.float().cpu().numpy()}

    def close(self) -> None:
        """Nothing to free."""


class _CodeWalker(fx.Interpreter):
    """Runs a simulated graph and keeps the integer codes of chosen quantizers."""

    def __init__(self, module: fx.GraphModule, names: Mapping[str, str]) -> None:
        super().__init__(module)
        self.names = names
        self.codes: dict[str, np.ndarray] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if target in self.names and isinstance(module, FakeQuantize):
            kind = np.int8 if module.scheme.signed else np.uint8
            self.codes[self.names[target]] = module.codes(args[0]).cpu().numpy().astype(kind)
        return super().call_module(target, args, kwargs)
