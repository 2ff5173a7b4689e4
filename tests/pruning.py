"""What removing channels must be equal to, by other means than removing them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from dfqc.compiler.channels import Group, find_groups, remove
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.graph import Graph, copy_graph, count_macs, count_params, verify
from functions import Function

IMAGE = ImageSpec((3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def draw(graph: Graph, ratio: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """Draw the channels to keep of every prunable group, equally many of each slice."""
    rng = torch.Generator().manual_seed(seed)
    keep = {}
    for group in find_groups(graph):
        if group.prunable:
            length = group.size // group.slices
            gone = max(1, int(ratio * length))
            kept = [
                i * length + torch.randperm(length, generator=rng)[gone:].sort().values
                for i in range(group.slices)
            ]
            keep[group.name] = torch.cat(kept)
    return keep


def silence(graph: Graph, keep: Mapping[str, Tensor]) -> Graph:
    """Set to zero what the users of the removed channels multiply them with."""
    graph = copy_graph(graph)
    for group in find_groups(graph):
        for c in lost(group.size, keep.get(group.name)):
            for use in group.users:
                first = use.offset + c * use.spread
                layer = graph.module.get_submodule(use.layer)
                if isinstance(layer, nn.ConvTranspose2d):
                    layer.weight.data.narrow(0, first, use.spread).zero_()
                    continue
                i, first = divmod(first, layer.weight.shape[1])  # which group, and where in it
                rows = len(layer.weight) // getattr(layer, "groups", 1)
                own = layer.weight.data.narrow(0, i * rows, rows)
                own.narrow(1, first, use.spread).zero_()
    return graph


def disturb(graph: Graph, keep: Mapping[str, Tensor]) -> Graph:
    """Change the filters of the removed channels."""
    graph = copy_graph(graph)
    for group in find_groups(graph):
        for path in group.producers:
            layer = graph.module.get_submodule(path)
            for c in lost(group.size, keep.get(group.name)):
                if isinstance(layer, nn.ConvTranspose2d):
                    i, column = divmod(c, layer.weight.shape[1])
                    rows = len(layer.weight) // layer.groups
                    layer.weight.data[i * rows : (i + 1) * rows, column].mul_(-0.5)
                else:
                    layer.weight.data[c].mul_(-0.5)
    return graph


def lost(size: int, kept: Tensor | None) -> list[int]:
    """List the channels that are not kept."""
    return [] if kept is None else sorted(set(range(size)) - set(kept.tolist()))


def check(graph: Graph, ratio: float = 0.3) -> None:
    """Remove random channels of all groups and compare with the whole graph.

    Equal to the whole graph without what reads them; and that they are read nowhere else: with
    the readers silent, what the removed channels are makes no difference.
    """
    keep = draw(graph, ratio)
    assert keep
    smaller, silent = remove(graph, keep), silence(graph, keep)
    verify(smaller, "test")
    x = models.images(3, graph.image, seed=1)
    with torch.no_grad():
        whole, expected = graph.module(x), silent.module(x)
        got, disturbed = smaller.module(x), disturb(silent, keep).module(x)
        audible = disturb(graph, keep).module(x)
    scale = expected.abs().max()
    assert torch.isfinite(scale)
    assert float((got - expected).abs().max() / scale) < 1e-5
    assert torch.equal(disturbed, expected)
    # Neither comparison is one of equal things.
    assert not torch.allclose(expected, whole, rtol=1e-3)
    assert not torch.equal(audible, whole)
    assert count_params(smaller) < count_params(graph)
    assert count_macs(smaller) < count_macs(graph)


def chain(width: int = 16, seed: int = 0) -> Graph:
    """Two convolutions and a classifier, batch norms between."""

    def forward(m, x):
        x = F.relu(m.b(F.relu(m.a(x))))
        return m.fc(x.mean((2, 3)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = {
            "a": models.conv_bn(3, width),
            "b": models.conv_bn(width, 2 * width),
            "fc": nn.Linear(2 * width, 5),
        }
    module = Function(forward, **modules)
    models.randomize_norms(module)
    return models.trace_module(module, IMAGE)


def conv(c: int, out: int, **options: object) -> nn.Sequential:
    """Build a convolution with a batch norm."""
    return models.conv_bn(c, out, **options)


def trace_function(forward: Callable[..., Tensor], **modules: Callable[[], nn.Module]) -> Graph:
    """Trace `forward(modules, x)` with modules made under a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = {name: module() for name, module in modules.items()}
    module = Function(lambda m, x: forward(m, x), **built)
    models.randomize_norms(module)
    return models.trace_module(module, IMAGE)


def groups_of(graph: Graph) -> dict[str, Group]:
    """Return the groups by name."""
    return {group.name: group for group in find_groups(graph)}
