"""Weights of a user and of its producer in; the weights that restore removed channels out.

Five forms, for comparison: one neighbor per channel (Kim et al. 2020, Neuron Merging); a ridge
regression of filters with batch-norm terms (LBYL, Lee et al. 2025), both as their published code
computes them; the same regression on the folded filters; and least squares on the activations'
covariances, with one factor per pair of channels or one weight per pair of taps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from dfqc.compiler.passes._patches import PatchMoments

MERGE_COSINE = 0.1  # below it a channel has no neighbor and is dropped
MERGE_BALANCE = 0.85  # of cosine against the mismatch of biases


@dataclass(frozen=True)
class Filters:
    """Filters that make channels, with their batch norm; all (channels, ...) float64.

    `variance` is the running variance, `factor` is gamma / sqrt(variance + eps).
    """

    weight: Tensor
    mean: Tensor
    variance: Tensor
    gamma: Tensor
    beta: Tensor
    factor: Tensor

    def pick(self, channels: Tensor) -> Filters:
        """Return some of the channels."""
        return Filters(*(getattr(self, part.name)[channels] for part in fields(self)))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return weight rows and bias with the batch norm in them."""
        return self.weight * self.factor[:, None], self.beta - self.mean * self.factor


def merge_neighbors(filters: Filters, keep: Tensor, gone: Tensor) -> Tensor:
    """Return S (kept, removed) of Neuron Merging: one scaled neighbor per removed channel.

    As in the published code, the variance stands where the standard deviation is meant.
    """
    w, gamma, sigma = filters.weight, filters.gamma, filters.variance
    mu, beta = filters.mean, filters.beta
    factors = torch.zeros(len(keep), len(gone), dtype=w.dtype)
    for column, j in enumerate(gone.tolist()):
        cosine = F.cosine_similarity(w[j][None], w[keep])
        ratio = w[j].norm() / w[keep].norm(dim=1).clamp_min(1e-30)
        scale = ratio * (gamma[keep] / gamma[j]) * (sigma[j] / sigma[keep])
        shifted = ratio * (mu[j] - sigma[j] * beta[j] / gamma[j]) - mu[keep]
        bias = (gamma[keep] / sigma[keep] * shifted + beta[keep]).abs() / scale
        bias = torch.nan_to_num((bias - bias.min()) / (bias.max() - bias.min()))
        nearest = (MERGE_BALANCE * (1 - cosine) + (1 - MERGE_BALANCE) * bias).argmin()
        if cosine[nearest] >= MERGE_COSINE and torch.isfinite(scale[nearest]):
            factors[nearest, column] = scale[nearest]
    return factors


def regress_filters_lbyl(
    filters: Filters, keep: Tensor, gone: Tensor, norm_weight: float, ridge: float
) -> Tensor:
    """Return S (kept, removed) of LBYL as its published code computes it.

    There `sigma` is the running variance, the rank-one term is a multiple of the identity, and the
    coefficients of the filters are applied to the activations.
    """
    w, gamma, sigma = filters.weight, filters.gamma, filters.variance
    mu, beta = filters.mean, filters.beta
    rows = w[keep]
    c = mu[keep] - sigma[keep] * beta[keep] / gamma[keep]
    gram = rows @ rows.mT
    factors = torch.zeros(len(keep), len(gone), dtype=w.dtype)
    for column, j in enumerate(gone.tolist()):
        slope = gamma[j] / sigma[j]
        kappa = gamma[j] / gamma[keep] * sigma[keep] / sigma[j]
        extra = norm_weight * slope.square() * c.dot(c) + ridge * kappa.square()
        right = rows @ w[j] + norm_weight * slope * (slope * mu[j] - beta[j]) * c
        factors[:, column] = torch.linalg.solve(gram + torch.diag(extra), right)
    return factors


def regress_filters(
    filters: Filters, keep: Tensor, gone: Tensor, bias_weight: float, ridge: float
) -> Tensor:
    """Return S (kept, removed) that rebuilds folded filters and biases from the kept ones.

    argmin |w_j - A s|^2 + bias_weight (b_j - b_K s)^2 + ridge |s|^2, the ridge in parts of the
    mean squared norm of a kept filter.
    """
    rows, bias = filters.folded()
    gram = rows[keep] @ rows[keep].mT
    size = gram.diagonal().mean()
    left = gram + bias_weight * torch.outer(bias[keep], bias[keep])
    left.diagonal().add_(ridge * size)
    right = rows[keep] @ rows[gone].mT + bias_weight * torch.outer(bias[keep], bias[gone])
    solved: Tensor = torch.linalg.solve(left, right)
    return solved


def match_scales(exact: Filters, rounded: Filters, bias_weight: float, ridge: float) -> Tensor:
    """Return s (channels,) = argmin |w - s w^|^2 + bias_weight b^2 (1 - s)^2 + ridge |w|^2 s^2.

    `w` and `b` are the folded filter and bias, `w^` is the rounded filter.
    """
    rows, bias = exact.folded()
    found = rounded.weight * exact.factor[:, None]
    extra = bias_weight * bias.square()
    over = (rows * found).sum(1) + extra
    under = found.square().sum(1) + extra + ridge * rows.square().sum(1)
    return torch.where(under > 0, over / under.clamp_min(1e-30), torch.ones_like(over))


def combine_channels(weight: Tensor, keep: Tensor, gone: Tensor, factors: Tensor) -> Tensor:
    """Return the kept part of (outputs, channels, taps) with the removed one added by S."""
    return weight[:, keep] + torch.einsum("ojt,kj->okt", weight[:, gone], factors)


def fit_channels(
    weight: Tensor, moments: PatchMoments, keep: Tensor, ridge: float, *, nonnegative: bool
) -> Tensor:
    """Return the kept weight with S = C_kk^-1 C_kj on it: one factor per pair of channels.

    The ridge, in parts of the mean variance, holds the weight to what it was. `nonnegative` cuts
    factors off at zero.
    """
    targets, kept = moments.target_rows(), moments.kept_rows()
    inner = moments.channels[kept][:, kept]
    across = moments.channels[kept][:, targets]
    start = torch.zeros(len(targets), len(keep), dtype=weight.dtype)
    start[keep, torch.arange(len(keep))] = 1  # a kept channel stands for itself
    factors = start.mT + _solve(inner, across - inner @ start.mT, ridge)
    if nonnegative:
        factors = factors.clamp_min(0)
    return torch.einsum("ojt,kj->okt", weight, factors)


def fit_patches(weight: Tensor, moments: PatchMoments, keep: Tensor, ridge: float) -> Tensor:
    """Return the kept weight that is nearest to the whole one on the expected patches.

    Least squares of the user's own outputs; the ridge holds the weight to what it was.
    """
    targets, kept = moments.target_rows(), moments.kept_rows()
    inner, across = moments.block(kept, kept), moments.block(kept, targets)
    plain = weight[:, keep]
    missing = across @ weight.flatten(1).mT - inner @ plain.flatten(1).mT
    return plain + _solve(inner, missing, ridge).mT.reshape(plain.shape)


def _solve(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve a ridge regression; the least ridge keeps an exact copy of a channel solvable."""
    size = matrix.diagonal().mean().clamp_min(1e-30)
    damped = matrix.clone()
    damped.diagonal().add_(max(ridge, 1e-10) * size)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:  # the series of the covariances ends, which may leave them a little indefinite
        values, vectors = torch.linalg.eigh(damped)
        found: Tensor = vectors @ ((vectors.mT @ right) / values.clamp_min(1e-6 * size)[:, None])
        return found
    solved: Tensor = torch.cholesky_solve(right, factor)
    return solved
