"""A chain's channels and their user in; second moments of what the user's kernel covers out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqc.compiler._aten import pair
from dfqc.compiler.covariance import Lag, spatial_correlation
from dfqc.compiler.moments import Moments
from dfqc.compiler.passes._chains import Signal


@dataclass(frozen=True)
class PatchMoments:
    """Covariance of what a user's kernel covers, channels first and then taps, float64.

    `near` is None where the whole matrix would be too large: then it is `channels`, the covariance
    at one position, times `taps`, the correlation of positions.

    Attributes:
        channels: (rows, rows) at one position.
        taps: (taps, taps).
        near: (rows * taps, rows * taps).
        split: of the rows, how many are targets; the rest are their replacements. All of them
            are both where `keep` is given.
        keep: targets that are their own replacements.
    """

    channels: Tensor
    taps: Tensor
    near: Tensor | None
    split: int
    keep: Tensor | None

    def target_rows(self) -> Tensor:
        """Return the rows of the original channels."""
        return torch.arange(self.split)

    def kept_rows(self) -> Tensor:
        """Return the rows of the channels that stay."""
        return torch.arange(self.split, len(self.channels)) if self.keep is None else self.keep

    def block(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the covariance of two sets of rows with all taps; needs `near`."""
        assert self.near is not None
        return self.near[self._with_taps(left)][:, self._with_taps(right)]

    def predict(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Return the variance of every output, (outputs,), of a weight (outputs, rows, taps)."""
        if self.near is not None:
            flat = weight.flatten(1)
            return ((flat @ self.block(rows, rows)) * flat).sum(1)
        inner = self.channels[rows][:, rows] @ weight @ self.taps
        return (inner * weight).sum((1, 2))

    def _with_taps(self, rows: Tensor) -> Tensor:
        taps = len(self.taps)
        return (rows[:, None] * taps + torch.arange(taps)).flatten()


def gather_patches(
    user: nn.Conv2d | nn.Linear,
    spread: int,
    signal: Signal,
    maps: Moments,
    order: Tensor,
    *,
    limit: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return `PatchMoments.channels`, `taps` and `near` for one user.

    Zero padding lowers covariances by the share of positions at which both taps see the image, and
    lets the mean vary over positions, which counts as covariance: a constant cannot correct it.

    Args:
        user: the layer that reads.
        spread: features per channel (a flattened map).
        signal: channels in front of it.
        maps: moments of the channels as the user reads them, (1, channels, ...).
        order: channel of `maps` that belongs to each row of `signal`.
        limit: side of the largest matrix to build.
    """
    places, mean, seen = _windows(user, spread, maps)
    channels = signal.covariance((0, 0))
    count, rows = len(places), len(order)
    if rows * count > limit:
        return channels, tap_correlation(places), None
    shared = seen[:, 0].double()  # padding is the same for all channels
    valid = (shared.mT @ shared) / len(shared)
    near = torch.empty(rows, count, rows, count, dtype=torch.float64)
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            near[:, i, :, j] = signal.covariance((v - y, u - x)) * valid[i, j]
    patches = mean[:, order].flatten(1)
    centered = patches - patches.mean(0)
    flat = near.view(rows * count, rows * count)
    flat += centered.mT @ centered / len(centered)
    return channels, torch.eye(count, dtype=torch.float64), flat


def tap_correlation(places: list[Lag]) -> Tensor:
    """Return the correlation of a channel between the places of a kernel's taps, (taps, taps)."""
    rows = [[spatial_correlation((a - c, b - d), "spatial") for c, d in places] for a, b in places]
    return torch.tensor(rows, dtype=torch.float64)


def tap_places(layer: nn.Conv2d) -> list[Lag]:
    """Return where the taps of a kernel lie, in pixels."""
    dilation = pair(layer.dilation)
    height, width = layer.kernel_size
    return [(y * dilation[0], x * dilation[1]) for y in range(height) for x in range(width)]


def _windows(
    user: nn.Conv2d | nn.Linear, spread: int, maps: Moments
) -> tuple[list[Lag], Tensor, Tensor]:
    """Return the taps' places, and (positions, channels, taps): the mean, and what is not padding.

    A flattened map that is not square counts as one row.
    """
    if isinstance(user, nn.Linear):
        side = round(spread**0.5)
        width = side if side * side == spread else spread
        places = [(i // width, i % width) for i in range(spread)]
        mean = maps.mean.reshape(-1, maps.mean.shape[-1] // spread, spread)
        return places, mean, torch.ones_like(mean, dtype=torch.bool)
    places = tap_places(user)
    opened = [
        F.unfold(
            F.pad(value, user._reversed_padding_repeated_twice),
            user.kernel_size,
            dilation=user.dilation,
            stride=user.stride,
        )[0].mT.reshape(-1, value.shape[1], len(places))
        for value in (maps.mean, (maps.var > 0).double())
    ]
    return places, opened[0], opened[1] > 0
