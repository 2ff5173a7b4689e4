"""Priors, which no net is asked for: images in, how rough or how far from gray they are out."""

from __future__ import annotations

import torch
from torch import Tensor


def total_variation(images: Tensor) -> Tensor:
    """Sum four norms over the whole batch (n, c, h, w), one per direction; DeepInversion's R_TV.

    They are the Frobenius norms, not squared, of the differences of neighboring pixels: across,
    down and along both diagonals (Yin et al. 2020, eq. 3, and the authors' code).
    """
    upper, lower = images[..., :-1, :], images[..., 1:, :]
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        lower - upper,
        lower[..., 1:] - upper[..., :-1],
        lower[..., :-1] - upper[..., 1:],
    )
    return torch.stack([torch.linalg.vector_norm(d) for d in differences]).sum()


def l2_norm(images: Tensor) -> Tensor:
    """Average over images (n, c, h, w) the L2 norm of each, not squared; DeepInversion's R_l2."""
    norms: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return norms.mean()
