"""Covariance between channels without data: weights and batch norms in, second moments out.

A layer's input is modelled (channels independent, neighboring positions correlated as in natural
images); the weights then say how its outputs correlate, the batch norm how large they are, and a
Hermite series carries the correlation of two normal values through the activation (Mehler's
formula; for two ReLUs of mean zero it sums to the arc-cosine kernel of Cho and Saul 2009).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dfqc.compiler.moments import (
    SMOOTH,
    Moments,
    clipped_moments,
    leaky_relu_moments,
    relu_moments,
    smooth_moments,
)
from dfqc.compiler.operators import CLIP, RELU

TERMS = 12  # of the Hermite series; what they leave out goes into one more
SPATIAL = 0.6  # correlation of neighboring positions in natural images and their features
LEAKY = torch.ops.aten.leaky_relu.default
QUADRATURE_POINTS = 64

# identity: every input value independent with variance 1; variance: with the variances of the
# input's channels; spatial: those, and neighbors correlated by `SPATIAL` to their distance.
InputModel: TypeAlias = Literal["identity", "variance", "spatial"]
Lag: TypeAlias = tuple[int, int]
Products: TypeAlias = Mapping[Lag, Tensor]


def hermite(target: Any, args: tuple[Any, ...], mean: Tensor, std: Tensor) -> Tensor:
    """Return h_n = E[f(mean + std z) He_n(z)] for n = 1 .. TERMS, (TERMS, channels).

    Args:
        target: the activation as an ATen operator; None is none.
        args: its arguments behind the input.
        mean: of the normal value before it, (channels,) float64.
        std: of it, positive.

    Raises:
        ValueError: an activation without moments.
    """
    if target is None:
        series = torch.zeros(TERMS, *mean.shape, dtype=mean.dtype)
        series[0] = std
        return series
    if target is RELU:
        return _relu_series(mean, std)
    if target is CLIP and args[0] == 0:
        return _relu_series(mean, std) - _relu_series(mean - float(args[1]), std)
    if target is LEAKY:
        slope = float(args[0]) if args else 0.01
        odd = torch.tensor([(-1.0) ** n for n in range(1, TERMS + 1)], dtype=mean.dtype)
        return _relu_series(mean, std) - slope * odd[:, None] * _relu_series(-mean, std)
    if target in SMOOTH:
        return _quadrature_series(SMOOTH[target], mean, std)
    raise ValueError(f"no moments of {target}")


def activation_moments(target: Any, args: tuple[Any, ...], mean: Tensor, std: Tensor) -> Moments:
    """Return mean and variance behind the activation; arguments as for `hermite`."""
    var = std.square()
    if target is None:
        return Moments(mean, var)
    if target is RELU:
        return relu_moments(mean, var)
    if target is CLIP and args[0] == 0:
        return clipped_moments(mean, var, float(args[1]))
    if target is LEAKY:
        return leaky_relu_moments(mean, var, float(args[0]) if args else 0.01)
    if target in SMOOTH:
        return smooth_moments(mean, var, SMOOTH[target])
    raise ValueError(f"no moments of {target}")


def is_known_activation(target: Any, args: tuple[Any, ...]) -> bool:
    """Report whether `hermite` knows the operator."""
    return target in (RELU, LEAKY) or target in SMOOTH or (target is CLIP and args[0] == 0)


def mehler(correlation: Tensor, series: Tensor, var: Tensor) -> Tensor:
    """Return Cov(f(y_j), f(y_k)), (channels, channels).

    The sum over n of correlation^n h_n(j) h_n(k) / n!. What is left out is known on the diagonal
    (`var` less the sum); between channels its square roots multiply, at the power behind the last,
    so that equal channels keep covariance and variance equal.

    Args:
        correlation: of y_j and y_k, (channels, channels).
        series: of `hermite`.
        var: of f(y), (channels,).
    """
    power = torch.ones_like(correlation)
    total = torch.zeros_like(correlation)
    known = torch.zeros_like(var)
    for n, h in enumerate(series, start=1):
        power = power * correlation
        scaled = h / math.sqrt(math.factorial(n))
        total += power * torch.outer(scaled, scaled)
        known += scaled.square()
    rest = (var - known).clamp_min(0).sqrt()
    return total + power * correlation * torch.outer(rest, rest)


def kernel_products(weight: Tensor, var: Tensor, dilation: Lag) -> Products:
    """Return, per distance d of taps, the sum over taps t of W_t diag(var) W_(t+d)^T.

    Args:
        weight: (outputs, channels, height, width) float64.
        var: of the input's channels.
        dilation: pixels between taps.
    """
    height, width = weight.shape[2:]
    taps = [(y, x) for y in range(height) for x in range(width)]
    scaled = weight * var.view(1, -1, 1, 1)
    found: dict[Lag, Tensor] = {}
    for y, x in taps:
        for v, u in taps:
            lag = ((v - y) * dilation[0], (u - x) * dilation[1])
            if lag < (0, 0):
                continue  # the transpose of the opposite one
            product = scaled[:, :, y, x] @ weight[:, :, v, u].mT
            found[lag] = found[lag] + product if lag in found else product
    return found | {(-y, -x): m.mT for (y, x), m in found.items() if (y, x) != (0, 0)}


def output_covariance(products: Products, lag: Lag, model: InputModel) -> Tensor:
    """Return Cov(z_j(p), z_k(p + lag)) of a convolution's outputs under the input model."""
    total = torch.zeros_like(products[0, 0])
    for (y, x), product in products.items():
        factor = spatial_correlation((y + lag[0], x + lag[1]), model)
        if factor:
            total += factor * product
    return total


