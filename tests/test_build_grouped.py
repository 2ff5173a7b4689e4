"""A network with grouped convolutions is pruned, rounded and run by the engine."""

import onnx
import pytest
from onnx import numpy_helper

import models
from command import QUICK, build, run
from dfqc.compiler.graph import count_macs, count_params

UDFC = ("--quantizer", "udfc", "--bits", "w8a8")


def convolutions(path):
    """Return weight shape and groups of every convolution."""
    model = onnx.load(path)
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type != "Conv":
            continue
        name = node.input[1]
        while name not in tensors:
            name = producers[name].input[0]
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        found.append((tensors[name].shape, groups))
    return found


@pytest.mark.parametrize("restore", ["patches", "none"])
def test_grouped_convolutions_shrink_through_to_the_engine(shared, capsys, restore):
    flags = ("--prune", "0.5", "--restore", restore)
    manifest = build(capsys, shared, *UDFC, *flags, net="grouped", output=restore)
    assert manifest["status"] == "passed"
    assert manifest["parity"]["argmax_agreement"] >= 99
    about = manifest["pruning"]
    cut = {g["name"]: (g["channels_before"], g["channels_after"]) for g in about["groups"]}
    assert cut == {"stem.0": (8, 4), "grouped": (12, 8)}  # a half, a third of each group of 4
    assert about["not_restored"] == []
    shapes = convolutions(shared.root / restore / "model.onnx")
    assert shapes == [((4, 3, 3, 3), 1), ((8, 1, 3, 3), 4)]
    graph = models.trace_tiny("grouped")
    assert about["params_before"] == count_params(graph)
    assert about["macs_before"] == count_macs(graph)
    # By hand: kernels, a bias of the grouped convolution, two values per channel of a norm.
    assert about["params_after"] == (4 * 27 + 2 * 4) + (8 * 9 + 8 + 2 * 8) + (8 * 10 + 10)
    assert about["macs_after"] == 16 * 16 * (4 * 27 + 8 * 9) + 8 * 10


def test_too_little_for_every_group_is_said(shared, capsys):
    done = run(capsys, shared, "plan", *shared.weights("grouped"), *QUICK, "--prune", "0.3")
    assert done.code == 2
    assert "equally many of each of up to 4 groups of a convolution" in done.user_fault
