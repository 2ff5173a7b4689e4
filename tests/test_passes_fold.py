import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from dfqc.compiler.graph import batch_norms, layer_nodes
from dfqc.compiler.passes.fold import fold
from folding import Chain, check

# Case 1: layer -> batch norm.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (8, {}),
        (6, {"groups": 3}),
        (3, {"groups": 3}),
        (9, {"groups": 3, "stride": 2, "dilation": 2}),
        (8, {"padding_mode": "reflect"}),
    ],
    ids=["dense", "grouped", "depthwise", "grouped-strided", "reflect"],
)
def test_convolution_then_norm(channels, options, bias):
    conv = nn.Conv2d(3, channels, 3, padding=1, bias=bias, **options)
    folded = check(Chain(conv, nn.BatchNorm2d(channels)), left=0)
    ((path, _),) = layer_nodes(folded)
    assert path == "body.0"
    assert folded.module.get_submodule(path).bias is not None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_transposed_convolution_then_norm(groups, bias):
    conv = nn.ConvTranspose2d(3, 6, 4, stride=2, padding=1, groups=groups, bias=bias)
    check(Chain(conv, nn.BatchNorm2d(6)), left=0)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_then_norm(bias):
    check(Chain(nn.Flatten(), nn.Linear(768, 7, bias=bias), nn.BatchNorm1d(7)), left=0)


def test_linear_on_tokens_then_norm_over_their_features():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(16, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            x = self.fc(x.flatten(1, 2))
            return torch.sigmoid(self.norm(x.flatten(0, 1)).reshape_as(x))

    check(Tokens(), left=0)


def test_norm_without_affine_and_with_negative_or_zero_gamma():
    check(Chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), left=0)
    norm = nn.BatchNorm2d(4)
    module = Chain(nn.Conv2d(3, 4, 3), norm)
    models.randomize_norms(module)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-1.5, 0.0, 2.0, -0.1]))
    graph = models.trace_module(module.eval())
    folded = fold(graph)
    assert not batch_norms(folded)
    x = models.images()
    torch.testing.assert_close(folded.module(x), graph.module(x))


def test_folded_weights_are_the_closed_form():
    module = Chain(nn.Conv2d(3, 4, 1, bias=True), nn.BatchNorm2d(4, eps=0.1)).double()
    models.randomize_norms(module)
    conv, norm = module.body
    folded = fold(models.trace_module(module))
    got = folded.module.get_submodule("body.0")
    scale = norm.weight / (norm.running_var + 0.1) ** 0.5
    torch.testing.assert_close(got.weight, conv.weight * scale[:, None, None, None])
    torch.testing.assert_close(got.bias, (conv.bias - norm.running_mean) * scale + norm.bias)


def test_two_norms_behind_one_convolution():
    check(Chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), left=0)


@pytest.mark.parametrize(
    ("pool", "gamma", "left"),
    [
        (nn.MaxPool2d(2), 1.0, 0),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), 1.0, 0),
        (nn.MaxPool2d(2), -1.0, 1),
        (nn.AvgPool2d(2), -1.0, 0),
        (nn.AvgPool2d(3, 2, ceil_mode=True), -1.0, 0),
        (nn.AvgPool2d(3, 2, 1), 1.0, 1),  # counts the zeros at the border
        (nn.AvgPool2d(2, divisor_override=3), 1.0, 1),
    ],
)
def test_pooling_between_convolution_and_norm(pool, gamma, left):
    norm = nn.BatchNorm2d(4)
    module = Chain(nn.Conv2d(3, 4, 3), pool, norm)
    models.randomize_norms(module)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 0.5, 2.0, 0.7]))
        norm.weight[1] *= gamma
    graph = models.trace_module(module.double())
    folded = fold(graph)
    assert len(batch_norms(folded)) == left
    x = models.images().double()
    torch.testing.assert_close(folded.module(x), graph.module(x), rtol=1e-12, atol=1e-12)


# Case 1 must not fire.


class Consumers(nn.Module):
    """The convolution's own output is read beside the batch norm's."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return torch.sigmoid(self.norm(y)) + y


class CalledTwice(nn.Module):
    """One convolution, two different batch norms."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.sigmoid(self.two(self.conv(F.relu(self.one(self.conv(x))))))


