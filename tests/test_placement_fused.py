"""Quantizers around what OpenVINO fuses: on integers where it stays there, bare in between."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantized
from dfqc.backends import ort
from dfqc.compiler import plugins
from dfqc.compiler.parity import check_parity
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


class Pooled(nn.Module):
    """Two convolutions; `between` has what the first gives, and a maximum pool."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1) for _ in "ab")
        self.between = between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


def pool(x):
    return F.max_pool2d(x, 2)


BETWEEN = [
    (lambda x: pool(F.leaky_relu(x)), "leaky_relu.a4: max_pool2d", "= leaky_relu.a4"),
    (lambda x: pool(pool(F.silu(x))), "silu.a4: max_pool2d", "= silu.a4"),
]


@pytest.mark.parametrize("target", [FUSED, ort.TARGET])
@pytest.mark.parametrize(("between", "first", "twin"), BETWEEN)
def test_a_pool_of_float_operations_reads_codes(target, between, first, twin):
    graph = quantized.fold_module(Pooled(between))
    rows = table(quantized.plan(graph, "w4a4", ends=None, target=target))
    assert sum(row.startswith(first) for row in rows) == 1
    (last,) = (row for row in rows if row.endswith(twin))
    assert last.startswith("max_pool2d")


OTHER_READERS = [
    lambda x: pool(F.silu(x)) * 2,  # the pool's reader is no integer layer
    lambda x: pool(F.silu(x)) + pool(F.silu(x)).sigmoid(),
]


@pytest.mark.parametrize("between", OTHER_READERS)
def test_a_pool_that_others_read_keeps_its_floats(between):
    graph = quantized.fold_module(Pooled(between))
    assert not any(row.startswith("silu.") for row in table(plan(graph)))


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("between", [BETWEEN[0][0], BETWEEN[1][0]])
@pytest.mark.parametrize("name", ["ort", "openvino"])
def test_codes_in_front_of_a_pool_are_the_engines_too(name, between, bits, tmp_path):
    backend = plugins.load("target", name)
    if not backend.available()[0]:
        pytest.skip(f"{name} is not installed")
    torch.manual_seed(0)
    graph = quantized.fold_module(Pooled(between))
    state = quantized.quantize(graph, quantized.plan(graph, bits, ends=None, target=backend.TARGET))
    result = backend.lower(graph, state, metadata={})
    path = tmp_path / "model.onnx"
    path.write_bytes(result.model)
    images = quantized.calib(6, seed=3).images
    report = check_parity(graph, state, result, backend.open_runner(path, threads=1), images)
    assert report.passed
    taken = {q.source for q in state.plan.quantizers.values()}
    assert taken & {"leaky_relu", "silu"}
