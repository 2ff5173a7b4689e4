import pytest
import torch

import models
import quantized
from dfqc.compiler.graph import blocks, node_shapes
from dfqc.compiler.regions import cut_region


class Keeper(torch.fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, module):
        super().__init__(module, garbage_collect_values=False)
        self.kept = {}

    def run_node(self, n):
        self.kept[n.name] = super().run_node(n)
        return self.kept[n.name]


def values(graph, images):
    keeper = Keeper(graph.module)
    with torch.no_grad():
        keeper.run(images)
    return keeper.kept


@pytest.mark.parametrize("net", sorted(models.TINY))
def test_every_block_computes_what_the_network_does_there(net):
    graph = quantized.folded(net)
    shapes, whole = node_shapes(graph), values(graph, models.images(3))
    for block in blocks(graph):
        region = cut_region(graph.module, block.entry, block.exit, shapes)
        with torch.no_grad():
            assert torch.equal(region(whole[block.entry]), whole[block.exit]), block.name


def test_a_region_shares_the_layers_it_was_cut_from():
    graph = quantized.folded("residual")
    block = blocks(graph)[1]
    region = cut_region(graph.module, block.entry, block.exit, node_shapes(graph))
    name = block.layers[0]
    assert region.get_submodule(name) is graph.module.get_submodule(name)


def test_a_region_takes_any_batch():
    graph = quantized.folded("attention")
    whole = values(graph, models.images(5))
    block = blocks(graph)[1]
    region = cut_region(graph.module, block.entry, block.exit, node_shapes(graph))
    with torch.no_grad():
        for rows in (1, 5):
            assert len(region(whole[block.entry][:rows])) == rows


def test_what_passes_by_the_entry_is_refused():
    graph = quantized.folded("residual")
    inner = next(b for b in blocks(graph) if len(b.layers) > 1)
    middle = graph.module.graph
    conv = next(n for n in middle.nodes if n.op == "call_module" and str(n.target) in inner.layers)
    with pytest.raises(ValueError, match="alone"):
        cut_region(graph.module, conv.name, inner.exit, node_shapes(graph))
