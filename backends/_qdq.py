"""The only writer of ONNX: a folded graph with its quantizer's decisions in, a QDQ model out.

The float graph is exported with markers (`dfqc::Tap`) on every planned tensor and weight; an
onnx-ir pass then turns each marker into Q/DQ with integer initializers. Fake-quant ops are never
exported: the stock exporter silently drops 4-bit ranges. A planned tensor without its marker is
an error.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Mapping

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqc.backends._qdq_concat import share_concat_grids
from dfqc.backends._qdq_fuse import absorb_pads, drop_subsumed_activations, pool_on_integers
from dfqc.backends._qdq_stem import widen_stems
from dfqc.backends._qdq_write import QdqWriter
from dfqc.compiler.contracts import Lowered, QuantState
from dfqc.compiler.graph import Graph, copy_graph
from dfqc.compiler.simulate import insert_quantizers
from dfqc.compiler.spec import TargetSpec

TAP_DOMAIN = "dfqc"
LAYER_OPS = ("Conv", "Gemm", "MatMul")
CONV_DEFAULTS = {"group": 1, "auto_pad": "NOTSET", "dilations": [1, 1], "strides": [1, 1]}


class Tap(nn.Module):
    """A marker in the exported graph: `dfqc::Tap(x) {name}`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Return a symbolic copy of `x`."""
        return torch.onnx.ops.symbolic(
            f"{TAP_DOMAIN}::Tap",
            (x,),
            {"name": self.name},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )


class TappedLayer(nn.Module):
    """A Conv2d or Linear whose weight passes through a marker."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, name: str) -> None:
        super().__init__()
        self.layer = layer
        self.tap = Tap(name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        weight: Tensor = self.tap(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        y: Tensor = self.layer._conv_forward(x, weight, self.layer.bias)
        return y


def lower(
    graph: Graph,
    state: QuantState,
    target: TargetSpec,
    *,
    metadata: Mapping[str, str],
    finish: Callable[[ir.Model], None] = lambda model: None,
) -> Lowered:
    """Return the QDQ model of a folded graph as the target wants it written.

    Args:
        graph: folded graph; not modified.
        state: plan, codes, biases and grids.
        target: how this target wants Q/DQ, clips, biases and 4-bit weights.
        metadata: written into the model last, after all exporter metadata is stripped.
        finish: last rewrite of the target's own, before values are named.

    Raises:
        RuntimeError: a planned tensor or weight was not found in the exported model.
    """
    marked = copy_graph(graph)
    marked.module.to("cpu")
    insert_quantizers(marked.module, state.plan, lambda q: Tap(f"a:{q.name}"))
    for layer in state.plan.layers.values():
        if layer.weight is not None:
            _mark_weight(marked.module, layer.name, state.biases.get(layer.name))
    model = _export(marked)
    writer = QdqWriter(model, state, target)
    writer.run()
    absorb_pads(model)
    if target.placement == "inputs":
        share_concat_grids(model, writer.saturating)
    drop_subsumed_activations(model, writer.saturating)
    if target.placement == "integer":  # OpenVINO has an integer kernel for the mean itself
        pool_on_integers(model)
        widen_stems(model)
    finish(model)
    taps, layers = writer.name_values()
    return Lowered(_serialize(model, target, metadata), taps, layers)


def lower_float(graph: Graph, target: TargetSpec) -> bytes:
    """Return the unquantized model of a folded graph: the control of every benchmark."""
    copied = copy_graph(graph)
    copied.module.to("cpu")
    model = _export(copied)
    return _serialize(model, target, {"dfqc.float": "true"})


def _mark_weight(module: fx.GraphModule, name: str, bias: Tensor | None) -> None:
    """Swap the layer `name` for its tapped form, with a bias where the state has one."""
    parent, _, child = name.rpartition(".")
    layer = module.get_submodule(name)
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        raise RuntimeError(f"{name}: cannot lower the weight of a {type(layer).__name__}")
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().cpu().float(), requires_grad=False)
    setattr(module.get_submodule(parent), child, TappedLayer(layer, f"w:{name}"))


def _export(graph: Graph) -> ir.Model:
    """Export with a dynamic batch; the exporter's chatter goes to stderr, never to stdout."""
    example = torch.zeros(2, *graph.image.size)
    graph.module.eval()
    with (
        contextlib.redirect_stdout(sys.stderr),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph.module,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            opset_version=21,
            input_names=["input"],
            output_names=["output"],
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model


def _serialize(model: ir.Model, target: TargetSpec, metadata: Mapping[str, str]) -> bytes:
    """Strip, stamp, check and return the bytes; equal models give equal bytes."""
    for clean in (
        RemoveUnusedNodesPass(),
        RemoveUnusedOpsetsPass(),
        ClearMetadataAndDocStringPass(),
    ):
        clean(model)
    _strip_helpers(model)
    model.ir_version = target.ir_version
    model.opset_imports.clear()
    model.opset_imports[""] = target.opset
    for domain in sorted({node.domain for node in model.graph if node.domain}):
        model.opset_imports[domain] = 1
    model.producer_name, model.producer_version = "dfqc", None
    model.graph.name = "dfqc"
    model.metadata_props.clear()
    model.metadata_props.update(dict(sorted(metadata.items())))
    proto = ir.serde.serialize_model(model)
    del proto.graph.value_info[:]  # runtimes infer inner types; they are 3 % of a small file
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _strip_helpers(model: ir.Model) -> None:
    """Drop what a runtime derives itself: names of helper nodes, attributes at their defaults.

    In a small network they weigh as much as the 4-bit weights of several layers.
    """
    for node in model.graph:
        if node.op_type not in LAYER_OPS:
            node.name = None
        if node.op_type == "Conv":
            for name, default in CONV_DEFAULTS.items():
                attribute = node.attributes.get(name)
                if attribute is not None and _plain(attribute.value) == default:
                    del node.attributes[name]


def _plain(value: object) -> object:
    return list(value) if isinstance(value, (list, tuple)) else value
