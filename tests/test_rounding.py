import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfqc.compiler.contracts import WeightGrid
from dfqc.compiler.quantize._ranges import weight_grid
from dfqc.compiler.quantize._rounding import FlexRounding, SoftRounding, Units
from dfqc.compiler.spec import QScheme

KINDS = [SoftRounding, FlexRounding]
SCHEMES = [QScheme(4, True, True, 0), QScheme(2, True, False, 0)]


def make(kind, scheme, *, start=None, seed=0, layer=None, least=None, relative=False):
    torch.manual_seed(seed)
    layer = layer or nn.Conv2d(4, 6, 3, padding=1)
    grid = weight_grid(layer.weight, scheme, "mse")
    units = Units(grid.scale, torch.full_like(grid.scale, 0.3)) if relative else None
    return kind(layer, grid, least, start, units), grid


def nearest(weight, grid):
    view = (-1,) + (1,) * (weight.dim() - 1)
    scale, low = grid.scale.view(view).double().numpy(), grid.low.view(view).numpy()
    codes = np.rint(weight.detach().double().numpy() / scale)
    return np.clip(codes, low, low + grid.levels - 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_untrained_it_rounds_to_nearest(kind, scheme):
    learned, grid = make(kind, scheme)
    found = learned.quantized()
    np.testing.assert_array_equal(found.codes.numpy(), nearest(learned.layer.weight, grid))
    torch.testing.assert_close(found.scale, grid.scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_parts_of_their_size_begin_at_the_same_layer(kind, scheme):
    plain, parts = (make(kind, scheme, relative=relative)[0] for relative in (False, True))
    assert torch.equal(plain.scale, parts.scale)
    assert (parts.scale_ratio == 1).all()
    torch.testing.assert_close(plain.bias, parts.bias)
    assert torch.equal(plain.quantized().codes, parts.quantized().codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_soft_it_is_the_float_weight_where_that_is_not_clipped(scheme):
    learned, grid = make(SoftRounding, scheme)
    learned.soft = True
    scale, low = grid.scale.view(-1, 1, 1, 1), grid.low.view(-1, 1, 1, 1)
    steps = learned.layer.weight / scale
    inside = (steps >= low) & (steps <= low + grid.levels - 1)
    assert inside.any()
    torch.testing.assert_close(learned.codes()[inside], steps[inside], atol=2e-6, rtol=1e-5)
    assert torch.equal(learned.codes().clamp(low, low + grid.levels - 1), learned.codes())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_begins_at_the_given_codes(kind, scheme):
    plain, grid = make(kind, scheme)
    rng = np.random.default_rng(0)
    low = grid.low.view(-1, 1, 1, 1).numpy()
    codes = nearest(plain.layer.weight, grid) + rng.integers(-1, 2, plain.layer.weight.shape)
    codes = torch.from_numpy(np.clip(codes, low, low + grid.levels - 1)).to(torch.int8)
    learned, _ = make(kind, scheme, start=codes)
    assert torch.equal(learned.quantized().codes, codes)


def test_the_rounding_loss_is_zero_on_codes_and_one_between():
    learned, _ = make(SoftRounding, SCHEMES[0])
    learned.position.detach().fill_(0.0)
    assert learned.undecided(2.0).item() == pytest.approx(learned.position.numel())
    learned.position.detach().fill_(10.0)
    assert learned.undecided(2.0).item() == 0.0


def test_gradients_are_those_of_the_formula():
    learned, grid = make(SoftRounding, SCHEMES[0])
    learned.soft = True
    learned.scale_ratio.requires_grad_(True)
    x = torch.randn(2, 4, 5, 5)
    learned(x).square().sum().backward()

    def loss(position, scale):
        share = (torch.sigmoid(position) * 1.2 - 0.1).clamp(0, 1)
        codes = (learned.base.double() + share).clamp(-8, 7)
        weight = scale.view(-1, 1, 1, 1) * codes
        return F.conv2d(x.double(), weight, learned.bias.double(), padding=1).square().sum()

    position = learned.position.detach().double().requires_grad_()
    scale = grid.scale.double().requires_grad_()
    loss(position, scale).backward()
    torch.testing.assert_close(learned.position.grad.double(), position.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        learned.scale_ratio.grad.flatten().double(), scale.grad, rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relative", [False, True])
def test_scales_stay_above_what_the_bias_needs(kind, relative):
    least = torch.tensor([0.5, 0, 0, 0, 0, 0])
    learned, _ = make(kind, SCHEMES[0], least=least, relative=relative)
    learned.scale_ratio.detach().mul_(-1.0)
    learned.hold_scale()
    assert (learned.scale > 0).all()
    assert learned.scale[0].item() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layer", [nn.Linear(5, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1, bias=False)]
)
def test_every_layer_computes_with_its_learned_weight(kind, layer):
    learned, _ = make(kind, SCHEMES[0], layer=layer)
    x = torch.randn(2, 5) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 6, 6)
    weight = learned.codes() * learned.scale
    wanted = torch.func.functional_call(layer, {"weight": weight}, (x,))
    torch.testing.assert_close(learned(x), wanted)
    learned.soft = True
    learned(x).sum().backward()
    trained = learned.position if kind is SoftRounding else learned.factors
    assert trained.grad.abs().sum() > 0


def test_a_dead_channel_stays_finite():
    layer = nn.Conv2d(4, 6, 3)
    with torch.no_grad():
        layer.weight[0] = 0
    for kind in KINDS:
        learned, _ = make(kind, SCHEMES[0], layer=layer)
        learned.soft = True
        out = learned(torch.randn(2, 4, 5, 5)).sum()
        out.backward()
        parameters = [p for p in learned.parameters() if p.grad is not None]
        assert parameters
        assert all(torch.isfinite(p.grad).all() for p in parameters)


def test_a_grid_of_one_level_more_is_used_to_its_end():
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.2, -0.9, 1.4]]))
    grid = WeightGrid(torch.tensor([1.0]), torch.tensor([-1.0]), 4)
    assert SoftRounding(layer, grid, None).quantized().codes.tolist() == [[2, -1, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_rounding_of_the_undecided_is_learned(kind):
    learned, grid = make(kind, SCHEMES[0])
    before = learned.quantized().codes
    learned.learn_nearest_halfway(0.25)
    steps = learned.layer.weight.detach().double() / grid.scale.double().view(-1, 1, 1, 1)
    halfway = ((steps - before.double()).abs() - 0.5).abs()
    expected = halfway <= halfway.flatten().sort().values[round(0.25 * halfway.numel()) - 1]
    free = learned.free > 0
    assert (free == expected).float().mean() > 0.98  # float32 may order two neighbors otherwise
    assert int(free.sum()) == round(0.25 * free.numel())
    learned.soft = True
    x, target = torch.randn(8, 4, 6, 6), torch.randn(8, 6, 6, 6)
    optimizer = torch.optim.Adam([p for p in learned.parameters() if p.requires_grad], lr=0.3)
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(learned(x), target).backward()
        optimizer.step()
    learned.soft = False
    moved = learned.quantized().codes != before
    assert moved.any()
    assert not moved[~free].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_layer_is_undecided_by_default(kind):
    learned, _ = make(kind, SCHEMES[0])
    learned.learn_nearest_halfway(1.0)
    assert learned.free is None


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_are_undecided_where_a_closed_form_left_the_nearest_codes(kind):
    learned, grid = make(kind, SCHEMES[0])
    nearest_codes = learned.quantized().codes
    start = (nearest_codes + torch.randint(-1, 2, nearest_codes.shape)).clamp(-7, 7)
    given, _ = make(kind, SCHEMES[0], start=start)
    before = given.quantized().codes
    given.learn_nearest_halfway(0.25)
    free = given.free > 0
    assert int(free.sum()) == round(0.25 * free.numel())
    steps = given.layer.weight.detach() / grid.scale.view(-1, 1, 1, 1)
    boundary = ((steps - before).abs() - 0.5).abs()
    assert boundary[free].max() <= boundary[~free].min()
    assert torch.equal(given.quantized().codes, before)
