"""Weights and activations of a network that is trained on its grids: float layers in, modules out.

LSQ (Esser et al. 2020) learns the step of a weight, or of an activation, with the weights behind
it; the lineage of GDFQ takes the step from the weights' extremes in every pass, and follows the
range of an activation by a moving mean.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqc.compiler import affine
from dfqc.compiler.contracts import QParams, QTensor, WeightGrid
from dfqc.compiler.quantize import rtn
from dfqc.compiler.quantize._learned import LearnedGrid, RoundToGrid
from dfqc.compiler.quantize._ranges import weight_grid
from dfqc.compiler.quantize._rounding import Layer, LearnedWeight, Units
from dfqc.compiler.spec import QScheme

ActGrid = Literal["learned", "fixed", "ema"]
_EDGE = 0.499  # steps from its code at which a weight is still rounded to it


class LatentWeight(LearnedWeight):
    """A layer with a float weight that is rounded to its grid, step learned, in every pass.

    The gradient passes the rounding as if it were not there, inside of the grid; that of the step
    is LSQ's, divided by sqrt(weights per step * largest code). The bias is on the int32 grid of the
    steps of weight and input, as the product has it.
    """

    def __init__(
        self, layer: Layer, grid: WeightGrid, units: Units, source: LearnedGrid | None
    ) -> None:
        """Begin at the weight of `layer`.

        Args:
            layer: float, with the bias to begin with.
            grid: one entry per channel, or a single one for all of them.
            units: what weight, step and bias are learned as multiples of.
            source: grid of the layer's input; None: a float input, and a float bias.
        """
        super().__init__(layer, grid, torch.zeros_like(grid.scale), units)
        self.latent = nn.Parameter(layer.weight.detach() / self.scale_unit)
        self.shared = len(grid.scale) == 1
        count = layer.weight.numel() / len(grid.scale)
        self.slope = 1 / (count * max(1, grid.levels // 2 - 1)) ** 0.5
        self._source = (source,)  # in a tuple: no submodule of this one
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)

    def weight(self) -> Tensor:
        """Return the float weight, pruned weights zero."""
        weight = self.latent * self.scale_unit
        return weight if self.dense is None else weight * self.dense

    def start_at(self, codes: Tensor) -> None:
        """Move every weight that has another code into the cell of its code.

        The farther away a weight was, the nearer it comes to its code, which was chosen for good
        reasons; at one distance, all of them would leave their cells in the same iteration.
        """
        with torch.no_grad():
            wanted = codes.to(self.latent)
            away = self.weight() / self.scale - wanted
            inside = torch.where(away.abs() < _EDGE, away, _EDGE**2 / away)
            self.latent.copy_((wanted + inside) * self.scale / self.scale_unit)

    def codes(self) -> Tensor:
        """Return the nearest codes."""
        weight, scale = self.rounded()
        return (weight / scale).round()

    def rounded(self) -> tuple[Tensor, Tensor]:
        """Return the weight on its grid, and its scale, shaped to broadcast."""
        scale = scaled_gradient(self.scale, self.slope)
        position = self.on_grid(self.weight() / scale)
        return _Nearest.apply(position) * scale, scale  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for `x` with weight and bias on their grids."""
        weight, scale = self.rounded()
        bias = self.bias
        (source,) = self._source
        if bias is not None and source is not None:
            with torch.no_grad():
                steps = scale.flatten().expand(len(bias))
                snapped = affine.snap_bias(bias, source.scale, steps)
            bias = _Replaced.apply(bias, snapped)  # type: ignore[no-untyped-call]
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)
        out: Tensor = self.layer._conv_forward(x, weight, bias)
        return out

    def make_room(self) -> None:
        """Raise scales where the bias would leave the int32 grid of the steps."""
        (source,) = self._source
        bias = self.bias
        if source is None or bias is None:
            return
        least = rtn.smallest_weight_scale(bias.detach().cpu(), source.qparams().scale)
        least = least.to(self.least.device)
        self.least.copy_(torch.maximum(self.least, least.max() if self.shared else least))
        self.hold_scale()

    @torch.no_grad()
    def quantized(self) -> QTensor:
        """Return the codes and scales as they are exported."""
        codes = self.codes().to(torch.int8).cpu()
        _, scale = self.rounded()
        return QTensor(codes, scale.flatten().expand(len(codes)).float().cpu().clone())


