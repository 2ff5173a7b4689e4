"""Range estimators: weights or streamed activation histograms in, quantization scales out.

min-max, percentile, and the L2.4 grid search over 100 clipping ratios that Genie and its
relatives use (Genie's released code; BRECQ, QDrop): keep the ratio with the least mean
|x - Q(x)|^2.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dfqc.compiler import affine
from dfqc.compiler.contracts import Progress, QParams, WeightGrid, silent
from dfqc.compiler.errors import LoadError
from dfqc.compiler.graph import Graph
from dfqc.compiler.spec import QScheme

NORM = 2.4
RATIOS = 100
BINS = 4096
SAMPLES = 1 << 18  # values per tensor and batch that are counted


def weight_scale(weight: Tensor, scheme: QScheme, method: str) -> Tensor:
    """Return one scale per output channel, (channels,) float32.

    Args:
        weight: any shape; `scheme.axis` is the channel axis.
        scheme: symmetric per-channel grid.
        method: `minmax` covers the largest magnitude; `mse` searches 100 ratios of it (L2.4).
    """
    rows = weight.detach().float().movedim(scheme.axis or 0, 0).flatten(1)
    full = rows.abs().amax(1) / scheme.quant_max
    full = torch.where(full > affine.SMALLEST_SCALE, full, torch.ones_like(full))
    if method == "minmax":
        return full
    best, best_error = full.clone(), torch.full_like(full, torch.inf)
    for step in range(RATIOS, 0, -1):
        scale = full * (step / RATIOS)
        error = (affine.fake_quantize(rows, scale[:, None], 0, scheme) - rows).abs_()
        error = error.pow_(NORM).mean(1)
        better = error < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)
    return best


def weight_grid(weight: Tensor, scheme: QScheme, method: str) -> WeightGrid:
    """Return the grid of every channel, as `weight_scale` does; an asymmetric one has its offset.

    With `mse` the offset is searched together with the clipping ratio: that of the clipped
    range's zero point (Genie's code, section 2.1 of Nagel et al. 2021 for the zero point).
    """
    if not scheme.per_channel_offset:
        scale = weight_scale(weight, scheme, method)
        return WeightGrid(scale, torch.full_like(scale, scheme.quant_min), scheme.levels)
    rows = weight.detach().float().movedim(scheme.axis or 0, 0).flatten(1)
    least, most = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
    top = scheme.levels - 1
    best = _clipped_grid(least, most, top)
    if method == "minmax":
        return best
    best_error = torch.full_like(best.scale, torch.inf)
    for step in range(RATIOS, 0, -1):
        ratio = step / RATIOS
        grid = _clipped_grid(least * ratio, most * ratio, top)
        rounded = affine.dequantize_weight(affine.round_to_grid(rows, grid, 0), 0)
        error = (rounded - rows).abs_().pow_(NORM).mean(1)
        better = error < best_error
        best = WeightGrid(
            torch.where(better, grid.scale, best.scale),
            torch.where(better, grid.low, best.low),
            grid.levels,
        )
        best_error = torch.where(better, error, best_error)
    return best


def _clipped_grid(low: Tensor, high: Tensor, top: int) -> WeightGrid:
    """Return the grids that cover [low, high], rows of zeros with scale 1."""
    scale = (high - low) / top
    scale = torch.where(scale > affine.SMALLEST_SCALE, scale, torch.ones_like(scale))
    return WeightGrid(scale, (low / scale).round_().clamp_(-top, 0), top + 1)


@dataclass
class Histogram:
    """Streamed counts of one tensor over [low, high]."""

    low: float
    high: float
    counts: Tensor  # (BINS,) float64

    def centers(self) -> Tensor:
        """Return the value in the middle of every bin, (BINS,) float64."""
        width = (self.high - self.low) / BINS
        return self.low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)


def activation_qparams(
    hist: Histogram, scheme: QScheme, method: str, *, percentile: float
) -> QParams:
    """Return the grid of one activation tensor from its histogram.

    `percentile` clips that share of values (in percent) at either end that has values.
    """
    if method == "minmax":
        return affine.affine_qparams(hist.low, hist.high, scheme)
    if method == "percentile":
        low, high = _percentile_range(hist, percentile)
        return affine.affine_qparams(low, high, scheme)
    values, counts = hist.centers(), hist.counts
    best, best_error = affine.affine_qparams(hist.low, hist.high, scheme), torch.inf
    for step in range(RATIOS, 0, -1):
        ratio = step / RATIOS
        qparams = affine.affine_qparams(hist.low * ratio, hist.high * ratio, scheme)
        scale = torch.tensor(qparams.scale, dtype=torch.float64)
        error = (affine.fake_quantize(values, scale, qparams.zero_point, scheme) - values).abs_()
        total = float((error.pow_(NORM) * counts).sum())
        if total < best_error:
            best, best_error = qparams, total
    return best


def _percentile_range(hist: Histogram, percentile: float) -> tuple[float, float]:
    """Return the central range that leaves out (100 - percentile) % at each end."""
    share = hist.counts.cumsum(0) / hist.counts.sum().clamp_min(1)
    tail = 1 - percentile / 100
    edges = hist.low + (hist.high - hist.low) / BINS * torch.arange(BINS + 1, dtype=torch.float64)
    first = int(torch.searchsorted(share, torch.tensor(tail, dtype=torch.float64)))
    last = int(torch.searchsorted(share, torch.tensor(1 - tail, dtype=torch.float64)))
    return float(edges[min(first, BINS)]), float(edges[min(last + 1, BINS)])


def collect_histograms(
    graph: Graph,
    sources: Sequence[str],
    images: Tensor,
    *,
    batch: int,
    device: torch.device,
    progress: Progress = silent,
) -> Mapping[str, Histogram]:
    """Return a histogram of every node in `sources` over the images, in two streamed passes.

    The first pass finds the extremes, the second counts between them, so that no activation is
    kept: memory is one batch's live tensors.
    """
    steps = 2 * -(-len(images) // batch)
    bounds: dict[str, tuple[float, float]] = {}
    counts: dict[str, Tensor] = {s: torch.zeros(BINS, dtype=torch.float64) for s in sources}

    def widen(name: str, value: Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(value))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise LoadError(
                f"{name}: the model computes values from {low} to {high} on the calibration "
                "images, expected finite ones; check its weights and the preprocessing"
            )
        old = bounds.get(name, (torch.inf, -torch.inf))
        bounds[name] = (min(old[0], low), max(old[1], high))

    def count(name: str, value: Tensor) -> None:
        low, high = bounds[name]
        if high > low:
            counts[name] += torch.histc(_thin(value), BINS, low, high).double().cpu()

    done = 0
    for observe in (widen, count):
        walker = _Observer(graph.module, frozenset(sources), observe)
        for chunk in images.split(batch):
            with torch.inference_mode():
                walker.run(chunk.to(device))
            done += 1
            progress(done, steps, "activation ranges")
    return {s: Histogram(*bounds[s], counts[s]) for s in sources}


def _thin(value: Tensor) -> Tensor:
    """Return at most `SAMPLES` evenly spaced values; the extremes are taken from all of them.

    The stride is odd, so that it does not walk down single columns of a feature map.
    """
    flat = value.float().flatten()
    return flat[:: max(1, -(-len(flat) // SAMPLES)) | 1]


class _Observer(fx.Interpreter):
    """Runs a graph and shows the values of chosen nodes; values die after their last reader."""

    def __init__(
        self, module: fx.GraphModule, names: frozenset[str], observe: Callable[[str, Tensor], None]
    ) -> None:
        super().__init__(module)
        self.names = names
        self.observe = observe

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.name in self.names and isinstance(value, Tensor):
            self.observe(n.name, value)
        return value
