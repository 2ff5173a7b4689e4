import itertools

import pytest
import torch

import models
import quantized
from dfqc.compiler.contracts import QParams, QTensor
from dfqc.compiler.graph import blocks
from dfqc.compiler.quantize._units import (
    UnitState,
    list_units,
    load_unit,
    merge_blocks,
    save_unit,
)


def planned(net, bits="w4a4"):
    graph = quantized.folded(net)
    return graph, quantized.plan(graph, bits)


def weighted(plan):
    return {name for name, layer in plan.layers.items() if layer.weight is not None}


@pytest.mark.parametrize("net", sorted(models.TINY))
@pytest.mark.parametrize(("count", "least"), [(1, 1), (1, 2), (2, 1), (100, 1)])
def test_merged_blocks_lead_from_image_to_output_without_a_gap(net, count, least):
    graph, plan = planned(net)
    merged = merge_blocks(graph, weighted(plan), count, least)
    whole = blocks(graph)
    assert merged[0].entry == whole[0].entry
    assert merged[-1].exit == whole[-1].exit
    assert all(a.exit == b.entry for a, b in itertools.pairwise(merged))
    assert [n for b in merged for n in b.layers] == [n for b in whole for n in b.layers]
    if count == 100:
        assert len(merged) == 1


def test_a_chain_is_taken_two_layers_at_a_time():
    graph, plan = planned("plain")
    assert [len(b.layers) for b in merge_blocks(graph, weighted(plan), 1, 1)] == [1, 1, 1]
    assert [len(b.layers) for b in merge_blocks(graph, weighted(plan), 1, 2)] == [2, 1]


@pytest.mark.parametrize("kind", ["block", "layer"])
@pytest.mark.parametrize("net", sorted(models.TINY))
def test_every_planned_layer_is_in_one_unit(net, kind):
    graph, plan = planned(net)
    regions = merge_blocks(graph, weighted(plan), 1, 1)
    units = list_units(graph, plan, regions, kind)
    names = [name for unit in units for name in unit.layers]
    wanted = [name for name, layer in plan.layers.items() if layer.weight is not None]
    assert sorted(names) == sorted(wanted)
    assert all(len(unit.layers) == 1 for unit in units) or kind == "block"


def test_a_layer_ends_behind_its_activation():
    graph, plan = planned("depthwise")
    units = list_units(graph, plan, merge_blocks(graph, weighted(plan), 1, 1), "layer")
    ends = {unit.name: unit.exit for unit in units}
    nodes = {node.name: node for node in graph.module.graph.nodes}
    clipped = [n for n, end in ends.items() if "hardtanh" in end]
    assert clipped
    assert all(nodes[ends[n]].args[0].name == plan.layers[n].node for n in clipped)


def test_a_unit_is_read_back(tmp_path):
    state = UnitState(
        {"a.conv": QTensor(torch.tensor([[1, -2]], dtype=torch.int8), torch.tensor([0.1]))},
        {"a.conv": torch.tensor([0.3])},
        {"relu.a4": QParams(0.1234567, 3)},
    )
    save_unit(state, {"decision": "{}"}, tmp_path)
    back, notes = load_unit(tmp_path)
    assert notes == {"decision": "{}"}
    assert back.acts == state.acts
    assert torch.equal(back.weights["a.conv"].codes, state.weights["a.conv"].codes)
    assert torch.equal(back.weights["a.conv"].scale, state.weights["a.conv"].scale)
    assert torch.equal(back.biases["a.conv"], state.biases["a.conv"])
