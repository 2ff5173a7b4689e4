"""Adaptability of images to a student (Qian et al. 2023): logits in, the generator's losses out.

An image teaches a student as far as it and the teacher disagree about it. With the logits z_T and
z_Q of both, z_T - z_Q are those of the disagreement sample, z_T + z_Q those of the agreement sample
(AdaDFQ, arXiv 2303.06869, section 3; the constants are those of the released code). Both networks
get gradients through all of it, the batch's smallest entropy included. Logits are (n, classes); a
batch may have any size (the released code knows only 16).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dfqc.calib._bns import Moments
from dfqc.compiler.quantize._entropy import entropy

_LEAST_SPAN = 1e-6  # of entropies in a batch: of equal networks all are log(classes)


def disagreement(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the logits of the disagreement samples: p_ds = softmax(z_T - z_Q)."""
    return teacher - student


def agreement(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the logits of the agreement samples: p_as = softmax(z_T + z_Q)."""
    return teacher + student


def normalized_entropy(logits: Tensor) -> Tensor:
    """Return H' = (H - min H) / (log C - min H) of every row, (n,): 0..1.

    The minimum is that of the batch, where H' is 0; 1 is no disagreement at all. Of networks that
    are equal on the whole batch it is 0 everywhere.
    """
    found = entropy(logits)
    least = found.min()
    span = math.log(logits.shape[1]) - least
    return (found - least) / span.clamp_min(_LEAST_SPAN)


def bounds_loss(normalized: Tensor, lower: float, upper: float) -> Tensor:
    """Return how far H' (n,) is out of [lower, upper]: mean ReLU(l - H') + mean ReLU(H' - u).

    Below `lower` the networks disagree so much that the student would not learn it (underfitting),
    above `upper` so little that it would learn nothing (overfitting).
    """
    return F.relu(lower - normalized).mean() + F.relu(normalized - upper).mean()


def class_losses(teacher: Tensor, student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return L_ds and L_as: the cross-entropies of both samples with the labels (n,)."""
    return (
        F.cross_entropy(disagreement(teacher, student), labels),
        F.cross_entropy(agreement(teacher, student), labels),
    )


def bns_loss(found: Sequence[Moments], stored: Sequence[Moments]) -> Tensor:
    """Return the mean over layers of MSE(mean) + MSE(variance), each a mean over channels.

    GDFQ (Xu et al. 2020), eq. 3, as its code has it; variances have the divisor n.
    """
    terms = [
        F.mse_loss(f.mean, s.mean) + F.mse_loss(f.var, s.var)
        for f, s in zip(found, stored, strict=True)
    ]
    return torch.stack(terms).mean()


def in_bounds(normalized: Tensor, lower: float, upper: float) -> Tensor:
    """Report which H' (n,) lie in [lower, upper]."""
    return (normalized >= lower) & (normalized <= upper)
