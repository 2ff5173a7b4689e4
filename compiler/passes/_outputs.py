"""A layer and what follows it in; predicted means and variances of its outputs, and fixes, out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqc.compiler.graph import Graph, layer_nodes
from dfqc.compiler.moments import Moments
from dfqc.compiler.passes._layers import (
    bias_or_zero,
    count_calls,
    dense_weight,
    norm_affine,
    readers,
)
from dfqc.compiler.passes._patches import PatchMoments, tap_correlation, tap_places
from dfqc.compiler.passes._reads import Read
from dfqc.compiler.passes._restoration import Filters

MOST = 2.0  # a variance is not corrected by more than this factor of the standard deviation


@dataclass(frozen=True)
class Outputs:
    """Where a layer's outputs are corrected: the batch norm that alone reads it, or itself."""

    layer: nn.Conv2d | nn.Linear
    norm: nn.BatchNorm2d | nn.BatchNorm1d | None

    def shift_mean(self, shift: Tensor) -> None:
        """Undo a shift (channels,) of the layer's mean output."""
        if self.norm is not None:
            mean = self.norm.running_mean
            assert mean is not None
            mean.copy_(mean.double() + shift.to(mean.device))
            return
        bias = bias_or_zero(self.layer, len(shift)).cpu() - shift
        self.layer.bias = nn.Parameter(bias.to(self.layer.weight), requires_grad=False)

    def scale_variance(self, wanted: Tensor, found: Tensor) -> None:
        """Give outputs of variance `found` the variance `wanted`; only a batch norm can.

        Without one nothing says what the mean is that must stay.
        """
        if self.norm is None:
            return
        good = (wanted > 0) & (found > 0)
        ratio = torch.where(good, found / wanted.clamp_min(1e-30), torch.ones_like(found))
        ratio = ratio.clamp(1 / MOST**2, MOST**2)
        var = self.norm.running_var
        assert var is not None
        var.copy_((var.double() + self.norm.eps) * ratio.to(var.device) - self.norm.eps)

    def scale(self) -> Tensor:
        """Return what folding multiplies every output channel by, (channels,) float64."""
        if self.norm is None:
            return torch.ones(self.layer.weight.shape[0], dtype=torch.float64)
        return norm_affine(self.norm)[0].cpu()


@dataclass(frozen=True)
class Fitted:
    """Part of a weight whose channels' moments are known; `keep` counts from its first channel."""

    moments: PatchMoments
    read: Read
    keep: Tensor


def find_outputs(graph: Graph, path: str) -> Outputs:
    """Return where the outputs of a layer are corrected."""
    layer = graph.module.get_submodule(path)
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    node = dict(layer_nodes(graph))[path]
    return Outputs(layer, _own_norm(graph, node))


def _own_norm(graph: Graph, node: fx.Node) -> nn.BatchNorm2d | nn.BatchNorm1d | None:
    calls = count_calls(graph)
    users = readers(node)
    if len(users) != 1 or users[0].op != "call_module" or calls[str(users[0].target)] != 1:
        return None
    module = graph.module.get_submodule(str(users[0].target))
    if not isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)) or calls[str(node.target)] != 1:
        return None
    return module


def find_filters(graph: Graph, path: str) -> Filters:
    """Return a layer's filters with the batch norm behind it; one that does nothing without.

    Filters of different groups have no input in common.
    """
    outputs = find_outputs(graph, path)
    weight = dense_weight(outputs.layer).cpu().double().flatten(1)
    bias = bias_or_zero(outputs.layer, len(weight)).cpu()
    norm, ones = outputs.norm, torch.ones(len(weight), dtype=torch.float64)
    if norm is None:
        return Filters(weight, 0 * ones, ones, ones, bias, ones)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = (v.detach().cpu().double() for v in (norm.running_mean, norm.running_var))
    gamma = ones if norm.weight is None else norm.weight.detach().cpu().double()
    beta = 0 * ones if norm.bias is None else norm.bias.detach().cpu().double()
    return Filters(weight, mean - bias, variance, gamma, beta, outputs.scale())


def predict_mean(layer: nn.Conv2d | nn.Linear, weight: Tensor, maps: Moments) -> Tensor:
    """Return the mean over positions of `weight` applied to the expected input, (channels,).

    Zero padding counts: at the border fewer taps see the image.
    """
    if isinstance(layer, nn.Linear):
        return F.linear(maps.mean, weight).flatten(0, -2).mean(0)
    padded = F.pad(maps.mean, layer._reversed_padding_repeated_twice)
    out = F.conv2d(
        padded, weight, stride=layer.stride, dilation=layer.dilation, groups=layer.groups
    )
    return out.mean((0, 2, 3))


def predict_variance(
    layer: nn.Conv2d | nn.Linear,
    before: Tensor,
    after: Tensor,
    maps: Moments,
    parts: Sequence[Fitted],
) -> tuple[Tensor, Tensor]:
    """Return the variances (channels,) of the outputs of two weights of one shape.

    Channels of `parts` vary as their moments say; the others are taken as independent with
    correlated neighbors.
    """
    rest = torch.ones(before.shape[:2], dtype=torch.bool)
    totals = [torch.zeros(len(before), dtype=torch.float64) for _ in range(2)]
    for part in parts:
        read, moments = part.read, part.moments
        rest[read.rows, read.columns] = False
        old, new = read.take(before), read.take(after)[:, part.keep]
        totals[0][read.rows] += moments.predict(old, moments.target_rows())
        totals[1][read.rows] += moments.predict(new, moments.kept_rows())
    var = maps.var.reshape(-1, maps.var.shape[-1]).mean(0)
    taps = torch.ones(1, 1, dtype=torch.float64)
    if isinstance(layer, nn.Conv2d):
        var, taps = maps.var.mean((0, 2, 3)), tap_correlation(tap_places(layer))
        groups = layer.groups
        var = var.view(groups, 1, -1).expand(-1, len(before) // groups, -1)
        var = var.reshape(len(before), -1)
    for total, weight in zip(totals, (before, after), strict=True):
        flat = weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]
        total += ((flat @ taps * flat).sum(2) * var * rest).sum(1)
    return totals[0], totals[1]