def spatial_correlation(lag: Lag, model: InputModel) -> float:
    """Return the correlation of two positions of one input channel."""
    distance = abs(lag[0]) + abs(lag[1])
    if model == "spatial":
        return SPATIAL**distance
    return 1.0 if distance == 0 else 0.0


def depthwise_covariance(
    weight: Tensor, lag: Lag, stride: Lag, dilation: Lag, inner: Callable[[Lag], Tensor]
) -> Tensor:
    """Return the covariance behind a depthwise convolution, exact given that before it.

    Args:
        weight: (channels, height, width).
        lag: between the two outputs.
        stride: of the convolution.
        dilation: of it.
        inner: covariance of its input at a lag.
    """
    height, width = weight.shape[1:]
    pairs: dict[Lag, list[tuple[Tensor, Tensor]]] = {}
    for y, x in np.ndindex(height, width):
        for v, u in np.ndindex(height, width):
            distance = (
                lag[0] * stride[0] + (v - y) * dilation[0],
                lag[1] * stride[1] + (u - x) * dilation[1],
            )
            pairs.setdefault(distance, []).append((weight[:, y, x], weight[:, v, u]))
    total = torch.zeros(len(weight), len(weight), dtype=weight.dtype)
    for distance, taps in pairs.items():
        left, right = (torch.stack(part, 1) for part in zip(*taps, strict=True))
        total += inner(distance) * (left @ right.mT)
    return total


def _relu_series(mean: Tensor, std: Tensor) -> Tensor:
    """Return std Phi(t) and std He_(n-2)(-t) phi(t) for n >= 2, with t = mean / std."""
    t = mean / std
    density = torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi)
    polynomials = [torch.ones_like(t), -t]
    for n in range(2, TERMS - 1):
        polynomials.append(-t * polynomials[-1] - (n - 1) * polynomials[-2])
    rest = [std * p * density for p in polynomials[: TERMS - 1]]
    return torch.stack([std * torch.special.ndtr(t), *rest])


def _quadrature_series(function: Callable[[Tensor], Tensor], mean: Tensor, std: Tensor) -> Tensor:
    points, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_POINTS)
    z = torch.from_numpy(points)
    polynomials = [torch.ones_like(z), z]
    for n in range(1, TERMS):
        polynomials.append(z * polynomials[-1] - n * polynomials[-2])
    values = function(mean + std * z[:, None])  # (points, channels)
    basis = torch.stack(polynomials[1:]) * torch.from_numpy(weights) / math.sqrt(2 * math.pi)
    return basis @ values