class MinMaxWeight(LatentWeight):
    """The same with the grid that spans the weight as it is, and a gradient that passes whole."""

    def __init__(
        self,
        layer: Layer,
        scheme: QScheme,
        units: Units,
        source: LearnedGrid | None,
        *,
        single: bool = False,
    ) -> None:
        """As `LatentWeight`; `single`: one grid for all channels."""
        self.scheme, self.single = scheme, single
        super().__init__(layer, self._span(layer.weight.detach()), units, source)

    def _span(self, weight: Tensor) -> WeightGrid:
        rows = weight.reshape(1, -1) if self.single else weight
        return weight_grid(rows, self.scheme, "minmax")

    def rounded(self) -> tuple[Tensor, Tensor]:
        """Return the weight on its grid, and its scale, shaped to broadcast."""
        weight = self.weight()
        with torch.no_grad():
            grid = self._span(weight)
            shape = (-1,) + (1,) * (weight.dim() - 1)
            scale = torch.maximum(grid.scale, self.least).view(shape)
            codes = affine.nearest_codes(weight, scale, grid.low.view(shape), grid.levels)
            rounded = codes * scale
        return _Replaced.apply(weight, rounded), scale  # type: ignore[no-untyped-call]

    def hold_scale(self) -> None:
        """Nothing to hold: the scale follows the weight."""


class LatentGrid(LearnedGrid):
    """An activation grid that learns its step (LSQ), stays, or follows the range of what it sees.

    `observing` switches following on: a mean of the batches' extremes that forgets exponentially
    and begins with the first batch, so that it is right from there on.
    """

    def __init__(
        self,
        qparams: QParams,
        scheme: QScheme,
        device: torch.device,
        *,
        kind: ActGrid,
        relative: bool,
        decay: float = 0.9,
    ) -> None:
        super().__init__(qparams, scheme, device, relative=relative and kind == "learned")
        self.kind, self.decay, self.observing = kind, decay, False
        self.register_buffer("bounds", torch.full((2,), torch.nan, device=device).double())
        zero = torch.tensor(float(qparams.zero_point), device=device)
        self.register_buffer("zero", zero)
        self.bounds: Tensor  # lowest and highest value; not a number: nothing was seen yet
        self.zero: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the grid, in float32 whatever it came in."""
        x = x.float()  # half precision has no room for the codes of wide grids
        if self.observing:
            self._follow(x)
        shift: float | Tensor = self.zero if self.observing else self.zero_point
        if not torch.is_grad_enabled():
            return affine.fake_quantize(x, self.scale, shift, self.scheme)
        ends = (self.scheme.quant_min - shift, self.scheme.quant_max - shift)
        slope = 1 / (max(1, x[0].numel()) * self.scheme.quant_max) ** 0.5
        mask = None if self.masks is None else self.masks.draw(x.shape)
        scale = scaled_gradient(self.scale, slope)
        result: Tensor = RoundToGrid.apply(x, scale, mask, *ends)  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        seen = torch.stack(torch.aminmax(x)).double()
        mean = torch.where(self.bounds.isnan(), seen, torch.lerp(seen, self.bounds, self.decay))
        self.bounds.copy_(mean)
        scale, zero = affine.moving_grid(mean[0], mean[1], self.scheme)
        self.ratio.copy_(scale)
        self.zero.copy_(zero)

    def observe(self, on: bool) -> None:
        """Switch following on or off; off, the grid stays as it is now."""
        before, self.observing = self.observing, on and self.kind == "ema"
        if before and not self.observing:  # an accelerator is waited for
            self.settle()

    def settle(self) -> None:
        """Take over the zero point as a number."""
        zero = float(self.zero)
        # Of a range that is no number, neither is the scale: what is computed says so, later.
        self.zero_point = int(zero) if math.isfinite(zero) else 0

    def set(self, qparams: QParams) -> None:
        """Take a decided grid."""
        super().set(qparams)
        self.zero.fill_(qparams.zero_point)

    def qparams(self) -> QParams:
        """Return the grid as it is exported."""
        self.settle()
        return super().qparams()


class Tied(nn.Module):
    """Repeats the grid of another quantizer, without following what it sees here."""

    def __init__(self, grid: LatentGrid) -> None:
        super().__init__()
        self._grid = (grid,)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the other's grid."""
        (grid,) = self._grid
        observing, grid.observing = grid.observing, False
        try:
            result: Tensor = grid(x)
        finally:
            grid.observing = observing
        return result


def scaled_gradient(value: Tensor, factor: float) -> Tensor:
    """Return the value itself, whose gradient is multiplied by `factor`."""
    if not torch.is_grad_enabled() or not value.requires_grad:
        return value
    result: Tensor = _Scaled.apply(value, factor)  # type: ignore[no-untyped-call]
    return result


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _Nearest(torch.autograd.Function):
    """Rounds; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Replaced(torch.autograd.Function):
    """Gives another value in the place of one, which gets the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return other.view_as(other)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
