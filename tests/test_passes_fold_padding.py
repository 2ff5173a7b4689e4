import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfqc.compiler.graph import layer_nodes
from folding import Chain, aten, check


def pads(graph):
    return sum(n.target == aten.pad.default for n in graph.module.graph.nodes)


class Pad(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.widths = widths

    def forward(self, x):
        return F.pad(x, self.widths)


@pytest.mark.parametrize(
    ("widths", "left"),
    [((1, 1, 2, 2), 0), ((1, 1), 0), ((0, 1, 0, 1), 1), ((1, 1, 0, 2), 1), ((-1, -1, 0, 0), 1)],
)
@pytest.mark.parametrize("norm", [False, True])
def test_padding_then_convolution(widths, left, norm):
    conv = nn.Conv2d(3, 4, 3, padding=1)
    tail = [nn.BatchNorm2d(4)] if norm else []
    folded = check(Chain(Pad(widths), conv, *tail), left=0)
    assert pads(folded) == left
    if not left:
        assert folded.module.get_submodule("body.1").padding == (1 + sum(widths[2:]) // 2, 2)


@pytest.mark.parametrize(
    "pad",
    [nn.ConstantPad2d(1, 0.5), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1)],
    ids=lambda p: type(p).__name__,
)
def test_other_padding_stays(pad):
    module = Chain(pad, nn.Conv2d(3, 4, 3))
    folded = check(module, left=0)
    (_, node), *_ = layer_nodes(folded)
    assert folded.module.get_submodule(str(node.target)).padding == (0, 0)


class SharedPadding(nn.Module):
    """A padded tensor that is also read by something else than a convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1))
        return torch.sigmoid(self.conv(x)) + x


def test_padding_with_another_reader_stays():
    assert pads(check(SharedPadding(), left=0)) == 1


def test_norm_padding_convolution_stays():
    """The pad moves into the convolution first, so the shift must not pass through it."""
    module = Chain(nn.BatchNorm2d(3), nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3))
    assert pads(check(module, left=1)) == 0
