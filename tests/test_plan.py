import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
import quantized
from dfqc.backends import ort
from dfqc.compiler.errors import UnsupportedError, UsageError
from dfqc.compiler.plan import Choice, make_plan
from dfqc.compiler.spec import Bits, QScheme

W4A4, W8A8, FLOAT = Bits(4, 4), Bits(8, 8), Bits(32, 32)
NARROW = dataclasses.replace(ort.TARGET, name="narrow", weight_bits=(8,), act_bits=(8,))


def test_layers_come_in_the_order_they_run_with_everything_decided():
    plan = quantized.plan(quantized.folded("residual"), "w4a4")
    assert list(plan.layers) == [
        "conv1",
        "layer1.conv1",
        "layer1.conv2",
        "layer2.downsample.0",
        "layer2.conv1",
        "layer2.conv2",
        "head.fc",
    ]
    assert (plan.target, plan.bits) == ("ort", W4A4)
    for name, layer in plan.layers.items():
        end = name in ("conv1", "head.fc")
        assert layer.name == name
        assert layer.node == name.replace(".", "_")
        assert layer.op == ("Linear" if name == "head.fc" else "Conv2d")
        assert layer.asked == layer.exported == (W8A8 if end else W4A4)
        assert layer.weight == QScheme(8 if end else 4, signed=True, symmetric=True, axis=0)
        assert plan.quantizers[layer.input].scheme.bits == layer.exported.act
        assert layer.reason == ("" if end else ort.TARGET.kernel_note)


def test_ends_and_rules_of_the_user():
    graph = quantized.folded("residual")
    assert {p.asked for p in quantized.plan(graph, "w3a5", ends=None).layers.values()} == {
        Bits(3, 5)
    }
    plan = quantized.plan(graph, "w4a4", "layer2.*=w2a4", "*.conv2=w8a8", "conv1=w6a6")
    assert {name: str(p.asked) for name, p in plan.layers.items()} == {
        "conv1": "w6a6",
        "layer1.conv1": "w4a4",
        "layer1.conv2": "w8a8",
        "layer2.downsample.0": "w2a4",
        "layer2.conv1": "w2a4",
        "layer2.conv2": "w8a8",
        "head.fc": "w8a8",
    }
    with pytest.raises(UsageError, match=r"nearest: .*layer1\.conv"):
        quantized.plan(graph, "w4a4", "layer1.conv3=w8a8")


def test_a_layer_left_in_float():
    plan = quantized.plan(quantized.folded("residual"), "w4a4", "layer1.conv1=w32a32")
    layer = plan.layers["layer1.conv1"]
    assert (layer.exported, layer.weight, layer.input) == (FLOAT, None, None)
    assert layer.reason == "left in float32 as asked"


def test_weight_only_layers_read_float():
    plan = quantized.plan(quantized.folded("residual"), "w4a16")
    for layer in plan.layers.values():
        assert layer.exported == Bits(layer.asked.weight, 32)
        assert layer.weight is not None
        assert layer.input is None
        assert "weight-only" in layer.reason
        assert "computes in float32" in layer.reason
    plain = quantized.plan(quantized.folded("residual"), "w4a32").layers["layer1.conv1"]
    assert "computes in float32" not in plain.reason  # it does as asked


def test_a_layer_type_without_integer_kernel_stays_in_float():
    plan = quantized.plan(quantized.folded("transposed"), "w4a4")
    layer = plan.layers["up"]
    assert (layer.op, layer.asked, layer.exported) == ("ConvTranspose2d", W4A4, FLOAT)
    assert layer.reason == "target 'ort' has no integer kernel for ConvTranspose2d: left in float32"
    convolutions = dataclasses.replace(ort.TARGET, integer_ops=("Conv2d",))
    plan = quantized.plan(quantized.folded("residual"), "w4a4", target=convolutions)
    assert plan.layers["head.fc"].exported == FLOAT
    assert "mean.a8" not in plan.quantizers


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.head = models.Head(8)

    def forward(self, x):
        return self.head(self.shared(F.relu(self.shared(self.stem(x)))))


def test_a_module_called_twice_stays_in_float():
    plan = quantized.plan(quantized.fold_module(Twice()), "w4a4")
    assert plan.layers["shared"].exported == FLOAT
    assert "called 2 times" in plan.layers["shared"].reason
    assert plan.layers["stem"].exported == W8A8


@pytest.mark.parametrize(
    ("bits", "rules", "where"),
    [
        ("w4a8", (), "layer1.conv1: 4-bit weights"),
        ("w8a4", (), "layer1.conv1: 4-bit activations"),
        ("w8a8", ("head.fc=w2a8",), "head.fc: 2-bit weights"),
        ("w8a32", (), "conv1: 32-bit activations"),
    ],
)
def test_bits_that_the_target_does_not_hold_end_with_exit_code_4(bits, rules, where):
    with pytest.raises(UnsupportedError, match=where) as caught:
        quantized.plan(quantized.folded("residual"), bits, *rules, target=NARROW)
    assert caught.value.exit_code == 4
    assert "'narrow'" in str(caught.value)
    assert "expected one of 8" in str(caught.value)


def test_planning_changes_nothing_in_the_graph():
    graph = quantized.folded("residual")
    code = graph.module.code
    weights = {name: value.clone() for name, value in graph.module.state_dict().items()}
    quantized.plan(graph, "w4a4")
    assert graph.module.code == code
    assert all(torch.equal(v, weights[n]) for n, v in graph.module.state_dict().items())


@pytest.mark.parametrize("net", sorted(models.TINY))
@pytest.mark.parametrize("target", [ort.TARGET, quantized.INPUTS], ids=lambda t: t.name)
def test_plans_of_all_nets_are_consistent(net, target):
    graph = quantized.folded(net)
    names = [n.name for n in graph.module.graph.nodes]
    plan = quantized.plan(graph, "w4a4", ends=None, target=target)
    seen = []
    for q in plan.quantizers.values():
        users = [u.name for n in graph.module.graph.nodes if n.name == q.source for u in n.users]
        assert q.consumers
        assert set(q.consumers) <= set(users)
        assert not q.after or q.after in seen  # wider ones first
        assert not q.tied or q.tied in seen
        seen.append(q.name)
    order = [names.index(q.source) for q in plan.quantizers.values()]
    assert order == sorted(order)
    for layer in plan.layers.values():
        assert (layer.input is None) == layer.exported.is_float
        if layer.input is not None:
            assert plan.quantizers[layer.input].scheme.bits == layer.exported.act


def test_the_image_keeps_its_eight_bits_unless_a_rule_narrows_it():
    graph = quantized.folded("residual")
    kept = quantized.plan(graph, "w3a3", ends=None).layers["conv1"]
    assert (kept.asked, kept.exported) == (Bits(3, 3), Bits(3, 8))
    assert "reads the image" in kept.reason
    narrowed = quantized.plan(graph, "w3a3", "conv1=w3a3", ends=None).layers["conv1"]
    assert narrowed.exported == Bits(3, 3)
    assert quantized.plan(graph, "w3a8", ends=None).layers["conv1"].reason == ort.TARGET.kernel_note


def test_weight_bits_that_a_limit_chose():
    graph = quantized.folded("residual")
    chosen = {
        "conv1": Choice(3, "w3 chosen"),
        "layer2.conv1": Choice(6, "w6 chosen"),
    }
    plan = make_plan(graph, ort.TARGET, Bits(8, 4), [], ends=None, chosen=chosen)
    image, inner, other = (plan.layers[n] for n in ("conv1", "layer2.conv1", "layer2.conv2"))
    assert (image.asked, image.exported) == (Bits(3, 4), Bits(3, 8))
    assert image.reason.startswith("w3 chosen; reads the image")
    assert image.weight == QScheme(3, signed=True, symmetric=False, axis=0)
    assert inner.asked == inner.exported == Bits(6, 4)
    assert inner.reason == f"w6 chosen; {ort.TARGET.kernel_note}"
    assert other.asked == Bits(8, 4)
    with pytest.raises(UnsupportedError, match=r"layer2\.conv1: 6-bit weights"):
        make_plan(
            graph, NARROW, Bits(8, 8), [], ends=None, chosen=chosen | {"conv1": Choice(8, "")}
        )
