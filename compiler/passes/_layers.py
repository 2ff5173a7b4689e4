"""What passes over layers share: a node in, its layer, readers and channel-wise products out."""

from __future__ import annotations

from collections import Counter
from typing import TypeAlias, cast

import torch
from torch import fx, nn

from dfqc.compiler._aten import op_name
from dfqc.compiler.graph import LAYER_TYPES, Graph

Layer: TypeAlias = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


def as_layer(graph: Graph, node: fx.Node, calls: Counter[str]) -> Layer | None:
    """Return the layer module of a node if it is one and is called only here."""
    if node.op != "call_module" or calls[str(node.target)] != 1:
        return None
    module = graph.module.get_submodule(str(node.target))
    return module if isinstance(module, LAYER_TYPES) else None


def readers(node: fx.Node) -> list[fx.Node]:
    """List the users that read the values of a node, not only its shape."""
    return [user for user in node.users if not op_name(user).startswith("sym_")]


def count_calls(graph: Graph) -> Counter[str]:
    """Count the calls of every module path."""
    nodes = graph.module.graph.nodes
    return Counter(str(n.target) for n in nodes if n.op == "call_module")


def norm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch norm in eval mode as scale and shift per channel, in double precision."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def scale_outputs(layer: Layer, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return `weight` with output channel i multiplied by `scale[i]`."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (groups, in, out, kh, kw)
    return (grouped * scale.reshape(layer.groups, 1, -1, 1, 1)).flatten(0, 1)


def spread_inputs(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    """Shape one value per input channel so that it broadcasts against the layer's weight."""
    if isinstance(layer, nn.Linear):
        return values.reshape(1, -1)
    if isinstance(layer, nn.ConvTranspose2d):
        return values.reshape(-1, 1, 1, 1)
    per_group = values.reshape(layer.groups, 1, -1, 1, 1)
    repeated = per_group.expand(-1, layer.out_channels // layer.groups, -1, -1, -1)
    return repeated.flatten(0, 1)


def dense_weight(layer: nn.Conv2d | nn.Linear) -> torch.Tensor:
    """Return a weight as (outputs, all inputs, height, width), zeros between groups."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        return weight[:, :, None, None]
    if layer.groups == 1:
        return weight
    blocks = weight.new_zeros(layer.out_channels, layer.in_channels, *layer.kernel_size)
    rows, columns = (count // layer.groups for count in (layer.out_channels, layer.in_channels))
    for i in range(layer.groups):
        own = slice(i * rows, (i + 1) * rows)
        blocks[own, i * columns : (i + 1) * columns] = weight[own]
    return blocks


def output_rows(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """Return what makes every output channel as a row, (outputs, inputs of its group * taps)."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return weight.flatten(1)
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (groups, in, out, kh, kw)
    return grouped.transpose(1, 2).flatten(0, 1).flatten(1)


def input_taps(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """Return what reads every input channel, (inputs, outputs of its group, taps)."""
    if isinstance(layer, nn.Linear):
        return weight.T.unsqueeze(2)
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.flatten(2)
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (groups, out, in, kh, kw)
    return grouped.transpose(1, 2).flatten(0, 1).flatten(2)


def sum_shift(layer: Layer, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return what a constant input `shift` adds to each output channel."""
    if isinstance(layer, nn.ConvTranspose2d):
        return torch.zeros(layer.out_channels, dtype=torch.double)  # only folded without shift
    return (weight * spread_inputs(layer, shift)).flatten(1).sum(1)


def sees_no_border(layer: Layer) -> bool:
    """Report whether every output of the layer sums over all taps of the kernel."""
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not any(cast("tuple[int, int]", layer.padding))
    return isinstance(layer, nn.Linear)


def bias_or_zero(layer: Layer, channels: int) -> torch.Tensor:
    """Return the bias in double precision, zeros where the layer has none."""
    if layer.bias is None:
        return torch.zeros(channels, dtype=torch.double, device=layer.weight.device)
    bias: torch.Tensor = layer.bias
    return bias.detach().double()


def assign(layer: Layer, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Give a layer a new weight and bias, in the precision that it had."""
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype).contiguous(), requires_grad=False)
