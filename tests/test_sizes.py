import pytest
import torch

import models
from dfqc.backends import ort
from dfqc.compiler.contracts import QParams, QTensor, QuantState
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.plan import make_plan
from dfqc.compiler.sizes import ideal_bytes
from dfqc.compiler.spec import Bits, parse_rule


def state_of(graph, plan):
    weights, biases = {}, {}
    for layer in plan.layers.values():
        module = graph.module.get_submodule(layer.name)
        if layer.weight is None:
            continue
        weights[layer.name] = QTensor(module.weight.to(torch.int8), torch.ones(len(module.weight)))
        if module.bias is not None:
            biases[layer.name] = module.bias
    return QuantState(plan, weights, biases, {q: QParams(1.0, 0) for q in plan.quantizers})


@pytest.mark.parametrize(("bits", "ends"), [(Bits(8, 8), None), (Bits(4, 8), Bits(8, 8))])
def test_a_plain_net_by_hand(bits, ends):
    graph = fold(models.trace_tiny("plain"))
    plan = make_plan(graph, ort.TARGET, bits, [], ends=ends)
    own = sum(q.tied is None for q in plan.quantizers.values())
    # stem 3->8 3x3, body 8->12 3x3, fc 12->10; each channel has an int32 bias and a float scale.
    first, middle, last = 216, 864, 120
    end_bits = (ends or bits).weight
    weights = (first * end_bits + middle * bits.weight + last * end_bits) // 8
    assert ideal_bytes(graph, state_of(graph, plan)) == weights + 4 * 2 * (8 + 12 + 10) + 4 * own


def test_what_stays_in_float_counts_as_float():
    graph = fold(models.trace_tiny("plain"))
    plan = make_plan(graph, ort.TARGET, Bits(8, 8), [parse_rule("head.fc=w32a32")], ends=None)
    own = sum(q.tied is None for q in plan.quantizers.values())
    expected = 216 + 864 + 4 * 2 * (8 + 12) + 4 * (120 + 10) + 4 * own
    assert ideal_bytes(graph, state_of(graph, plan)) == expected
