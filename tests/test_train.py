import pytest
import torch
from torch import nn

from dfqc.compiler.contracts import QParams, WeightGrid, silent
from dfqc.compiler.quantize import _train
from dfqc.compiler.quantize._caches import Budget, Cache
from dfqc.compiler.quantize._judge import output_error
from dfqc.compiler.quantize._learned import LearnedGrid
from dfqc.compiler.quantize._rounding import FlexRounding, SoftRounding
from dfqc.compiler.quantize._train import TrainOptions, UnitData, train_unit
from dfqc.compiler.spec import QScheme
from dfqc.compiler.steps import Steps

CPU = torch.device("cpu")


def rows(value):
    return Cache(value, Budget())


def unit(kind=SoftRounding, rounding="soft", **options):
    """A linear layer on a coarse grid behind a coarse activation, and its float output."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 6)
    x = torch.randn(64, 12).relu()
    exact = layer(x).detach()
    grid = WeightGrid(layer.weight.detach().abs().amax(1) / 3, torch.full((6,), -4.0), 8)
    learned = kind(layer, grid)
    acts = LearnedGrid(QParams(float(x.max()) / 7, 0), QScheme(3, False, False), CPU)
    region = nn.Sequential(acts, learned)
    chosen = TrainOptions(**{"iterations": 150, "batch_size": 16, "rounding": rounding, **options})
    data = UnitData(rows(x), rows(x + 0), rows(exact))
    return region, learned, acts, data, chosen


def train(region, learned, acts, data, options, *, seconds=None, penalty=None, limit=None):
    return train_unit(
        *(region, [learned], [acts], data, options),
        rng=torch.Generator().manual_seed(0),
        device=CPU,
        seconds=seconds,
        progress=silent,
        penalty=penalty,
        limit=limit,
    )


def error(region, data):
    return output_error(region, data.quantized, data.target, batch=16, device=CPU)


FAST = {"lr_rounding": 2e-2, "lr_act_scale": 2e-3, "lr_weight_scale": 1e-3, "round_weight": 0.02}


@pytest.mark.parametrize(("kind", "rounding"), [(SoftRounding, "soft"), (FlexRounding, "flex")])
def test_it_ends_hard_and_better_than_it_began(kind, rounding):
    parts = unit(kind, rounding, **FAST)
    before = error(parts[0], parts[3])
    found = train(*parts)
    assert error(parts[0], parts[3]) < 0.8 * before
    assert (found.iterations, found.shortened) == (150, False)
    assert found.flipped > 0
    learned, acts = parts[1], parts[2]
    assert not learned.soft
    assert acts.masks is None
    codes = learned.codes()
    assert torch.equal(codes, codes.round())
    assert codes.min() >= -4
    assert codes.max() <= 3


def test_the_rounding_loss_decides_every_weight():
    parts = unit(**{**FAST, "round_weight": 1.0, "lr_rounding": 5e-2, "iterations": 400})
    steps = parts[1].layer.weight / parts[1].scale
    inside = (steps > -4) & (steps < 3)  # beyond the grid there is nothing to decide
    train(*parts)
    share = parts[1].share()[inside]
    assert ((share < 0.02) | (share > 0.98)).all()


@pytest.mark.parametrize("limit", [1, 1000])
def test_a_batch_in_parts_learns_the_same(limit):
    whole, parts = (unit(**FAST, drop=0.0, inputs="quantized") for _ in range(2))
    seen = []
    parts[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    first = train(*whole)
    second = train(*parts, limit=limit)
    counted = seen[2:]  # a row, and two, to see what they take
    assert max(counted) < 16  # the batch
    assert sum(counted) == 150 * 16
    assert second.loss == pytest.approx(first.loss, rel=1e-3)
    assert parts[2].qparams().scale == pytest.approx(whole[2].qparams().scale, rel=1e-4)


def test_a_rate_of_zero_changes_nothing():
    frozen = dict.fromkeys(("lr_rounding", "lr_act_scale", "lr_weight_scale", "lr_bias"), 0.0)
    parts = unit(**frozen)
    before = parts[1].quantized()
    found = train(*parts)
    assert found.iterations == 0
    assert torch.equal(parts[1].quantized().codes, before.codes)


def test_frozen_rounding_keeps_its_codes_while_steps_are_learned():
    parts = unit(FlexRounding, "flex", **{**FAST, "lr_rounding": 0.0})
    before, scale = parts[1].quantized(), parts[2].scale.item()
    found = train(*parts)
    assert found.flipped == 0
    assert torch.equal(parts[1].quantized().codes, before.codes)
    assert not torch.equal(parts[1].quantized().scale, before.scale)
    assert parts[2].scale.item() != scale


def test_too_little_time_shortens_the_schedule():
    found = train(*unit(iterations=100_000), seconds=0.3)
    assert found.shortened
    assert 0 < found.iterations < 100_000


def test_a_penalty_alone_is_followed():
    parts = unit(**{**FAST, "round_weight": 0.0, "error_weight": 0.0, "lr_bias": 1e-2})
    region, data = parts[0], parts[3]
    with torch.no_grad():
        before = float(region(data.exact.rows).mean())
    train(*parts, penalty=lambda output, index: output.mean())
    with torch.no_grad():
        assert float(region(data.exact.rows).mean()) < before - 0.2


def test_every_row_comes_once_before_any_comes_again():
    rng = torch.Generator().manual_seed(1)
    batches = list(_train._batches(20, 5, Steps(8), rng))
    for start in (0, 4):
        assert sorted(torch.cat(batches[start : start + 4]).tolist()) == list(range(20))
    assert [len(b) for b in _train._batches(3, 32, Steps(2), rng)] == [3, 3]


@pytest.mark.parametrize(("fraction", "power"), [(0.2, 20), (0.6, 11), (1.0, 2)])
def test_the_exponent_falls_linearly_after_the_warm_up(fraction, power):
    assert _train._power(fraction, TrainOptions()) == pytest.approx(power)


def test_the_error_counts_every_image_alike():
    target = torch.tensor([[1.0, 0.0], [100.0, 0.0]])
    found = torch.tensor([[1.1, 0.0], [150.0, 0.0]])
    # Relative errors 0.1^2 and 0.5^2: their geometric mean.
    error = output_error(lambda x: x, rows(found), rows(target), batch=1, device=CPU)
    assert error == pytest.approx(0.05)