class OverTokens(nn.Module):
    """Batch norm over axis 1 of (n, tokens, features): not the linear's output axis."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(256, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return torch.sigmoid(self.norm(self.fc(x.flatten(2))))


class Between(nn.Module):
    """An activation between convolution and batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.sigmoid(self.norm(F.relu(self.conv(x))))


@pytest.mark.parametrize(
    ("kind", "left"), [(Consumers, 1), (CalledTwice, 2), (OverTokens, 1), (Between, 1)]
)
def test_what_cannot_be_folded_stays(kind, left):
    check(kind(), left=left)


def test_pre_activation_norm_stays():
    folded = check(models.build("pre_activation"), left=1)
    assert [n.path for n in batch_norms(folded)] == ["bn1"]


# Case 2: batch norm -> layers.


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(3, 4, 3, bias=False),
        nn.Conv2d(3, 6, 3, groups=3),
        nn.Conv2d(3, 3, 3, stride=2, groups=3),
    ],
    ids=["dense", "no-bias", "grouped", "depthwise"],
)
def test_norm_then_convolution_without_padding(layer):
    check(Chain(nn.BatchNorm2d(3), layer), left=0)


def test_norm_then_grouped_convolution_with_several_inputs_per_group():
    stem = nn.Conv2d(3, 6, 1)
    check(Chain(stem, nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, groups=2)), left=0)


@pytest.mark.parametrize("bias", [True, False])
def test_norm_then_linear(bias):
    check(Chain(nn.Flatten(), nn.BatchNorm1d(768), nn.Linear(768, 5, bias=bias)), left=0)


class Branches(nn.Module):
    """One batch norm read by two convolutions; `padding` on one of them."""

    def __init__(self, padding):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.one = nn.Conv2d(3, 4, 1)
        self.two = nn.Conv2d(3, 4, 1 + 2 * padding, padding=padding)

    def forward(self, x):
        x = self.norm(x)
        return torch.sigmoid(self.one(x)) * self.two(x)


@pytest.mark.parametrize(("padding", "left"), [(0, 0), (1, 1)])
def test_norm_read_by_two_convolutions(padding, left):
    check(Branches(padding), left=left)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(3, 4, 1, padding=1)],
    ids=["padded", "transposed", "padded-1x1"],
)
def test_shift_then_border_stays(layer):
    check(Chain(nn.BatchNorm2d(3), layer), left=1)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(3, 4, 3, groups=1, bias=False)],
    ids=["padded", "transposed"],
)
def test_scaling_without_shift_folds_through_a_border(layer):
    norm = nn.BatchNorm2d(3)
    module = Chain(norm, layer).double()
    with torch.no_grad():
        norm.running_var.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.weight.copy_(torch.tensor([1.5, -0.5, 1.0]))
    graph = models.trace_module(module)
    folded = fold(graph)
    assert not batch_norms(folded)
    x = models.images().double()
    torch.testing.assert_close(folded.module(x), graph.module(x), rtol=1e-12, atol=1e-12)


def test_norm_whose_output_leaves_the_graph_stays():
    check(Chain(nn.BatchNorm2d(3)), left=1)


# Case 3: padding.


# All together.

LEFT = {"pre_activation": 1}


@pytest.mark.parametrize("name", models.TINY)
def test_tiny_nets(name):
    folded = check(models.build(name), left=LEFT.get(name, 0))
    assert [p for p, _ in layer_nodes(folded)] == [
        p for p, _ in layer_nodes(models.trace_tiny(name))
    ]


def test_float32_result_is_rounded_once():
    """Folding in double precision: each float32 weight is the nearest one to the exact value."""
    module = Chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    models.randomize_norms(module)
    exact = fold(models.trace_module(module.double())).module.get_submodule("body.0").weight
    single = fold(models.trace_module(module.float())).module.get_submodule("body.0").weight
    assert single.dtype == torch.float32
    assert torch.equal(single, exact.float())


def test_a_line_with_the_counts_is_logged(caplog):
    with caplog.at_level(logging.INFO, "dfqc"):
        fold(models.trace_tiny("pre_activation"))
    assert "fold: 1 batch norms folded, 1 left" in caplog.text
