"""Weights that learn how to round: a layer and its grid in, a module with a soft weight out.

Two ways. Soft rounding (Nagel et al. 2020, eq. 21-24) learns a position h(V) in [0, 1] between the
two codes around each weight; the codes below, floor(w / s0), are frozen, so that the step s can be
learned beside it (Genie-M, Jeon et al. 2023: joint step size and rounding). FlexRound (Lee et al.
2023) learns by what each weight is divided before it is rounded.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqc.compiler import affine
from dfqc.compiler.contracts import QTensor, WeightGrid

LEAN = 0.6  # towards given codes; above 1/2, so that rounding gives them
INSIDE = 0.4  # steps from its code at which a weight begins; at 0.5, noise would move it on
ZETA, GAMMA = 1.1, -0.1  # h(V) is stretched to [GAMMA, ZETA] and cut off at [0, 1]
_MANY = 288  # weights per output from which on rates are not lowered
_SEVERAL = 128  # and from which on they also have common factors
Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Units:
    """Sizes of a layer's scales and biases, (channels,): steps of learning are parts of these."""

    scale: Tensor
    bias: Tensor


class LearnedWeight(nn.Module, abc.ABC):
    """A convolution or linear layer whose weight is on its way to its grid.

    `soft` tells whether the weight is between codes (while it is trained) or on them. Weights of
    `layer` that are exactly zero were pruned: their codes stay 0.
    """

    def __init__(
        self, layer: Layer, grid: WeightGrid, least: Tensor | None, units: Units | None
    ) -> None:
        """Wrap `layer`; `least` is the smallest scale per channel that its bias allows.

        With `units`, scale and bias are learned as multiples of those: steps of an optimizer then
        have a size that suits every channel.
        """
        super().__init__()
        self.layer = layer
        self.soft = False
        device = layer.weight.device
        shape = (-1,) + (1,) * (layer.weight.dim() - 1)
        self.levels = grid.levels
        dense = layer.weight.detach() != 0
        self.register_buffer("dense", None if dense.all() else dense.to(layer.weight))
        self.register_buffer("low", grid.low.to(device).view(shape))
        self.register_buffer("least", (torch.zeros(1) if least is None else least).to(device))
        scale = grid.scale.to(device).view(shape)
        ones = torch.ones_like(grid.scale)
        units = units or Units(ones, ones)
        self.register_buffer("scale_unit", units.scale.to(device).view(shape))
        self.register_buffer("bias_unit", units.bias.to(device))
        self.scale_ratio = nn.Parameter(scale / self.scale_unit, requires_grad=False)
        self.bias_ratio = None
        if layer.bias is not None:
            self.bias_ratio = nn.Parameter(layer.bias.detach() / self.bias_unit)
        self.dense: Tensor | None
        self.low: Tensor
        self.least: Tensor
        self.scale_unit: Tensor
        self.bias_unit: Tensor

    @property
    def scale(self) -> Tensor:
        """Return the scale of each channel, shaped to broadcast over the weight."""
        return self.scale_ratio * self.scale_unit

    @property
    def bias(self) -> Tensor | None:
        """Return the bias, (channels,)."""
        return None if self.bias_ratio is None else self.bias_ratio * self.bias_unit

    @abc.abstractmethod
    def codes(self) -> Tensor:
        """Return the weight in steps: codes once it is hard, between codes while it is soft."""

    def on_grid(self, codes: Tensor) -> Tensor:
        """Return codes cut off at the ends of the grid, those of pruned weights zero."""
        codes = affine.clamp_codes(codes, self.low, self.levels)
        return codes if self.dense is None else codes * self.dense

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for `x` with the learned weight."""
        weight = self.codes() * self.scale
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.bias)
        out: Tensor = self.layer._conv_forward(x, weight, self.bias)
        return out

    def hold_scale(self) -> None:
        """Keep the scale positive and large enough for the bias, after a step of an optimizer."""
        with torch.no_grad():
            floor = self.least.view(-1, *self.scale.shape[1:]).clamp_min(affine.SMALLEST_SCALE)
            self.scale_ratio.copy_(torch.maximum(self.scale.abs(), floor) / self.scale_unit)

    @torch.no_grad()
    def quantized(self) -> QTensor:
        """Return the codes and scales as they are exported."""
        soft, self.soft = self.soft, False
        codes = self.codes().round().to(torch.int8).cpu()
        self.soft = soft
        return QTensor(codes, self.scale.detach().flatten().float().cpu().clone())


class LearnedRounding(LearnedWeight, abc.ABC):
    """A weight that begins between two codes, on one of them once it is hard."""

    def __init__(
        self, layer: Layer, grid: WeightGrid, least: Tensor | None, units: Units | None
    ) -> None:
        """Wrap `layer`; see `LearnedWeight`."""
        super().__init__(layer, grid, least, units)
        self.register_buffer("free", None)
        self.free: Tensor | None  # where rounding is learned, 0 or 1; None: everywhere

    def learn_nearest_halfway(self, share: float) -> None:
        """Learn the rounding of that share of the weights; the others keep the codes they have.

        Taken are the float weights nearest to the boundary of the code they begin on, from either
        side: a closed form puts some beyond it. Call it before anything is learned.
        """
        position = self.layer.weight.detach() / self.scale.detach()
        soft, self.soft = self.soft, False
        beside = (position - self.codes().detach()).abs()  # the code
        self.soft = soft
        order = (beside - 1 / 2).abs().flatten().argsort(stable=True)
        count = max(1, round(share * len(order)))
        if count < len(order):
            free = torch.zeros_like(order, dtype=position.dtype)
            free[order[:count]] = 1
            self.free = free.view_as(position)


class SoftRounding(LearnedRounding):
    """Soft rounding: weight = s * clip(floor(w / s0) + h(V), grid), hard where h(V) >= 1/2."""

    def __init__(
        self,
        layer: Layer,
        grid: WeightGrid,
        least: Tensor | None = None,
        start: Tensor | None = None,
        units: Units | None = None,
    ) -> None:
        """Begin at the float weight; with `start` (codes of a closed form) leaning to those.

        The codes between which a weight chooses then are its start and the one on the other side
        of the weight.
        """
        super().__init__(layer, grid, least, units)
        position = layer.weight.detach() / self.scale.detach()
        base = position.floor()
        if start is not None:
            codes = start.to(position)
            base = torch.where(codes > base, codes - 1, codes)
        share = (position - base).clamp(0, 1)
        if start is not None:
            share = (1 - LEAN) * share + LEAN * (codes - base)
        self.register_buffer("base", base)
        self.position = nn.Parameter(_inverse(share))
        self.register_buffer("upper", (self.position.detach() >= 0).to(base))
        self.base: Tensor
        self.upper: Tensor  # which of the two codes each weight begins on

    def share(self) -> Tensor:
        """Return h(V): how far each weight is on its way from the lower code to the upper one."""
        return (self.position.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def codes(self) -> Tensor:
        """Return base + h(V), or base + [h(V) >= 1/2], inside the grid."""
        up = self.share() if self.soft else (self.position >= 0).to(self.base)
        if self.free is not None:
            up = torch.where(self.free > 0, up, self.upper)
        return self.on_grid(self.base + up)

    def undecided(self, power: float) -> Tensor:
        """Return sum(1 - |2 h(V) - 1|^power), which is 0 once every weight is on a code."""
        left = 1 - (2 * self.share() - 1).abs().pow(power)
        return left.sum() if self.free is None else (left * self.free).sum()


class FlexRounding(LearnedRounding):
    """FlexRound: weight = s * clip(round(w / (s0 * S * s3)), grid), all divisors learned.

    The step s0 inside of the rounding is frozen, as in soft rounding: another step is then no other
    code.

    S has one factor per weight and s3 one per output and (for convolutions) per input channel, all
    1 in the beginning; the gradient passes through the rounding as if it were not there.
    """

    def __init__(
        self,
        layer: Layer,
        grid: WeightGrid,
        least: Tensor | None = None,
        start: Tensor | None = None,
        units: Units | None = None,
    ) -> None:
        """Begin at rounding to nearest; with `start`, at the nearest weight with those codes."""
        super().__init__(layer, grid, least, units)
        weight = layer.weight.detach()
        # A step of learning moves the widest codes of any grid by the same share of a code, and
        # fewer of them where an output has few: there, each code that flips moves it by more.
        self.reach = 4 / grid.levels * min(1.0, (weight[0].numel() / _MANY) ** 0.5)
        # Where outputs have few weights, a common factor flips a good part of an output's codes
        # at once: on MobileNetV1 a unit's loss grew eightfold.
        self.together = weight[0].numel() >= _SEVERAL
        if start is not None:
            # Dividing cannot turn a sign, nor leave zero: the weight itself moves to its code.
            codes, position = start.to(weight), weight / self.scale.detach()
            inside = torch.minimum(torch.maximum(position, codes - INSIDE), codes + INSIDE)
            weight = inside * self.scale.detach()
        self.register_buffer("steps", weight / self.scale.detach())
        self.factors = nn.Parameter(torch.zeros_like(weight))
        self.rows = nn.Parameter(torch.zeros_like(self.scale_ratio))
        inputs = [1, weight.shape[1]] + [1] * (weight.dim() - 2)
        self.columns = nn.Parameter(torch.zeros(inputs, device=weight.device))
        self.steps: Tensor

    def shared(self) -> Tensor | float:
        """Return what weights of one output, or of one input, are divided by together."""
        return self.rows + self.columns if self.together else 0.0

    def codes(self) -> Tensor:
        """Return the nearest codes of the divided weight."""
        growth = (self.factors + self.shared()) * self.reach
        growth = growth if self.free is None else growth * self.free
        divided = self.steps / growth.exp()
        return self.on_grid(_round_through(divided))


def _inverse(share: Tensor) -> Tensor:
    """Return V with h(V) = share."""
    return -torch.log((ZETA - GAMMA) / (share - GAMMA) - 1)


def _round_through(value: Tensor) -> Tensor:
    """Round; the gradient passes unchanged (straight-through estimator)."""
    return value + (value.round() - value).detach()
