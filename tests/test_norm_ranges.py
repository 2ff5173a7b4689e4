import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

import models
import quantized
from dfqc.compiler.contracts import CalibSet, QuantizerSupplies
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import batch_norms
from dfqc.compiler.moments import node_moments
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.quantize import gptq, rtn, squant, udfc
from dfqc.compiler.quantize._norm_ranges import SIGMAS, norm_histograms
from dfqc.compiler.quantize._ranges import Histogram

CPU = torch.device("cpu")
NOTHING = CalibSet(torch.empty(0, 3, 16, 16), None, "none")
METHODS = {
    "rtn": (rtn, {}),
    "squant": (squant, {}),
    "gptq": (gptq, {"hessian": "bn"}),
    "udfc": (udfc, {}),
}


def run(net, name, calib=NOTHING, unfolded=True, bits="w4a4", **options):
    plugin, own = METHODS[name]
    graph = quantized.folded(net)
    supplies = QuantizerSupplies(unfolded=quantized.traced(net) if unfolded else None)
    return plugin.quantize(
        graph, calib, quantized.plan(graph, bits),
        plugin.Options.model_validate({"acts": "bn", **own, **options}),
        rng=torch.Generator(), device=CPU, supplies=supplies,
    )  # fmt: skip


def histogram(module, *names):
    """Trace and fold; return the unfolded graph and the named nodes' histograms."""
    models.randomize_norms(module)
    graph = models.trace_module(module)
    return graph, norm_histograms(graph, fold(graph), names)


def share(hist, low, high):
    centers = hist.centers()
    return float(hist.counts[(centers > low) & (centers <= high)].sum() / hist.counts.sum())


@pytest.mark.parametrize("name", METHODS)
def test_a_network_of_norms_needs_no_images(name):
    state = run("residual", name)
    assert state.info["ranges_from_images"] == []
    assert set(state.acts) == set(state.plan.quantizers)
    images = quantized.calib()
    assert run("residual", name, images).acts == state.acts
    assert run("residual", name, images, acts="mse").acts != state.acts


@pytest.mark.parametrize("name", METHODS)
def test_batch_norms_are_asked_for(name):
    own = {"hessian": "images"} if name == "gptq" else {}
    with pytest.raises(UsageError, match=r"acts=bn: .* batch norms, got none; use acts=mse"):
        run("residual", name, quantized.calib(), unfolded=False, **own)


def test_a_rectified_norms_histogram_is_the_mixture_of_its_channels():
    graph, found = histogram(models.Plain(), "relu")
    norm = batch_norms(graph)[0].module
    normals = [stats.norm(b, abs(g)) for b, g in zip(norm.bias, norm.weight.data, strict=True)]
    assert found["relu"].low == 0
    largest = max(n.mean() + SIGMAS * n.std() for n in normals)
    assert found["relu"].high == pytest.approx(largest, rel=1e-6)
    for low, high in [(0.3, 0.7), (0.7, 1.5), (1.5, 10)]:
        expected = np.mean([n.cdf(high) - n.cdf(low) for n in normals])
        assert share(found["relu"], low, high) == pytest.approx(expected, abs=0.02)


def test_relu6_ends_at_six():
    class Clipped(models.Plain):
        def forward(self, x):
            return self.head(F.relu6(self.body(F.relu6(self.stem(x)))))

    net = Clipped()
    _, found = histogram(net, "hardtanh")
    assert found["hardtanh"].low == 0
    assert 0 < found["hardtanh"].high <= 6
    net.stem[1].bias.data += 10
    graph = models.trace_module(net)
    found = norm_histograms(graph, fold(graph), ["hardtanh"])
    assert found["hardtanh"].high == 6
    assert share(found["hardtanh"], 5.99, 6) > 0.9


