import torch
from torch import nn

import models


class Masked(nn.Module):
    """Attention mask as torchvision's Swin builds it: slices of zeros are written to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.arange(16.0))
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, x):
        mask = x.new_zeros((16, 16))
        for i, rows in enumerate((slice(0, 5), slice(5, 16))):
            mask[rows, :] = float(i)
        mask = mask.masked_fill(mask != 0, -2.0)
        grid = torch.arange(16) + self.grid
        return x * mask + grid.view(1, -1) * torch.sigmoid(self.scale)


def kinds(graph):
    return [
        str(n.target).split(".")[1] for n in graph.module.graph.nodes if n.op == "call_function"
    ]


def run_both(module, graph):
    x = models.images(3)
    with torch.no_grad():
        return graph.module(x), module(x)


def test_masks_and_grids_are_computed_once():
    module = Masked().eval()
    graph = models.trace_module(module)
    # What depends on a parameter stays: sigmoid(scale).
    assert sorted(kinds(graph)) == ["add", "mul", "mul", "sigmoid"]
    got, expected = run_both(module, graph)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    mask = next(v for _, v in graph.module.named_buffers() if v.shape == (16, 16))
    assert mask[:5].unique().tolist() == [0.0]
    assert mask[5:].unique().tolist() == [-2.0]


class WritesImage(nn.Module):
    def forward(self, x):
        canvas = x.new_zeros((3, 16, 16))
        canvas[:, 2:4] = x.mean((0, 2, 3)).view(3, 1, 1)
        return x + canvas


def test_memory_that_image_data_is_written_to_is_not_constant():
    module = WritesImage().eval()
    graph = models.trace_module(module)
    assert "mean" in kinds(graph)
    got, expected = run_both(module, graph)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


class ReadsTwice(nn.Module):
    def forward(self, x):
        bias = torch.zeros(16)
        y = x + bias
        bias += 1
        return y * bias


def test_each_reader_gets_the_value_of_its_moment():
    module = ReadsTwice().eval()
    got, expected = run_both(module, models.trace_module(module))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert got.abs().max() > 0


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand(16)


def test_random_numbers_are_not_frozen():
    assert "rand" in kinds(models.trace_module(Noise().eval()))
