"""Quantizers around what OpenVINO fuses: on integers where it stays there, bare in between."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantized
from dfqc.backends import ort
from test_placement import table

FUSED = dataclasses.replace(ort.TARGET, name="fused", placement="fused")


def plan(graph, bits="w8a8"):
    return quantized.plan(graph, bits, target=FUSED)


def test_the_branch_that_adds_is_bare_and_the_other_is_not():
    assert table(plan(quantized.folded("residual"), "w4a4")) == [
        "x.a8: conv1",
        "relu.a8: add",
        "relu.a4: layer1_conv1",
        "relu_1.a4: layer1_conv2",
        "relu_2.a4: layer2_downsample_0 layer2_conv1",
        "layer2_downsample_0.a8: add_1",
        "relu_3.a4: layer2_conv2",
        "relu_4.a8: mean",
        "mean.a8: head_fc",
    ]


@pytest.mark.parametrize("net", ["plain", "grouped", "concat", "no_norm"])
def test_without_adds_and_float_operations_nothing_differs(net):
    graph = quantized.folded(net)
    assert table(plan(graph)) == table(quantized.plan(graph, "w8a8"))


class Joined(nn.Module):
    """`join` of two convolutions and their input."""

    def __init__(self, join):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in "abc")
        self.join = join

    def forward(self, x):
        return self.c(self.join(self.a(x), self.b(x)))


def sources(join):
    """Return what is quantized in front of the last convolution, whose output always is."""
    graph = quantized.fold_module(Joined(join))
    *found, last = [q.source for q in plan(graph).quantizers.values()]
    assert last == "c"
    return found


def test_of_two_convolutions_the_later_adds():
    assert sources(lambda a, b: a + b) == ["x", "a", "add"]
    assert sources(lambda a, b: b + a) == ["x", "a", "add"]


def test_a_convolution_with_another_reader_is_rounded():
    assert sources(lambda a, b: torch.cat([b, a + b], 1)[:, :3])[:3] == ["x", "b", "add"]


def test_a_convolution_behind_a_relu_is_rounded():
    assert sources(lambda a, b: F.relu(a) + F.relu(b)) == ["x", "relu", "relu_1", "add"]


@pytest.mark.parametrize("function", [F.silu, F.hardswish, F.leaky_relu, F.gelu, torch.sigmoid])
def test_float_operations_read_what_the_kernel_has_not_rounded(function):
    found = sources(lambda a, b: function(a) * function(b))
    assert found == ["x", "mul"]


def test_a_skip_from_float_operations_is_rounded_for_the_add():
    found = sources(lambda a, b: F.silu(a) + b)
    assert found == ["x", "silu", "add"]
