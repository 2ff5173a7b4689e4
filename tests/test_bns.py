import copy

import pytest
import torch
from torch import fx, nn

from dfqc.calib import _bns
from dfqc.calib._bns import BNTeacher, Moments
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import UnsupportedError
from dfqc.compiler.graph import Graph

CPU = torch.device("cpu")


class Net(nn.Module):
    """A batch norm before and behind a convolution, and one on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 5, 3)
        self.second = nn.BatchNorm2d(5, affine=False)
        self.fc = nn.Linear(5, 4)
        self.third = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.second(self.conv(self.first(x))))
        return self.head(torch.relu(self.third(self.fc(x.mean((2, 3))))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(torch.relu(self.bn(x)))


def graph_of(net: nn.Module, size: int = 6, seed: int = 0) -> Graph:
    """Give the net random weights and statistics, and capture it."""
    rng = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_(0, 0.3, generator=rng)
            module.running_var.uniform_(0.5, 2, generator=rng)
            if module.affine:
                nn.init.uniform_(module.weight, -1, 1.5, generator=rng)
                nn.init.normal_(module.bias, generator=rng)
    image = ImageSpec((3, size, size))
    return Graph(fx.symbolic_trace(net.eval()), image, "test")


def images(count: int = 4, size: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) + 0.5


def norm_inputs(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return what enters every batch norm, in float64 and by torch's own layers."""
    seen: list[torch.Tensor] = []
    double = copy.deepcopy(net).double()  # the caller may yet go back through it
    hooks = [
        m.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for m in double.modules()
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    double(x.double())
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("per_image", [False, True])
def test_moments_are_those_of_the_inputs_of_the_batch_norms(per_image):
    net = Net()
    teacher = BNTeacher(graph_of(net), CPU, per_image=per_image)
    found = teacher(images()).moments
    assert teacher.layers == ("first", "second", "third")
    for moments, x in zip(found, norm_inputs(net, images()), strict=True):
        # A vector has one value per image and channel: only the batch has a spread.
        dims = (2, 3) if per_image and x.dim() == 4 else (0, 2, 3)[: x.dim() - 1]
        var, mean = torch.var_mean(x, dims, correction=0)
        torch.testing.assert_close(moments.mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.var.double(), var, rtol=1e-5, atol=1e-5)


def test_stored_moments_are_the_running_statistics():
    net = Net()
    teacher = BNTeacher(graph_of(net), CPU)
    for stored, norm in zip(teacher.stored, (net.first, net.second, net.third), strict=True):
        assert torch.equal(stored.mean, norm.running_mean)
        assert torch.equal(stored.var, norm.running_var)


def test_logits_are_those_of_the_graph():
    graph = graph_of(Net())
    capture = BNTeacher(graph, CPU, logits=True)(images())
    torch.testing.assert_close(capture.logits, graph.module(images()), rtol=1e-5, atol=1e-5)
    assert BNTeacher(graph, CPU)(images()).logits is None


def test_nothing_runs_behind_the_last_batch_norm():
    net = Net()
    net.head = nn.Linear(99, 2)  # cannot run
    graph = graph_of(net)
    assert len(BNTeacher(graph, CPU)(images()).moments) == 3
    with pytest.raises(RuntimeError, match="shapes"):
        BNTeacher(graph, CPU, logits=True)(images())


def test_the_graph_is_left_as_it_was():
    graph = graph_of(Net())
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    output, code = graph.module(images()), graph.module.code
    x = images().requires_grad_()
    teacher = BNTeacher(graph, CPU)
    _bns.std_loss(teacher(x).moments, teacher.stored).backward()
    assert graph.module.code == code
    assert torch.equal(graph.module(images()), output)
    assert all(torch.equal(before[n], v) for n, v in graph.module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in graph.module.parameters())
    assert not any(p.requires_grad for p in teacher.module.parameters())


def test_a_batch_norm_called_twice_counts_twice():
    graph = graph_of(Twice())
    teacher = BNTeacher(graph, CPU)
    first, second = teacher(images()).moments
    assert teacher.layers == ("bn", "bn#1")
    x = images().double()
    bn = graph.module.get_submodule("bn").double()
    torch.testing.assert_close(first.mean.double(), x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    inner = torch.relu(bn(x)).mean((0, 2, 3))
    torch.testing.assert_close(second.mean.double(), inner, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [_bns.std_loss, _bns.relative_loss, _bns.var_loss, _bns.kl_loss])
@pytest.mark.parametrize("per_image", [False, True])
def test_gradients_equal_those_of_torch(loss, per_image):
    """The fused backward pass against autograd through batch_norm and var_mean, in float64."""
    net = Net().double()
    teacher = BNTeacher(graph_of(net), CPU, per_image=per_image)
    x = images().double().requires_grad_()
    loss(teacher(x).moments, teacher.stored).backward()

    reference = images().double().requires_grad_()
    found = []
    for value in norm_inputs(net, reference):
        dims = (2, 3) if per_image and value.dim() == 4 else (0, 2, 3)[: value.dim() - 1]
        var, mean = torch.var_mean(value, dims, correction=0)
        found.append(Moments(mean, var))
    loss(found, teacher.stored).backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-8, atol=1e-12)


def test_gradients_of_the_fused_operation_are_exact():
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    mean, scale, bias = torch.randn(3, 2, dtype=torch.float64)
    for per_image in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, p=per_image: _bns._NormalizeAndMeasure.apply(x, mean, scale, bias, p), (x,)
        )