class Chain(nn.Module):
    """Normal channels behind every norm: the images are, and a 1x1 layer of many keeps it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = models.conv_bn(3, 8, 1), models.conv_bn(8, 8, 3)
        self.head = models.Head(8)

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def test_ranges_are_those_of_images_that_have_the_statistics():
    torch.manual_seed(0)
    module, images = Chain(), models.images(64, seed=3)
    models.randomize_norms(module)
    for norm in (module.first[1], module.second[1]):
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        module.train()(images)
    graph = models.trace_module(module.eval())
    folded = fold(graph)
    plan = quantized.plan(folded, "w4a4", ends=None)
    by = {
        acts: rtn.quantize(
            folded, CalibSet(images, None, "test"), plan, rtn.Options(acts=acts),
            rng=torch.Generator(), device=CPU, supplies=QuantizerSupplies(unfolded=graph),
        ).acts
        for acts in ("bn", "mse")
    }  # fmt: skip
    for source in ("relu", "relu_1"):
        (name,) = [q.name for q in plan.quantizers.values() if q.source == source]
        assert by["bn"][name].scale == pytest.approx(by["mse"][name].scale, rel=0.2)
    (image,) = [q.name for q in plan.quantizers.values() if q.source == "x"]
    assert by["bn"][image] == by["mse"][image]


def test_branches_of_a_sum_may_agree():
    graph = quantized.traced("depthwise")
    found = norm_histograms(graph, quantized.folded("depthwise"), ["add"])["add"]
    parts = [node_moments(graph)[n.name] for n in graph.module.graph.nodes
             if n.name in {a.name for a in next(m for m in graph.module.graph.nodes
                                                if m.name == "add").args}]  # fmt: skip
    mean = sum(part.mean.mean((0, 2, 3)) for part in parts)
    deviation = sum(part.var.sqrt().mean((0, 2, 3)) for part in parts)
    assert found.high == pytest.approx(float((mean + SIGMAS * deviation).max()), rel=1e-6)
    assert found.low == pytest.approx(float((mean - SIGMAS * deviation).min()), rel=1e-6)


class Unnormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = models.conv_bn(3, 8)
        self.bare = nn.Conv2d(8, 8, 3, padding=1)
        self.body = models.conv_bn(8, 8)
        self.head = models.Head(8)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.body(F.relu(self.bare(x)))))


def test_tensors_without_norms_come_from_the_images_and_are_named(caplog):
    module = Unnormed()
    models.randomize_norms(module)
    graph = models.trace_module(module)
    folded = fold(graph)
    plan = quantized.plan(folded, "w4a4")
    given = {"rng": torch.Generator(), "device": CPU}
    supplies = QuantizerSupplies(unfolded=graph)
    state = rtn.quantize(
        folded, quantized.calib(), plan, rtn.Options(acts="bn"), supplies=supplies, **given
    )
    assert state.info["ranges_from_images"] == ["relu_1"]
    measured = rtn.quantize(folded, quantized.calib(), plan, rtn.Options(), **given)
    same = {name for name in state.acts if state.acts[name] == measured.acts[name]}
    assert "relu_1.a4" in same
    assert "relu.a4" not in same
    (record,) = [r for r in caplog.records if r.name == rtn.__name__]
    assert record.levelname == "WARNING"
    assert "no batch norm describes 1 of" in record.getMessage()
    assert record.getMessage().endswith("from the images: relu_1")
    with pytest.raises(UsageError, match="activation ranges of relu_1 need images, got none"):
        rtn.quantize(folded, NOTHING, plan, rtn.Options(acts="bn"), supplies=supplies, **given)


def test_two_folded_norms_in_a_row_give_what_the_second_states():
    class Twice(models.Plain):
        def __init__(self):
            super().__init__()
            self.again = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.head(F.relu(self.body(self.again(self.stem(x)))))

    module = Twice()
    models.randomize_norms(module)
    module.again.bias.data += 30
    graph = models.trace_module(module)
    folded = fold(graph)
    (name,) = {n.name for n in folded.module.graph.nodes if n.target == "stem.0"}
    assert norm_histograms(graph, folded, [name])[name].low > 10


def test_a_sum_that_a_norm_reads_has_its_running_statistics():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner = models.conv_bn(3, 8), models.conv_bn(8, 8)
            self.norm, self.head = nn.BatchNorm2d(8), models.Head(8)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.head(F.relu(self.norm(x + self.inner(x))))

    module = PreActivation()
    models.randomize_norms(module)
    module.norm.running_mean.fill_(50)
    module.norm.running_var.fill_(4)
    graph = models.trace_module(module)
    hist = norm_histograms(graph, fold(graph), ["add"])["add"]
    assert (hist.low, hist.high) == pytest.approx((50 - 2 * SIGMAS, 50 + 2 * SIGMAS))


def test_a_mean_stays_between_its_values():
    _, found = histogram(models.Plain(), "max_pool2d", "mean")
    assert found["mean"].low >= 0
    assert found["mean"].high <= found["max_pool2d"].high


def test_constant_channels_have_an_empty_histogram_of_their_value():
    module = models.Plain()
    models.randomize_norms(module)
    module.stem[1].weight.data.zero_()
    module.stem[1].bias.data.fill_(-1)
    graph = models.trace_module(module)
    (hist,) = norm_histograms(graph, fold(graph), ["relu"]).values()
    assert isinstance(hist, Histogram)
    assert (hist.low, hist.high, float(hist.counts.sum())) == (0, 0, 0)


def test_parts_of_a_concat_count_by_their_channels():
    graph = quantized.traced("concat")
    (hist,) = norm_histograms(graph, quantized.folded("concat"), ["cat"]).values()
    parts = norm_histograms(graph, quantized.folded("concat"), ["relu", "relu_1"])
    assert hist.high == max(part.high for part in parts.values())
    assert hist.counts.sum() == pytest.approx(sum(float(p.counts.sum()) for p in parts.values()))


def test_no_passes_are_planned_for():
    assert rtn.count_passes(rtn.Options(acts="bn"), 100) == 0
