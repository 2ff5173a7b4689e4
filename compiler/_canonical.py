"""A functional ATen fx.Graph in; the same function with one spelling per operator out.

What later stages may rely on: ReLU is `relu(x)`; every two-sided clamp, ReLU6 too, is
`hardtanh(x, low, high)`; global average pooling is `mean.dim(x, [2, 3], keepdim)`; views are
`reshape`; padding is `pad(x, widths, mode, value)`; convolutions pad by numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dfqc.compiler._aten import argument, op_name, pair, rank

aten = torch.ops.aten


def canonicalize(graph: fx.Graph) -> None:
    """Rewrite the operators of `graph` to their canonical spelling, in place."""
    for node in list(graph.nodes):
        name = op_name(node)
        if name in ("relu6", "hardtanh", "clamp", "clamp_min", "clip"):
            _rewrite_clamp(graph, node)
        elif name == "adaptive_avg_pool2d" and _sizes(node.args[1]) == [1, 1]:
            # What ATen itself computes for an output of 1x1.
            _swap(graph, node, aten.mean.dim, (node.args[0], [2, 3], True))
        elif name == "mean" and node.target == aten.mean.dim:
            _rewrite_mean(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            # A view may depend on strides, and the copies that made them right are removed.
            node.target = aten.reshape.default
        elif name in ("reshape_as", "view_as"):
            _rewrite_reshape_as(graph, node)
        elif name in ("pad", "constant_pad_nd"):
            _rewrite_pad(graph, node, name)
        elif node.target == aten.conv2d.padding:
            _rewrite_same_padding(graph, node)
        elif name in ("add", "sub") and node.kwargs.get("alpha") == 1:
            node.kwargs = {}


def _rewrite_clamp(graph: fx.Graph, node: fx.Node) -> None:
    name = op_name(node)
    if node.target in (aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clip.Tensor):
        return
    low = 0.0 if name == "relu6" else argument(node, 1)
    high = 6.0 if name == "relu6" else None if name == "clamp_min" else argument(node, 2)
    if low == 0 and high is None:
        _swap(graph, node, aten.relu.default, (node.args[0],))
    elif isinstance(low, (int, float)) and isinstance(high, (int, float)):
        _swap(graph, node, aten.hardtanh.default, (node.args[0], float(low), float(high)))


def _rewrite_mean(node: fx.Node) -> None:
    axes, dims = rank(node.args[0]), argument(node, 1)
    if axes is not None and dims:
        keep = bool(argument(node, 2))
        node.args = (node.args[0], sorted(d % axes for d in dims), keep)


def _rewrite_reshape_as(graph: fx.Graph, node: fx.Node) -> None:
    """Write the shape as numbers, so that the tensor it was copied from is not read for it."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        sizes = [s if isinstance(s, int) else -1 for s in value.shape]
        if sizes.count(-1) <= 1:
            _swap(graph, node, aten.reshape.default, (node.args[0], sizes))


def _rewrite_pad(graph: fx.Graph, node: fx.Node, name: str) -> None:
    mode, value = "constant", argument(node, 2)
    if name == "pad":
        mode, value = argument(node, 2), argument(node, 3)
    if mode == "constant":
        value = float(value or 0)
    _swap(graph, node, aten.pad.default, (node.args[0], list(_sizes(node.args[1])), mode, value))


def _rewrite_same_padding(graph: fx.Graph, node: fx.Node) -> None:
    """Write `same` and `valid` as numbers; an odd `same` pads one more at the end, as ATen does."""
    x, weight = node.args[:2]
    stride, dilation = pair(argument(node, 3)), pair(argument(node, 5))
    assert isinstance(weight, fx.Node)
    kernel = weight.meta["val"].shape[2:]
    mode = argument(node, 4)
    total = [
        d * (int(k) - 1) if mode == "same" else 0 for k, d in zip(kernel, dilation, strict=True)
    ]
    padding = [t // 2 for t in total]
    extra = [t % 2 for t in total]
    with graph.inserting_before(node):
        if any(extra):
            assert isinstance(x, fx.Node)
            before = x
            x = graph.create_node(
                "call_function",
                aten.pad.default,
                (x, [0, extra[1], 0, extra[0]], "constant", 0.0),
            )
            x.meta["val"] = before.meta["val"]  # the rank is all that is read
    args = (
        x,
        weight,
        argument(node, 2),
        list(stride),
        padding,
        list(dilation),
        argument(node, 6),
    )
    _swap(graph, node, aten.conv2d.default, args)


def _swap(graph: fx.Graph, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.create_node("call_function", target, args)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _sizes(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []
