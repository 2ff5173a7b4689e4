"""What placement and the passes know of operators: which stay on a grid, which cannot be negative.

In: nodes of a folded graph. Out: facts that hold for any input.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
RELU = _aten.relu.default
CLIP = _aten.hardtanh.default
ADD = _aten.add.Tensor
CAT = _aten.cat.default
MAX_POOL = _aten.max_pool2d.default
PAD = _aten.pad.default
CONSTANT_PAD = _aten.constant_pad_nd.default

# Ops whose output values are values of their input (or zero): a grid survives them.
GRID_PRESERVING = frozenset(
    {
        MAX_POOL,
        _aten.flatten.using_ints,
        _aten.reshape.default,
        _aten.view.default,
        _aten.permute.default,
        _aten.transpose.int,
        _aten.squeeze.dim,
        _aten.unsqueeze.default,
        _aten.slice.Tensor,
        _aten.contiguous.default,
        _aten.clone.default,
        PAD,
        CONSTANT_PAD,
        _aten.pixel_shuffle.default,
        _aten.channel_shuffle.default,
    }
)
NONNEGATIVE = frozenset({RELU, _aten.sigmoid.default, _aten.hardsigmoid.default, _aten.softmax.int})


def is_fused_activation(node: fx.Node) -> bool:
    """Report whether `node` is a ReLU or ReLU6, which a quantizer's saturation can replace."""
    if node.op != "call_function":
        return False
    if node.target is RELU:
        return True
    return node.target is CLIP and tuple(node.args[1:]) in {(0.0, 6.0), (0, 6), (0, 6.0)}


def is_spatial_zero_pad(node: fx.Node) -> bool:
    """Report whether `node` pads height and width with zeros (what a convolution can absorb)."""
    if node.op != "call_function" or node.target not in (PAD, CONSTANT_PAD):
        return False
    pads = node.args[1]
    if not isinstance(pads, (list, tuple)) or len(pads) > 4:
        return False
    if not all(isinstance(p, int) and p >= 0 for p in pads):
        return False
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    return (node.target is CONSTANT_PAD or mode == "constant") and not _pad_value(node)


def stays_on_grid(node: fx.Node) -> bool:
    """Report whether the values of `node` are values of its first input, or zero.

    A maximum pool never lets the -inf through that it is padded with; other constants would be
    cut off at the ends of the grid.
    """
    if node.op != "call_function" or node.target not in GRID_PRESERVING:
        return False
    value = _pad_value(node)
    return not value or value == -math.inf


def _pad_value(node: fx.Node) -> Any:
    """Return the constant that a padding fills in; None for any other op."""
    if node.target is PAD:
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        return value if mode == "constant" else None
    if node.target is CONSTANT_PAD:
        return node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0)
    return None


def is_nonnegative(node: fx.Node) -> bool:
    """Report whether the values of `node` are structurally >= 0."""
    if is_fused_activation(node):
        return True
    if node.op != "call_function":
        return False
    if node.target in NONNEGATIVE:
        return True
    if stays_on_grid(node) or node.target in (
        _aten.mean.dim,
        _aten.avg_pool2d.default,
        _aten.adaptive_avg_pool2d.default,
    ):
        return isinstance(node.args[0], fx.Node) and is_nonnegative(node.args[0])
    if node.target is CAT:
        parts = node.args[0]
        assert isinstance(parts, (list, tuple))
        return all(isinstance(p, fx.Node) and is_nonnegative(p) for p in parts)
    return False


def output_end(node: fx.Node) -> fx.Node:
    """Return the node whose output ends the integer kernel: a ReLU behind `node`, or itself."""
    users = list(node.users)
    if len(users) == 1 and is_fused_activation(users[0]):
        return users[0]
    return node


def join_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that an add or a concat joins, or nothing."""
    if node.op != "call_function":
        return []
    if node.target is ADD and len(node.args) == 2 and "alpha" not in node.kwargs:
        return [a for a in node.args if isinstance(a, fx.Node)] if _two_nodes(node) else []
    if node.target is CAT:
        parts = node.args[0]
        assert isinstance(parts, (list, tuple))
        return [p for p in parts if isinstance(p, fx.Node)]
    return []


def _two_nodes(node: fx.Node) -> bool:
    return all(isinstance(a, fx.Node) for a in node.args)