def test_moments_keep_their_digits_far_from_zero():
    net = nn.Sequential(nn.BatchNorm2d(3))
    graph = graph_of(net, size=32)
    net[0].running_mean.fill_(1000.0)
    x = images(8, 32) + 1000
    found = BNTeacher(graph, CPU)(x).moments[0]
    expected = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(found.var.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", [_bns.std_loss, _bns.relative_loss, _bns.var_loss, _bns.kl_loss])
def test_losses_stay_finite_on_dead_channels(loss):
    net = nn.Sequential(nn.BatchNorm2d(3))
    graph = graph_of(net)
    net[0].running_var.zero_()
    teacher = BNTeacher(graph, CPU)
    x = torch.ones(2, 3, 6, 6, requires_grad=True)
    value = loss(teacher(x).moments, teacher.stored)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(x.grad).all()


def moments(means, variances) -> Moments:
    return Moments(torch.tensor(means, dtype=torch.float64), torch.tensor(variances).double())


def test_losses_equal_their_closed_forms():
    stored = [moments([0.0, 1.0], [4.0, 1.0]), moments([2.0], [9.0])]
    found = [moments([3.0, 1.0], [9.0, 4.0]), moments([2.0], [1.0])]
    assert float(_bns.std_loss(found, stored)) == pytest.approx((9 + 1 + 1) + 4, rel=1e-5)
    assert float(_bns.relative_loss(found, stored)) == pytest.approx(11 / 5 + 4 / 9, rel=1e-5)
    assert float(_bns.var_loss(found, stored)) == pytest.approx(3 + (25 + 9) ** 0.5 + 8, rel=1e-5)
    halves = [torch.tensor(0.5), torch.tensor(1.0)]
    assert float(_bns.std_loss(found, stored, halves)) == pytest.approx(5.5 + 4, rel=1e-5)


def test_kl_loss_equals_that_of_torch_distributions():
    stored = [moments([0.0, 1.0], [4.0, 1.0])]
    found = [moments([3.0, 1.5], [9.0, 0.25])]
    normals = [torch.distributions.Normal(m[0].mean, m[0].var.sqrt()) for m in (stored, found)]
    expected = torch.distributions.kl_divergence(*normals).sum()
    assert float(_bns.kl_loss(found, stored)) == pytest.approx(float(expected), rel=1e-4)


def test_losses_per_image_are_averaged_over_images():
    stored = [moments([0.0], [1.0])]
    found = [moments([[1.0], [3.0]], [[1.0], [4.0]])]
    assert float(_bns.std_loss(found, stored)) == pytest.approx((1 + (9 + 1)) / 2, rel=1e-5)
    assert float(_bns.var_loss(found, stored)) == pytest.approx((1 + (3 + 3)) / 2, rel=1e-5)


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(3, track_running_stats=False)])
def test_a_graph_without_statistics_names_what_works(norm):
    graph = graph_of(nn.Sequential(norm, nn.Conv2d(3, 4, 3)))
    with pytest.raises(UnsupportedError, match=r"need it: .*zeroq.*; that do not: .*noise"):
        BNTeacher(graph, CPU)


def test_bfloat16_changes_the_products_and_not_the_statistics():
    torch.manual_seed(0)
    graph, x = graph_of(Net()), images()
    exact = BNTeacher(graph, CPU, logits=True)(x)
    rough = BNTeacher(graph, CPU, logits=True, precision="bfloat16")(x)
    differs = False
    for ours, theirs in zip(rough.moments, exact.moments, strict=True):
        assert ours.mean.dtype == ours.var.dtype == torch.float32
        scale = (theirs.mean.square() + theirs.var).max().sqrt()  # of the values themselves
        assert (ours.mean - theirs.mean).abs().max() < 0.02 * scale
        assert (ours.var - theirs.var).abs().max() < 0.04 * scale.square()
        differs |= not torch.equal(ours.mean, theirs.mean)
    assert differs
    assert rough.logits.dtype == torch.float32


def test_gradients_reach_the_images_through_bfloat16():
    torch.manual_seed(0)
    graph, gradients = graph_of(Net()), []
    for each in (BNTeacher(graph, CPU), BNTeacher(graph, CPU, precision="bfloat16")):
        x = images().requires_grad_()
        sum((m.mean.square() + m.var).sum() for m in each(x).moments).backward()
        gradients.append(x.grad)
    similarity = torch.cosine_similarity(*(g.flatten() for g in gradients), dim=0)
    assert similarity > 0.99
