"""Activation grids that learn their step: a grid in, a module that rounds to it out.

LSQ (Esser et al. 2020, eq. 3) for the gradient of the step, without its scaling factor, as Genie-M
uses it; QDrop (Wei et al. 2022, eq. 8) for leaving single elements unquantized while training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dfqc.compiler import affine
from dfqc.compiler.contracts import QParams
from dfqc.compiler.spec import QScheme


class DropMasks:
    """Random masks cut out of one stock of random bits: drawing anew costs as much as a layer.

    They are numbers, 0 or 1: on a CPU, selecting by booleans is several times slower.
    """

    STOCK = 1 << 22

    def __init__(self, share: float, rng: torch.Generator) -> None:
        """Prepare masks that are 1 for `share` of the elements."""
        self.share, self.rng = share, rng
        drawn = torch.rand(self.STOCK, generator=rng, device=rng.device)
        self.stock = (drawn < share).float()

    def draw(self, shape: torch.Size) -> Tensor:
        """Return a mask of `shape`, from a random place of the stock."""
        count = shape.numel()
        if count > len(self.stock) // 2:
            self.stock = self.stock.repeat(-(-2 * count // len(self.stock)))
        start = torch.randint(
            len(self.stock) - count, (), generator=self.rng, device=self.rng.device
        )
        return self.stock[int(start) : int(start) + count].view(shape)


class LearnedGrid(nn.Module):
    """A per-tensor grid whose scale is learned; the zero point is fixed.

    Learned is the ratio to `unit`: 1, or the scale it begins with.
    """

    def __init__(
        self, qparams: QParams, scheme: QScheme, device: torch.device, *, relative: bool = False
    ) -> None:
        super().__init__()
        self.scheme, self.zero_point = scheme, qparams.zero_point
        self.relative = relative
        self.unit = qparams.scale if relative else 1.0
        ratio = torch.tensor(qparams.scale / self.unit, device=device)
        self.ratio = nn.Parameter(ratio, requires_grad=False)
        self.masks: DropMasks | None = None
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the grid; where the drop mask is 1, as it was."""
        if not self.enabled:
            return x
        mask = None if self.masks is None else self.masks.draw(x.shape)
        if not torch.is_grad_enabled():
            rounded = affine.fake_quantize(x, self.scale, self.zero_point, self.scheme)
            return rounded if mask is None else torch.lerp(rounded, x, mask)
        ends = self.scheme.quant_min - self.zero_point, self.scheme.quant_max - self.zero_point
        result: Tensor = RoundToGrid.apply(x, self.scale, mask, *ends)  # type: ignore[no-untyped-call]
        return result

    @property
    def scale(self) -> Tensor:
        """Return the scale, a tensor of one number."""
        return self.ratio * self.unit

    def hold_scale(self) -> None:
        """Keep the scale positive, after a step of an optimizer."""
        with torch.no_grad():
            self.ratio.copy_(self.ratio.abs().clamp_min(affine.SMALLEST_SCALE))

    def set(self, qparams: QParams) -> None:
        """Take a decided grid."""
        self.zero_point = qparams.zero_point
        self.unit = qparams.scale if self.relative else 1.0
        with torch.no_grad():
            self.ratio.fill_(qparams.scale / self.unit)

    def qparams(self) -> QParams:
        """Return the grid as it is exported."""
        return QParams(float(self.scale.detach()), self.zero_point)


class RoundToGrid(torch.autograd.Function):
    """s * round(clip(x / s, low, high)), straight-through in x, LSQ's gradient in s."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, mask: Tensor | None, low: float, high: float
    ) -> Tensor:
        steps = x / scale
        clipped = steps.clamp(low, high)
        through = (clipped == steps).to(x.dtype)  # 1 inside of the range
        rounded = clipped.round_()
        # d(out)/d(s): code - x/s inside of the range, the code itself (an end) outside of it.
        slope = torch.addcmul(rounded, steps, through, value=-1) if scale.requires_grad else None
        value = rounded * scale
        if mask is not None:
            value = value.lerp_(x, mask)
            through = torch.maximum(through, mask)
            slope = None if slope is None else slope.addcmul_(slope, mask, value=-1)
        ctx.save_for_backward(through, slope)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        through, slope = ctx.saved_tensors
        scale_grad = None if slope is None else torch.dot(grad.flatten(), slope.flatten())
        x_grad = grad * through if ctx.needs_input_grad[0] else None
        return x_grad, scale_grad, None, None, None
