import pytest
import torch
from torch import fx

from dfqc.compiler.operators import (
    is_fused_activation,
    is_nonnegative,
    is_spatial_zero_pad,
    output_end,
    stays_on_grid,
)

aten = torch.ops.aten


def node(target, *args, **kwargs):
    """Make one call behind a ReLU in an otherwise empty graph."""
    graph = fx.Graph()
    x = graph.call_function(aten.relu.default, (graph.placeholder("x"),))
    call = graph.call_function(target, (x, *args), kwargs)
    graph.output(call)
    return call


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (node(aten.pad.default, [0, 1, 0, 1]), True),
        (node(aten.pad.default, [1, 1]), True),
        (node(aten.pad.default, [0, 1, 0, 1], "constant", 0.0), True),
        (node(aten.constant_pad_nd.default, [0, 1, 0, 1]), True),
        (node(aten.constant_pad_nd.default, [0, 1, 0, 1], 0), True),
        (node(aten.constant_pad_nd.default, [0, 1, 0, 1], 1), False),
        (node(aten.constant_pad_nd.default, [0, 1, 0, 1], value=2.0), False),
        (node(aten.pad.default, [0, 1, 0, 1], "constant", 1.0), False),
        (node(aten.pad.default, [0, 1, 0, 1], value=-1.0), False),
        (node(aten.pad.default, [0, 1, 0, 1], "reflect"), False),
        (node(aten.pad.default, [0, 1, 0, 1], mode="replicate"), False),
        (node(aten.pad.default, [0, -1, 0, 1]), False),  # a crop
        (node(aten.pad.default, [0, 0, 0, 0, 4, 4]), False),  # channels
        (node(aten.relu.default), False),
    ],
)
def test_pads_that_a_convolution_absorbs(call, expected):
    assert is_spatial_zero_pad(call) is expected


@pytest.mark.parametrize(
    ("call", "on_grid", "nonnegative"),
    [
        (node(aten.max_pool2d.default, [2, 2]), True, True),
        (node(aten.flatten.using_ints, 1), True, True),
        (node(aten.pad.default, [1, 1]), True, True),
        (node(aten.pad.default, [1, 1], "reflect"), True, True),
        (node(aten.pad.default, [1, 1], "constant", -float("inf")), True, True),
        (node(aten.pad.default, [1, 1], "constant", -1.0), False, False),
        (node(aten.constant_pad_nd.default, [1, 1], 3.0), False, False),
        (node(aten.mean.dim, [2, 3]), False, True),
        (node(aten.avg_pool2d.default, [2, 2]), False, True),
        (node(aten.sigmoid.default), False, True),
        (node(aten.neg.default), False, False),
        (node(aten.silu.default), False, False),
        (node(aten.leaky_relu.default, 0.1), False, False),
        (node(aten.hardtanh.default, 0.0, 6.0), False, True),
        (node(aten.hardtanh.default, -1.0, 1.0), False, False),
    ],
)
def test_ops_that_keep_the_grid_or_the_sign(call, on_grid, nonnegative):
    assert stays_on_grid(call) is on_grid
    assert is_nonnegative(call) is nonnegative


def test_a_kernel_ends_behind_the_relu_that_alone_reads_it():
    graph = fx.Graph()
    conv = graph.call_module("conv", (graph.placeholder("x"),))
    relu = graph.call_function(aten.relu.default, (conv,))
    assert output_end(conv) is relu
    assert is_fused_activation(relu)
    graph.call_function(aten.add.Tensor, (conv, relu))
    assert output_end(conv) is conv
    clip = graph.call_function(aten.hardtanh.default, (relu, 0, 6))
    assert is_fused_activation(clip)
    assert not is_fused_activation(graph.call_function(aten.hardtanh.default, (relu, 0.0, 1.0)))
