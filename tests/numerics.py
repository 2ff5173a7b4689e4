"""Independent references in numpy: rounding, integer convolution, and what tests say of numbers."""

from __future__ import annotations

import numpy as np


def assert_sqnr(actual, expected, floor):
    """Fail unless `actual` is within `floor` dB of `expected`."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    noise, signal = ((actual - expected) ** 2).sum(), (expected**2).sum()
    assert signal > 0, "a reference of zeros says nothing"
    found = np.inf if noise == 0 else 10 * np.log10(signal / noise)
    assert found >= floor, f"SQNR {found:.1f} dB, expected at least {floor} dB"


def grid(bits, signed):
    """Return the smallest and the largest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def quantize(x, scale, zero_point, bits, signed):
    """Round half to even in float32, as ONNX QuantizeLinear does; int64 codes."""
    low, high = grid(bits, signed)
    codes = np.rint(np.asarray(x, np.float32) / np.float32(scale)).astype(np.int64) + zero_point
    return np.clip(codes, low, high)


def clip_errors(values, weights, low, high, scheme, ratios=100, norm=2.4):
    """Mean |x - Q(x)|^norm in float64 for the range scaled by 1/ratios, 2/ratios ... 1."""
    errors = []
    for step in range(1, ratios + 1):
        scale, zero_point = qparams(low * step / ratios, high * step / ratios, scheme)
        codes = np.clip(np.rint(values / scale) + zero_point, *grid(scheme.bits, scheme.signed))
        error = np.abs((codes - zero_point) * scale - values) ** norm
        errors.append((error * weights).sum() / weights.sum())
    return np.array(errors)


def qparams(low, high, scheme):
    """Return scale and zero point of the grid over [low, high] and zero, from the definition."""
    low, high = min(low, 0.0), max(high, 0.0)
    smallest, largest = grid(scheme.bits, scheme.signed)
    if scheme.symmetric:
        sides = [high / largest] + ([low / smallest] if smallest else [])
        return float(np.float32(max(sides))), 0
    scale = float(np.float32((high - low) / (largest - smallest)))
    return scale, int(np.clip(np.rint(smallest - low / scale), smallest, largest))


def convolve(x, weight, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Convolve integers (n, c, h, w) with (out, c / groups, kh, kw) in int64, zero padding."""
    x = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    n, _, height, width = x.shape
    out, per_group, kh, kw = weight.shape
    rows = (height - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (width - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    total = np.zeros((n, out, rows, columns), np.int64)
    for group in range(groups):
        block = x[:, group * per_group : (group + 1) * per_group]
        outputs = slice(group * out // groups, (group + 1) * out // groups)
        for i in range(kh):
            for j in range(kw):
                top, left = i * dilation[0], j * dilation[1]
                view = block[
                    :,
                    :,
                    top : top + (rows - 1) * stride[0] + 1 : stride[0],
                    left : left + (columns - 1) * stride[1] + 1 : stride[1],
                ]
                tap = weight[outputs, :, i, j].astype(np.int64)
                total[:, outputs] += np.einsum("ncrs,oc->nors", view, tap)
    return total
