"""A functional ATen fx.Graph and its tensors in, modules in place of its layers out."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from dfqc.compiler._aten import argument, data_nodes, op_name, pair, rank
from dfqc.compiler._blame import blame_node
from dfqc.compiler.errors import UnsupportedError

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """A call that can become a module: `tensors` maps the module's own names to get_attr nodes."""

    kind: type[nn.Module]
    input: fx.Node
    tensors: Mapping[str, fx.Node | None]
    config: Mapping[str, Any]


def raise_layers(graph: fx.Graph, state: Mapping[str, torch.Tensor]) -> dict[str, nn.Module]:
    """Replace convolutions, linears and batch norms by call_module nodes, in place.

    The module path is the parameter's own (`layer1.0.conv1.weight` -> `layer1.0.conv1`). The same
    parameters used twice are one module called twice. A layer whose weight is computed (weight
    standardization, weight norm) stays an ATen call, and so does one that reads only constants.
    Returns the modules by path.
    """
    modules: dict[str, nn.Module] = {}
    keys: dict[str, Any] = {}
    data = set(data_nodes(graph))
    for node in list(graph.nodes):
        layer = _match(node) if node in data else None
        if layer is None or not _is_plain(layer):
            continue
        path = _claim_path(layer, keys)
        if path not in modules:
            modules[path] = _build(layer, state)
        with graph.inserting_before(node):
            call = graph.call_module(path, (layer.input,))
        _replace(graph, node, call)
    return modules


def _match(node: fx.Node) -> Layer | None:
    """Recognize a layer call and read its arguments by position, keyword or default."""
    if node.op != "call_function":
        return None
    name = op_name(node)
    if name in ("conv2d", "conv_transpose2d") and node.target != aten.conv2d.padding:
        return _match_conv(node, transposed=name == "conv_transpose2d")
    if name == "convolution":
        return _match_convolution(node)
    if name == "linear":
        return _layer(nn.Linear, node.args[0], node.args[1], argument(node, 2), {})
    if name in ("addmm", "mm"):
        return _match_matmul(node, with_bias=name == "addmm")
    if name in ("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"):
        return _match_batch_norm(node, name)
    return None


def _match_conv(node: fx.Node, *, transposed: bool) -> Layer | None:
    values = [argument(node, i) for i in range(3, 8 if transposed else 7)]
    names = (
        ("stride", "padding", "output_padding", "groups", "dilation")
        if transposed
        else ("stride", "padding", "dilation", "groups")
    )
    config = {k: v if k == "groups" else pair(v) for k, v in zip(names, values, strict=True)}
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    return _layer(kind, node.args[0], node.args[1], argument(node, 2), config)


def _match_convolution(node: fx.Node) -> Layer | None:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    config: dict[str, Any] = {
        "stride": pair(stride),
        "padding": pair(padding),
        "dilation": pair(dilation),
        "groups": groups,
    }
    if transposed:
        config["output_padding"] = pair(output_padding)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    return _layer(kind, x, weight, bias, config)


def _match_matmul(node: fx.Node, *, with_bias: bool) -> Layer | None:
    """Recognize what decomposing `linear` leaves behind: bias + x @ weight.t()."""
    bias, x, matrix = node.args if with_bias else (None, *node.args)
    if node.kwargs or not isinstance(matrix, fx.Node):
        return None
    swapped = {"t": (), "permute": ([1, 0],), "transpose": (0, 1)}.get(op_name(matrix))
    if swapped is None or tuple(matrix.args[1:]) not in (swapped, tuple(reversed(swapped))):
        return None
    return _layer(nn.Linear, x, matrix.args[0], bias, {})


def _match_batch_norm(node: fx.Node, name: str) -> Layer | None:
    x, weight, bias, mean, var = (argument(node, i) for i in range(5))
    no_training = name == "_native_batch_norm_legit_no_training"
    training = False if no_training else argument(node, 5)
    if training or mean is None:
        raise UnsupportedError(
            f"{node.target}{blame_node(node)}: uses the statistics of the batch, expected a model "
            "in eval mode with running statistics; call model.eval() before exporting"
        )
    axes = rank(x)
    if axes not in (2, 3, 4):
        return None
    eps = argument(node, 6 if no_training else 7)
    kind = nn.BatchNorm2d if axes == 4 else nn.BatchNorm1d
    tensors = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    return Layer(kind, x, tensors, {"eps": eps, "affine": weight is not None})


def _layer(
    kind: type[nn.Module], x: Any, weight: Any, bias: Any, config: Mapping[str, Any]
) -> Layer | None:
    if not isinstance(weight, fx.Node) or rank(weight) != (2 if kind is nn.Linear else 4):
        return None
    return Layer(kind, x, {"weight": weight, "bias": bias}, config)


def _is_plain(layer: Layer) -> bool:
    return all(t is None or t.op == "get_attr" for t in layer.tensors.values())


def _claim_path(layer: Layer, keys: dict[str, Any]) -> str:
    """Name the module after its parameter; other uses of the same parameter get a suffix."""
    tensors = {name: str(t.target) for name, t in layer.tensors.items() if t is not None}
    owner = tensors.get("weight") or tensors["running_mean"]
    parent, _, leaf = owner.rpartition(".")
    base = parent if parent and leaf in ("weight", "running_mean") else owner
    key = (layer.kind, tensors, dict(layer.config))
    path, count = base, 1
    while keys.setdefault(path, key) != key:
        count += 1
        path = f"{base}_{count}"
    return path


def _build(layer: Layer, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Make the module around copies of the tensors; nothing is drawn at random."""
    tensors = {
        name: state[str(t.target)].detach().clone()
        for name, t in layer.tensors.items()
        if t is not None
    }
    module = _empty_module(layer, tensors)
    for name, tensor in tensors.items():
        if name.startswith("running_"):
            setattr(module, name, tensor)
        else:
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        module.num_batches_tracked = torch.zeros((), dtype=torch.long)
    return module.eval()


def _empty_module(layer: Layer, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    config = dict(layer.config)
    if layer.kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        return layer.kind(len(tensors["running_mean"]), device="meta", **config)
    weight, bias = tensors["weight"], "bias" in tensors
    if layer.kind is nn.Linear:
        return nn.Linear(weight.shape[1], weight.shape[0], bias=bias, device="meta")
    groups = int(config["groups"])
    first, second = weight.shape[0], weight.shape[1] * groups
    channels = (first, second) if layer.kind is nn.ConvTranspose2d else (second, first)
    if layer.kind is nn.ConvTranspose2d:
        channels = (weight.shape[0], weight.shape[1] * groups)
    return layer.kind(*channels, tuple(weight.shape[2:]), bias=bias, device="meta", **config)


def _replace(graph: fx.Graph, node: fx.Node, call: fx.Node) -> None:
    """Put `call` in the place of `node`, which may be an operator with several outputs."""
    call.meta.update(node.meta)
    if not isinstance(node.meta.get("val"), (tuple, list)):
        node.replace_all_uses_with(call)
    for item in list(node.users):
        if item.target is operator.getitem and item.args[1] == 0:
            call.meta["val"] = item.meta.get("val")
            item.replace_all_uses_with(call)
            graph.erase_node(item)
    if not node.users:
        graph.erase_node(node)
