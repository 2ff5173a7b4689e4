import pytest
import torch

from dfqc.compiler import affine
from dfqc.compiler.contracts import QParams
from dfqc.compiler.quantize._learned import DropMasks, LearnedGrid
from dfqc.compiler.spec import QScheme

CPU = torch.device("cpu")
GRIDS = [
    (QParams(0.1, 0), QScheme(4, False, False)),
    (QParams(0.05, 6), QScheme(4, False, False)),
    (QParams(0.2, 0), QScheme(3, True, True)),
]


@pytest.mark.parametrize(("qparams", "scheme"), GRIDS)
def test_training_and_inference_round_alike(qparams, scheme):
    grid, x = LearnedGrid(qparams, scheme, CPU), torch.randn(4, 3, 8, 8)
    wanted = affine.fake_quantize(x, torch.tensor(qparams.scale), qparams.zero_point, scheme)
    torch.testing.assert_close(grid(x), wanted, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        assert torch.equal(grid(x), wanted)


@pytest.mark.parametrize(("qparams", "scheme"), GRIDS)
def test_gradients_are_lsq(qparams, scheme):
    grid = LearnedGrid(qparams, scheme, CPU)
    grid.ratio.requires_grad_(True)
    x = torch.randn(400, requires_grad=True)
    up = torch.randn(400)
    (grid(x) * up).sum().backward()
    steps = x.detach().double() / qparams.scale
    low, high = scheme.quant_min - qparams.zero_point, scheme.quant_max - qparams.zero_point
    inside = (steps >= low) & (steps <= high)
    assert inside.any()
    assert not inside.all()
    slope = torch.where(inside, steps.round() - steps, steps.clamp(low, high))
    torch.testing.assert_close(x.grad, up * inside)
    torch.testing.assert_close(
        grid.ratio.grad.double(), (up.double() * slope).sum(), rtol=1e-4, atol=1e-4
    )


def test_dropped_elements_pass_as_they_are():
    grid = LearnedGrid(*GRIDS[0], CPU)
    grid.ratio.requires_grad_(True)
    grid.masks = DropMasks(0.5, torch.Generator().manual_seed(0))
    x = torch.randn(64, 50, requires_grad=True)
    with torch.no_grad():
        rounded = LearnedGrid(*GRIDS[0], CPU)(x)
    out = grid(x)
    kept = out == x
    assert 0.45 < kept.double().mean() < 0.55
    torch.testing.assert_close(out[~kept], rounded[~kept])
    out.sum().backward()
    assert (x.grad[kept] == 1).all()


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_masks_have_their_share_and_differ(share):
    masks = DropMasks(share, torch.Generator().manual_seed(3))
    first, second = (masks.draw(torch.Size((100, 100))) for _ in "ab")
    assert set(first.unique().tolist()) == {0.0, 1.0}
    for mask in (first, second):
        assert abs(float(mask.mean()) - share) < 0.03
    assert float((first != second).double().mean()) > 0.1


def test_a_mask_may_be_larger_than_the_stock(monkeypatch):
    monkeypatch.setattr(DropMasks, "STOCK", 1000)
    masks = DropMasks(0.5, torch.Generator().manual_seed(3))
    assert masks.draw(torch.Size((70, 100))).shape == (70, 100)


def test_a_grid_that_is_off_lets_everything_through():
    grid, x = LearnedGrid(*GRIDS[0], CPU), torch.randn(9)
    grid.enabled = False
    assert torch.equal(grid(x), x)


@pytest.mark.parametrize("relative", [False, True])
def test_a_scale_is_kept_positive_and_comes_back_out(relative):
    grid = LearnedGrid(*GRIDS[1], CPU, relative=relative)
    grid.ratio.detach().mul_(-2)
    grid.hold_scale()
    assert grid.qparams() == QParams(pytest.approx(0.1), 6)
    grid.set(QParams(0.25, 3))
    assert grid.qparams() == QParams(0.25, 3)
