import numpy as np
import pytest
import torch
from torch import fx, nn

from dfqc.calib._swing import shift, swing_convolutions
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.graph import Graph

SHIFTS = [(dy, dx) for dy in range(3) for dx in range(3)]


class Net(nn.Module):
    """A strided layer, an unstrided one, and two strided ones that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.keep = nn.Conv2d(4, 4, 3, 1, 1)
        self.main = nn.Conv2d(4, 5, 3, (1, 2), 1)
        self.skip = nn.Conv2d(4, 5, 1, (1, 2))

    def forward(self, x):
        x = torch.relu(self.keep(self.stem(x)))
        return self.main(x) + self.skip(x)


def graph_of(net: nn.Module) -> Graph:
    return Graph(fx.symbolic_trace(net.eval()), ImageSpec((3, 10, 8)), "test")


def fixed(monkeypatch, *shifts):
    """Make the shifts come in this order; return the list of what is left of them."""
    left = list(shifts)

    def draw(high, size, *, generator):
        assert (high, size) == (3, (2,))
        return torch.tensor(left.pop(0))

    monkeypatch.setattr(torch, "randint", draw)
    return left


def moved(x: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """Pad and crop as the paper says, in numpy."""
    height, width = x.shape[-2:]
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    return torch.from_numpy(padded[:, :, dy : dy + height, dx : dx + width].copy())


@pytest.mark.parametrize("size", [(10, 8), (5, 7), (2, 2), (2, 3)])
@pytest.mark.parametrize(("dy", "dx"), SHIFTS)
def test_a_shift_is_a_crop_of_the_reflected_input(size, dy, dx):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shift(x, dy, dx), moved(x, dy, dx))


@pytest.mark.parametrize(("dy", "dx"), SHIFTS)
def test_a_side_of_one_pixel_is_not_shifted(dy, dx):
    x = torch.arange(4.0).view(1, 1, 1, 4)
    assert torch.equal(shift(x, dy, dx), shift(x, 1, dx))
    assert torch.equal(shift(x.mT, dy, dx), shift(x.mT, dy, 1))
    assert torch.equal(shift(x[..., :1], dy, dx), x[..., :1])


def test_every_strided_convolution_reads_a_shift_of_its_own(monkeypatch):
    torch.manual_seed(0)
    net = Net()
    x = torch.randn(2, 3, 10, 8)
    with torch.no_grad():
        plain = net(x)
        inner = torch.relu(net.keep(net.stem(moved(x, 0, 2))))
        expected = net.main(moved(inner, 2, 1)) + net.skip(moved(inner, 1, 0))
        swung = swing_convolutions(graph_of(net), torch.Generator())
        left = fixed(monkeypatch, (0, 2), (2, 1), (1, 0), (1, 1), (1, 1), (1, 1))
        assert torch.equal(swung.module(x), expected)
        assert len(left) == 3
        assert torch.equal(swung.module(x), plain)
    assert left == []


def test_shifts_are_uniform_and_those_of_the_seed():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, 2, bias=False))
    nn.init.ones_(net[0].weight)
    graph = Graph(fx.symbolic_trace(net.eval()), ImageSpec((1, 4, 4)), "test")
    x = torch.arange(16.0).view(1, 1, 4, 4)

    def draw(seed):
        module = swing_convolutions(graph, torch.Generator().manual_seed(seed)).module
        with torch.no_grad():
            return [float(module(x)[0, 0, 1, 1]) for _ in range(900)]

    seen = draw(1)
    assert draw(1) == seen
    assert draw(2) != seen
    # A sampled pixel (2, 2) becomes any of its neighbors or stays.
    counts = {value: seen.count(value) for value in set(seen)}
    assert set(counts) == {5.0, 6.0, 7.0, 9.0, 10.0, 11.0, 13.0, 14.0, 15.0}
    assert all(60 < count < 140 for count in counts.values())  # 100 expected, 4 sigma


def test_the_graph_is_left_as_it_was():
    net = Net()
    graph = graph_of(net)
    nodes = [(node.name, node.target) for node in graph.module.graph.nodes]
    x = torch.randn(1, 3, 10, 8)
    before = graph.module(x)
    swung = swing_convolutions(graph, torch.Generator())
    with torch.no_grad():
        swung.module.get_submodule("stem").weight.zero_()
    assert [(node.name, node.target) for node in graph.module.graph.nodes] == nodes
    assert torch.equal(graph.module(x), before)


def test_without_strides_nothing_is_added():
    graph = graph_of(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ConvTranspose2d(2, 2, 2, 2)))
    swung = swing_convolutions(graph, torch.Generator())
    assert len(swung.module.graph.nodes) == len(graph.module.graph.nodes)
    x = torch.randn(1, 3, 10, 8)
    assert torch.equal(swung.module(x), graph.module(x))
