"""Small rewrites that let integer kernels form: a QDQ model in, the same function out.

Each keeps the function of the file exactly: pads move into convolutions, activations that a
quantizer's saturation repeats are dropped, and global means become pools on integer codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

RELU6_SLACK = 1e-6  # a grid that ends within one part in a million of 6 rounds to the same codes


def absorb_pads(model: ir.Model) -> None:
    """Move constant zero pads of height and width into the convolutions that read them.

    A Pad between DQ and Conv would keep the convolution in float. On an integer grid the engine
    pads with the zero point, which is zero.
    """
    for node in list(model.graph):
        if node.op_type != "Pad":
            continue
        pads = _spatial_pads(node)
        users = [use.node for use in node.outputs[0].uses()]
        if pads is None or not users or any(user.op_type != "Conv" for user in users):
            continue
        if any(use.idx != 0 for use in node.outputs[0].uses()) or node.outputs[0].is_graph_output():
            continue
        for user in users:
            own = list(user.attributes["pads"].as_ints()) if "pads" in user.attributes else [0] * 4
            total = [a + b for a, b in zip(own, pads, strict=True)]
            user.attributes["pads"] = ir.AttrInt64s("pads", total)
        _bypass(model, node)


def _spatial_pads(node: ir.Node) -> list[int] | None:
    """Return [top, left, bottom, right] of a zero pad on (n, c, h, w), or None."""
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        value = _const(node.inputs[2])
        if value is None or float(value.reshape(-1)[0]) != 0:
            return None
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return None
    pads = _const(node.inputs[1])
    if pads is None or pads.size != 8 or (pads < 0).any():
        return None
    flat = [int(p) for p in pads]
    if any(flat[i] for i in (0, 1, 4, 5)):
        return None
    return [flat[2], flat[3], flat[6], flat[7]]


def drop_subsumed_activations(
    model: ir.Model, saturating: Mapping[int, tuple[float, float]]
) -> None:
    """Drop ReLU and ReLU6 whose only reader is a quantizer that saturates at the same ends."""
    for node in list(model.graph):
        ends = _activation_interval(node)
        if ends is None or node.outputs[0].is_graph_output():
            continue
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or uses[0].idx != 0 or id(uses[0].node) not in saturating:
            continue
        low, high = saturating[id(uses[0].node)]
        if low < ends[0] or high > ends[1] * (1 + RELU6_SLACK):
            continue
        _bypass(model, node)


def _activation_interval(node: ir.Node) -> tuple[float, float] | None:
    """Return the interval of a ReLU-like node, or None for any other node."""
    if node.domain == "" and node.op_type == "Relu":
        return 0.0, math.inf
    if node.domain == "" and node.op_type == "Clip" and len(node.inputs) == 3:
        low, high = _const(node.inputs[1]), _const(node.inputs[2])
        floats = low is not None and high is not None and low.dtype == np.float32
        if floats and low is not None and high is not None:
            return float(low), float(high)
    return None


def pool_on_integers(model: ir.Model) -> None:
    """Write a mean over height and width behind a DQ as GlobalAveragePool, flattened on codes.

    ReduceMean has no integer kernel. Flatten moves behind Q (and its clip), so that the pool
    keeps Q as its only reader and the next layer keeps DQ as its input.
    """
    for node in list(model.graph):
        if node.op_type != "ReduceMean" or not is_global_mean(node):
            continue
        source = node.inputs[0]
        if source is None or (source.producer() or node).op_type != "DequantizeLinear":
            continue
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != "QuantizeLinear":
            continue
        if node.outputs[0].is_graph_output():
            continue
        pool = ir.node("GlobalAveragePool", [source])
        model.graph.insert_before(node, [pool])
        keep = node.attributes.get("keepdims")
        flat = keep is not None and keep.as_int() == 0
        ir.convenience.replace_all_uses_with(node.outputs[0], pool.outputs[0])
        model.graph.remove(node, safe=True)
        if flat:
            _flatten_behind(model, uses[0].node)


def _flatten_behind(model: ir.Model, quantize: ir.Node) -> None:
    """Insert Flatten between the codes of `quantize` and their DQ."""
    last = quantize
    readers = [use.node for use in last.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type == "Clip":
        last = readers[0]
    flatten = ir.node("Flatten", [last.outputs[0]], {"axis": 1})
    codes = last.outputs[0]
    uses = [use for use in codes.uses() if use.node is not flatten]
    for use in uses:
        use.node.replace_input_with(use.idx, flatten.outputs[0])
    model.graph.insert_after(last, [flatten])


def is_global_mean(node: ir.Node) -> bool:
    """Report whether a ReduceMean is over height and width."""
    axes = _const(node.inputs[1]) if len(node.inputs) > 1 else None
    return axes is not None and sorted(int(a) for a in axes.reshape(-1)) in ([2, 3], [-2, -1])


def _bypass(model: ir.Model, node: ir.Node) -> None:
    """Remove a node; its readers read its first input."""
    source = node.inputs[0]
    assert source is not None
    ir.convenience.replace_all_uses_with(node.outputs[0], source)
    model.graph.remove(node, safe=True)


def _const(value: ir.Value | None) -> np.ndarray | None:
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
