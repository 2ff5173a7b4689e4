import numpy as np
import pytest
import torch
from torch import nn

import models
from dfqc.compiler.evaluate import sqnr_db
from dfqc.compiler.fidelity import layer_sqnr
from dfqc.compiler.graph import copy_graph, layer_nodes


@pytest.fixture
def graph():
    return models.trace_tiny("plain")


def shifted(graph, layer, amount):
    """Add a known error to one layer's bias: its output, and all behind it, is off."""
    copy = copy_graph(graph)
    module = copy.module.get_submodule(layer)
    bias = torch.zeros(module.weight.shape[0]) if module.bias is None else module.bias.detach()
    module.bias = nn.Parameter(bias + amount)
    return copy


def test_a_known_error_in_one_layer(graph):
    layers = {name: node.name for name, node in layer_nodes(graph)}
    images = models.images(20)
    found = layer_sqnr(graph, shifted(graph, "body.0", 0.01), layers, images, batch=8)
    outputs = {}

    def keep(module, inputs, output):
        outputs["body.0"] = output

    handle = graph.module.get_submodule("body.0").register_forward_hook(keep)
    with torch.no_grad():
        graph.module(images)
    handle.remove()
    exact = outputs["body.0"].double().numpy()
    expected = 10 * np.log10((exact**2).sum() / (0.01**2 * exact.size))
    assert found["stem.0"] is None  # in front of the error, nothing differs
    assert found["body.0"] == pytest.approx(expected, rel=1e-4)
    assert found["head.fc"] is not None


def test_the_last_layer_agrees_with_the_evaluation_of_outputs(graph):
    layers = {name: node.name for name, node in layer_nodes(graph)}
    other, images = shifted(graph, "stem.0", 0.1), models.images(10)
    with torch.no_grad():
        outputs = [g.module(images).numpy() for g in (graph, other)]
    found = layer_sqnr(graph, other, layers, images, batch=4)["head.fc"]
    assert found == pytest.approx(sqnr_db(*outputs), rel=1e-4)
