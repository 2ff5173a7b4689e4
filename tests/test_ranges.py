import copy
import weakref

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import models
import numerics
import quantized
from dfqc.compiler import affine
from dfqc.compiler.errors import LoadError
from dfqc.compiler.quantize import _ranges
from dfqc.compiler.quantize._ranges import (
    BINS,
    Histogram,
    activation_qparams,
    collect_histograms,
    weight_grid,
    weight_scale,
)
from dfqc.compiler.spec import QScheme

CPU = torch.device("cpu")


def heavy_tailed(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_t(3, size=shape).astype(np.float32)


def weight_error(weight, scale, bits):
    """Mean |w - Q(w)|^2.4 per output channel, float64."""
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    step = scale.reshape(-1, 1).astype(np.float64)
    codes = np.clip(np.rint(rows / step), *numerics.grid(bits, True))
    return (np.abs(codes * step - rows) ** 2.4).mean(1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_minmax_weights_reach_their_largest_magnitude(bits):
    weight = heavy_tailed((5, 4, 3, 3))
    scale = weight_scale(torch.from_numpy(weight), QScheme(bits, True, True, 0), "minmax")
    assert scale.dtype == torch.float32
    largest = np.abs(weight).max((1, 2, 3))
    np.testing.assert_allclose(scale, largest / (2 ** (bits - 1) - 1), rtol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_searched_weights_are_the_best_of_a_hundred_ratios(bits):
    weight = heavy_tailed((8, 6, 3, 3))
    full = np.abs(weight).max((1, 2, 3)) / (2 ** (bits - 1) - 1)
    ratios = np.arange(1, 101) / 100
    errors = np.stack([weight_error(weight, full * r, bits) for r in ratios])
    scheme = QScheme(bits, True, True, 0)
    scale = weight_scale(torch.from_numpy(weight), scheme, "mse").numpy()
    nearest = np.abs(scale / full - ratios[:, None]).min(0)
    assert nearest.max() < 1e-6
    found = weight_error(weight, scale, bits)
    np.testing.assert_allclose(found, errors.min(0), rtol=1e-4)
    widest = weight_scale(torch.from_numpy(weight), scheme, "minmax").numpy()
    assert (found <= weight_error(weight, widest, bits) * (1 + 1e-4)).all()
    if bits <= 4:  # heavy tails are worth clipping
        assert found.mean() < 0.9 * weight_error(weight, widest, bits).mean()


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_the_scheme_says_which_axis_the_channels_are_on(method):
    weight = torch.from_numpy(heavy_tailed((4, 6, 3, 3)))
    across = weight_scale(weight.transpose(0, 1), QScheme(4, True, True, 1), method)
    assert torch.equal(across, weight_scale(weight, QScheme(4, True, True, 0), method))


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_channel_of_zeros_gets_scale_one(method):
    weight = torch.from_numpy(heavy_tailed((3, 8)))
    weight[1] = 0
    scale = weight_scale(weight, QScheme(4, True, True, 0), method)
    assert scale[1] == 1
    assert (scale[[0, 2]] != 1).all()


def one_shot(values):
    """Build the histogram of raw values with numpy."""
    counts, _ = np.histogram(values, BINS, (values.min(), values.max()))
    low, high = float(values.min()), float(values.max())
    return Histogram(low, high, torch.from_numpy(counts.astype(np.float64)))


ACTIVATIONS = {
    "normal": heavy_tailed(50_000, 1),
    "rectified": np.maximum(heavy_tailed(50_000, 2), 0),
    "shifted": heavy_tailed(50_000, 3) * 0.2 + 1.5,
    "negative": -np.abs(heavy_tailed(50_000, 4)),
}
SCHEMES = [QScheme(8, False, False), QScheme(4, False, False), QScheme(4, True, True)]


@pytest.mark.parametrize("values", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_minmax_activations_use_the_whole_range(values, scheme):
    found = activation_qparams(one_shot(values), scheme, "minmax", percentile=99.9)
    expected = numerics.qparams(float(values.min()), float(values.max()), scheme)
    assert (found.scale, found.zero_point) == expected


@pytest.mark.parametrize("values", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99])
def test_percentiles_are_numpys_within_a_bin(values, percentile):
    hist = one_shot(values)
    low, high = _ranges._percentile_range(hist, percentile)
    width = (hist.high - hist.low) / BINS
    gap = np.sort(values)  # the tail is thin: numpy interpolates between neighbors
    ends = np.percentile(values, [100 - percentile, percentile])
    for found, expected in zip((low, high), ends, strict=True):
        at = np.searchsorted(gap, expected)
        neighbors = gap[max(at - 2, 0)], gap[min(at + 2, len(gap) - 1)]
        assert neighbors[0] - 2 * width <= found <= neighbors[1] + 2 * width
    scheme = QScheme(8, False, False)
    grid = activation_qparams(hist, scheme, "percentile", percentile=percentile)
    assert grid == affine.affine_qparams(low, high, scheme)


def test_the_hundredth_percentile_is_minmax():
    hist = one_shot(ACTIVATIONS["normal"])
    low, high = _ranges._percentile_range(hist, 100.0)
    assert (low, high) == pytest.approx((hist.low, hist.high))


@pytest.mark.parametrize("values", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_searched_activations_are_as_good_as_a_search_on_the_raw_values(values, scheme):
    low, high = float(values.min()), float(values.max())
    raw = values.astype(np.float64)
    errors = numerics.clip_errors(raw, np.ones_like(raw), low, high, scheme)
    found = activation_qparams(one_shot(values), scheme, "mse", percentile=99.9)
    grids = [numerics.qparams(low * r / 100, high * r / 100, scheme) for r in range(1, 101)]
    index = grids.index((found.scale, found.zero_point))
    # The histogram knows values to half a bin: at 8 bits that is 1/32 of a step.
    assert errors[index] <= errors.min() * 1.02


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_constant_activation_is_held(method, value):
    hist = Histogram(value, value, torch.zeros(BINS, dtype=torch.float64))
    scheme = QScheme(8, False, False)
    found = activation_qparams(hist, scheme, method, percentile=99.9)
    x = torch.tensor([value])
    back = affine.fake_quantize(x, torch.tensor(found.scale), found.zero_point, scheme)
    assert back.item() == pytest.approx(value, rel=1e-6)


def reference_activations(graph, images):
    """Compute the activations of `plain` with plain torch calls."""
    stem, body = (graph.module.get_submodule(name) for name in ("stem.0", "body.0"))
    first = F.relu(F.conv2d(images, stem.weight, stem.bias, padding=1))
    second = F.relu(F.conv2d(first, body.weight, body.bias, stride=2, padding=1))
    return {"relu": first, "relu_1": second, "max_pool2d": F.max_pool2d(second, 2)}


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_streamed_histograms_are_those_of_all_values_at_once(batch):
    graph, images = quantized.folded("plain"), models.images(12, seed=3)
    steps = []
    found = collect_histograms(
        graph,
        ["relu", "relu_1", "max_pool2d"],
        images,
        batch=batch,
        device=CPU,
        progress=lambda done, total, note: steps.append((done, total)),
    )
    passes = 2 * -(-12 // batch)
    assert steps == [(i + 1, passes) for i in range(passes)]
    for name, values in reference_activations(graph, images).items():
        expected, hist = one_shot(values.numpy()), found[name]
        assert hist.counts.sum() == values.numel()
        assert (hist.low, hist.high) == pytest.approx((expected.low, expected.high), rel=1e-5)
        # A value on the edge of a bin may fall to either side of it.
        drift = (hist.counts.cumsum(0) - expected.counts.cumsum(0)).abs().max()
        assert drift <= 1e-3 * values.numel()


def test_centers_are_in_the_middle_of_the_bins():
    hist = Histogram(-1.0, 3.0, torch.zeros(BINS))
    edges = np.linspace(-1, 3, BINS + 1)
    np.testing.assert_allclose(hist.centers(), (edges[1:] + edges[:-1]) / 2, rtol=1e-12)


def test_large_activations_are_thinned_but_their_extremes_are_kept(monkeypatch):
    graph, images = quantized.folded("plain"), models.images(8, seed=4)
    values = reference_activations(graph, images)["relu"]
    full = collect_histograms(graph, ["relu"], images, batch=8, device=CPU)["relu"]
    monkeypatch.setattr(_ranges, "SAMPLES", 1000)
    thin = collect_histograms(graph, ["relu"], images, batch=8, device=CPU)["relu"]
    assert (thin.low, thin.high) == (full.low, full.high)
    assert full.counts.sum() == values.numel() > 1000 >= thin.counts.sum() > 900
    shares = [h.counts.cumsum(0) / h.counts.sum() for h in (full, thin)]
    assert (shares[0] - shares[1]).abs().max() < 0.08  # Kolmogorov-Smirnov, 1000 samples


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 2000, 4096, 12345])
def test_thinning_takes_an_odd_stride(size, monkeypatch):
    monkeypatch.setattr(_ranges, "SAMPLES", 1000)
    kept = _ranges._thin(torch.arange(size))
    assert len(kept) <= 1000
    strides = set(np.diff(kept.numpy()).astype(int))
    assert len(strides) <= 1
    assert all(stride % 2 for stride in strides)


def test_no_activation_outlives_its_last_reader():
    graph = copy.copy(quantized.folded("residual"))
    module = copy.deepcopy(graph.module)
    alive, largest = [], 0

    def watch(_module, _inputs, output):
        nonlocal largest
        alive.append(weakref.ref(output))
        largest = max(largest, sum(ref() is not None for ref in alive))

    layers = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(watch)
    object.__setattr__(graph, "module", module)
    sources = [n.name for n in module.graph.nodes if n.op == "call_module"]
    collect_histograms(graph, sources, models.images(4), batch=2, device=CPU)
    assert len(alive) == 2 * 2 * len(layers)
    assert largest == 2  # a projection waits for the branch beside it
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_are_refused(bad):
    images = models.images(4)
    images[3, 0, 5, 5] = bad
    with pytest.raises(LoadError, match=r"stem_0: .* finite"):
        collect_histograms(quantized.folded("plain"), ["stem_0"], images, batch=2, device=CPU)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_a_shifted_grid_follows_a_skewed_channel(bits, method):
    rng = np.random.default_rng(3)
    weight = rng.gamma(2.0, size=(6, 40)).astype(np.float32)
    weight[3:] *= -1
    grid = weight_grid(torch.from_numpy(weight), QScheme(bits, True, False, 0), method)
    top = 2**bits - 1
    assert grid.levels == top + 1
    assert grid.low.tolist() == [0, 0, 0, -top, -top, -top]
    if method == "minmax":
        np.testing.assert_allclose(grid.scale, np.abs(weight).max(1) / top, rtol=1e-6)


def test_a_shifted_grid_is_the_best_of_a_hundred_ranges():
    rng = np.random.default_rng(4)
    weight = (rng.standard_t(4, size=(8, 30)) + 0.5).astype(np.float32)
    grid = weight_grid(torch.from_numpy(weight), QScheme(2, True, False, 0), "mse")
    rows = weight.astype(np.float64)
    low, high = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    errors = []
    for step in range(1, 101):
        scale = (high - low) * step / 100 / 3
        zero = np.clip(np.rint(low * step / 100 / scale), -3, 0)[:, None]
        codes = np.clip(np.rint(rows / scale[:, None]), zero, zero + 3)
        errors.append((np.abs(codes * scale[:, None] - rows) ** 2.4).mean(1))
    real = affine.dequantize_weight(affine.round_to_grid(torch.from_numpy(weight), grid, 0), 0)
    found = (np.abs(real.double().numpy() - rows) ** 2.4).mean(1)
    np.testing.assert_allclose(found, np.min(errors, 0), rtol=1e-4)


def test_a_channel_of_zeros_has_scale_one():
    grid = weight_grid(torch.zeros(2, 5), QScheme(3, True, False, 0), "mse")
    assert (grid.scale == 1).all()
