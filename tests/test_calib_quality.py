import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

import models
from dfqc.compiler.calib_quality import (
    AGREEMENT_LIMIT,
    DISTANCE_LIMIT,
    EVENNESS_LIMIT,
    LAYER_LIMIT,
    OUTSIDE_LIMIT,
    SILENT_LIMIT,
    TWINS_LIMIT,
    Classes,
    Firing,
    Score,
    Twins,
    bn_distance,
    score,
    warnings,
)
from dfqc.compiler.contracts import CalibSet, ImageSpec
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph, batch_norms
from dfqc.compiler.stages_calib import _finished

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
SMALL = ImageSpec((3, 8, 8))


def captured(graph, images, *, outputs=False):
    """Inputs (or outputs) of every batch norm in float64, by hooks: nothing of what is tested."""
    module, seen = copy.deepcopy(graph.module).double(), []
    for norm in module.modules():
        if isinstance(norm, NORMS):
            norm.register_forward_hook(lambda _, x, y: seen.append(y if outputs else x[0]))
    with torch.no_grad():
        module(images.double())
    return seen


def channels_first(x):
    return x.transpose(0, 1).flatten(1)


def graph_of(net):
    return Graph(fx.symbolic_trace(net.eval()), SMALL, "test")


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("net", ["residual", "linear_norm", "pre_activation", "depthwise"])
def test_the_distance_is_that_of_normal_distributions_relative_to_the_spread(net):
    graph, images = models.trace_tiny(net), models.images(12)
    expected = {}
    for norm, x in zip(batch_norms(graph), captured(graph, images), strict=True):
        x = channels_first(x)
        mean, var = norm.module.running_mean.double(), norm.module.running_var.double()
        std = (x.var(1, correction=0) + 1e-6).sqrt()
        squares = (x.mean(1) - mean) ** 2 + (std - (var + 1e-6).sqrt()) ** 2
        expected[norm.path] = math.sqrt(float(squares.sum() / var.sum()))
    found = score(graph, images, batch=5)
    assert found.layers == pytest.approx(expected, rel=1e-5)
    assert found.bn_distance == pytest.approx(sum(expected.values()) / len(expected), rel=1e-5)
    assert found.worst_layer == max(expected, key=expected.get)
    assert bn_distance(graph, images, batch=12) == pytest.approx(expected, rel=1e-5)


def test_the_distance_is_in_standard_deviations_and_pools_batches():
    net = nn.Sequential(nn.BatchNorm2d(3))
    graph, x = graph_of(net), models.images(10, SMALL) + 0.5
    net[0].running_mean.copy_(x.mean((0, 2, 3)))
    net[0].running_var.copy_(x.var((0, 2, 3), correction=0))
    assert bn_distance(graph, x, batch=4)["0"] < 1e-5
    net[0].running_mean.add_(2 * net[0].running_var.sqrt())
    assert bn_distance(graph, x, batch=4)["0"] == pytest.approx(2, rel=1e-5)
    assert bn_distance(graph, x, batch=10)["0"] == pytest.approx(2, rel=1e-5)
    # Spread 3 times the stored one: the standard deviation is off by 2 of it.
    net[0].running_mean.copy_(x.mean((0, 2, 3)))
    net[0].running_var.div_(9)
    assert bn_distance(graph, x)["0"] == pytest.approx(2, rel=1e-5)


def test_images_that_made_the_statistics_score_zero():
    module, images = models.build("plain").train(), models.images(64)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0  # the statistics of the last batch, and of nothing else
    with torch.no_grad():
        module(images)
    graph = models.trace_module(module.eval())
    assert 0 <= score(graph, images).bn_distance < 1e-3
    assert score(graph, 3 * images + 1).bn_distance > 0.5


def test_a_batch_norm_called_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(2 * torch.relu(self.bn(x)))

    found = bn_distance(graph_of(Twice()), models.images(40, SMALL))
    assert list(found) == ["bn", "bn#1"]
    assert found["bn"] < 0.1 < found["bn#1"]


def test_without_batch_norms_there_is_no_distance_but_all_else():
    found = score(models.trace_tiny("no_norm"), models.images(6))
    assert (found.bn_distance, found.worst_layer, found.layers) == (None, None, {})
    assert found.firing.expected == 0
    assert 0 < found.firing.share <= 1
    assert found.predictions.possible == 6


def fired(y):
    return channels_first(y).amax(1) > 0


def test_a_channel_fires_if_it_is_positive_anywhere():
    graph, images = models.trace_tiny("plain"), models.images(4)
    stem = graph.module.get_submodule("stem.1")
    with torch.no_grad():
        stem.bias[:3] = -100.0
        # So low that only the highest value of all is above 0.
        top = captured(graph, images, outputs=True)[0][:, 5].max()
        stem.bias[5] -= float(top) - 1e-3
    expected = {
        name: fired(y).double().mean().item()
        for name, y in zip(("stem.1", "body.1"), captured(graph, images, outputs=True), strict=True)
    }
    assert expected["stem.1"] == 5 / 8
    found = score(graph, images, batch=3).firing
    assert found.layers == pytest.approx(expected)
    assert found.share == pytest.approx((8 * expected["stem.1"] + 12 * expected["body.1"]) / 20)


def test_what_is_dead_in_the_model_is_no_fault_of_the_images():
    graph, images = models.trace_tiny("plain"), models.images(4)
    stem = graph.module.get_submodule("stem.1")
    with torch.no_grad():
        stem.weight.fill_(1)
        stem.bias.fill_(0)
        stem.bias[0] = -3.2  # above 0 beyond 3.2 standard deviations: not expected
        stem.bias[1] = -2.8
        stem.running_mean[2] = 50.0  # in training, inputs were higher than they will ever be here
        stem.weight[3], stem.bias[3] = 0.0, -1.0
    before = score(graph, images).firing
    body = graph.module.get_submodule("body.1")
    reach = body.bias + 3 * body.weight.abs()
    assert before.expected == 6 + int((reach > 0).sum())
    outputs = captured(graph, images, outputs=True)[0]
    silent = {c for c in range(8) if not fired(outputs)[c]} - {0, 3}
    assert 2 in silent
    in_body = ~fired(captured(graph, images, outputs=True)[1]) & (reach > 0)
    assert before.silent == len(silent) + int(in_body.sum())


def test_activations_that_are_not_about_zero_fire_if_they_vary():
    graph, images = models.trace_tiny("squeeze_excite"), models.images(4)
    expand = graph.module.get_submodule("expand")
    with torch.no_grad():
        expand.weight[2] = 0  # its gate is a constant above 0
    assert score(graph, images).firing.layers["expand"] == 7 / 8
    # A batch norm in front of an addition has no activation of its own.
    assert score(models.trace_tiny("depthwise"), images).firing.layers["project.1"] == 1


def test_channels_behind_a_linear_layer_are_last():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            return torch.relu(self.fc(x.unflatten(3, (2, 8)).flatten(1, 3)))

    net = Tokens()
    with torch.no_grad():
        net.fc.weight[1], net.fc.bias[1] = 0, -1
    found = score(models.trace_module(net), models.images(3))
    assert found.firing.layers == {"fc": 4 / 5}
    assert (found.predictions, found.agreement) == (None, None)  # the output is (n, l, c)


def test_classes_are_those_of_labels_and_of_the_model():
    graph, images = models.trace_tiny("plain"), models.images(9)
    with torch.no_grad():
        seen = graph.module(images).argmax(1)
    labels = seen.clone()
    labels[:2] = (labels[:2] + 1) % 10
    found = score(graph, images, labels, batch=4)
    assert found.predictions.counts == {
        str(c): int((seen == c).sum()) for c in sorted(set(seen.tolist()))
    }
    assert sum(found.labels.counts.values()) == 9
    assert found.labels.possible == 9  # of 10 classes
    assert found.agreement == pytest.approx(7 / 9)
    assert score(graph, images).labels is None


@pytest.mark.parametrize(
    ("labels", "evenness"),
    [
        ([0] * 20, 0.0),
        (list(range(10)) * 2, 1.0),
        ([*range(10), 3], 1.0),  # as even as 11 images can be
        ([0, 0, 0, 5], -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) / 2),
        ([3], 1.0),
    ],
)
def test_evenness_is_the_entropy_relative_to_the_highest_possible(labels, evenness):
    images = models.images(len(labels))
    found = score(models.trace_tiny("plain"), images, torch.tensor(labels)).labels
    assert found.evenness == pytest.approx(evenness)
    assert found.hit == len(set(labels))


def test_pixels_out_of_range_are_counted_beyond_half_a_code():
    graph = models.trace_tiny("plain")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (models.IMAGE.mean, models.IMAGE.std))
    pixels = uniform(2, 3, 16, 16)
    pixels[0, :, 0, 0] = torch.tensor([1 + 0.4 / 255, -0.4 / 255, 1.0])
    assert score(graph, (pixels - mean) / std).out_of_range == 0
    pixels[0, :, 0, 0] = torch.tensor([1 + 0.6 / 255, -0.6 / 255, 1.0])
    assert score(graph, (pixels - mean) / std).out_of_range == pytest.approx(2 / (2 * 3 * 256))


def test_values_that_are_not_finite_are_refused():
    images = models.images(5)
    images[3, 0, 2, 2] = math.nan
    with pytest.raises(UsageError, match=r"1 of 5 .* image 3\): .*--synth"):
        score(models.trace_tiny("plain"), images)


@pytest.mark.parametrize("net", models.TINY)
def test_every_net_is_scored_in_one_pass_and_left_as_it_was(net):
    graph, images = models.trace_tiny(net), models.images(5)
    calls, state = [], copy.deepcopy(graph.module.state_dict())
    first = next(m for m in graph.module.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    hook = first.register_forward_hook(lambda *_: calls.append(1))
    found = score(graph, images, torch.arange(5), batch=2)
    hook.remove()
    assert len(calls) == 3
    assert all(torch.equal(value, state[n]) for n, value in graph.module.state_dict().items())
    assert json.loads(json.dumps(found.to_json()))["images"] == 5
    assert score(graph, images, torch.arange(5), batch=2) == found


GOOD = Score(
    images=64,
    bn_distance=0.15,
    worst_layer="conv.bn",
    layers={"conv.bn": 0.2, "other": 0.1},
    firing=Firing(0.9, 1000, 0, {"conv.bn": 0.9}),
    labels=Classes({"0": 32, "1": 32}, 2, 2, 1.0),
    predictions=Classes({"0": 32, "1": 32}, 2, 2, 1.0),
    agreement=0.9,
    twins=Twins(0, 0.8, ()),
    out_of_range=0.0,
)
UNEVEN = Classes({"0": 60, "1": 4}, 2, 2, EVENNESS_LIMIT - 0.01)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bn_distance": DISTANCE_LIMIT + 0.01}, ["0.31 away", "0.1 to 0.2", "--synth", "--mean"]),
        ({"bn_distance": math.nan}, ["nan away", "--synth"]),
        (
            {"layers": {"conv.bn": LAYER_LIMIT + 0.01}},
            ["0.61 away", "batch norm conv.bn", "below 0.5", "--effort"],
        ),
        (
            {"firing": Firing(0.9, 1000, int(1000 * SILENT_LIMIT) + 1, {})},
            ["6 of 1000 channels", "real images: none", "--samples"],
        ),
        ({"labels": UNEVEN}, ["are labeled as 2 of 2", "0.69", "0.9 to 1", "--samples"]),
        ({"predictions": UNEVEN}, ["look to the model like 2 of 2", "0.69", "--synth"]),
        ({"agreement": AGREEMENT_LIMIT - 0.01}, ["29 %", "top-1", "--effort"]),
        ({"twins": Twins(int(64 * TWINS_LIMIT) + 1, 1.0, ())}, ["4 of 64", "of 60", "--seed"]),
        ({"out_of_range": OUTSIDE_LIMIT + 0.001}, ["1.1 %", "real images: none", "clip=true"]),
    ],
)
def test_each_fault_is_one_warning_with_figure_reference_and_remedy(change, says):
    assert warnings(GOOD) == []
    (message,) = warnings(dataclasses.replace(GOOD, **change))
    assert all(part in message for part in says)


def test_at_the_limits_and_where_nothing_applies_there_is_no_warning():
    limits = {
        "bn_distance": DISTANCE_LIMIT,
        "layers": {"conv.bn": LAYER_LIMIT},
        "firing": Firing(0.9, 1000, int(1000 * SILENT_LIMIT), {}),
        "predictions": dataclasses.replace(UNEVEN, evenness=EVENNESS_LIMIT),
        "agreement": AGREEMENT_LIMIT,
        "out_of_range": OUTSIDE_LIMIT,
    }
    assert warnings(dataclasses.replace(GOOD, **limits)) == []
    absent = dict.fromkeys(("bn_distance", "worst_layer", "firing", "predictions", "agreement"))
    assert warnings(dataclasses.replace(GOOD, layers={}, labels=None, **absent)) == []
    # Few images are uneven by chance.
    assert warnings(dataclasses.replace(GOOD, images=8, predictions=UNEVEN)) == []


@pytest.mark.parametrize("stage", ["synthesize", "holdout"])
def test_warnings_of_the_calibration_set_are_logged_and_kept(stage, caplog):
    graph, images = models.trace_tiny("residual"), 3 * models.images(20)
    context = SimpleNamespace(
        value={"trace": graph}.__getitem__,
        stage=SimpleNamespace(name=stage),
        settings=SimpleNamespace(recipe=SimpleNamespace(device="cpu")),
    )
    calib, sheet = _finished(context, CalibSet(images, None, "test", {"asked": 20}))
    expected = score(graph, images)
    kept = calib.info["score"]
    assert calib.info["asked"] == 20
    assert kept == expected.to_json() | {"warnings": warnings(expected)}
    assert len(kept["warnings"]) >= 2
    logged = [record.getMessage() for record in caplog.records if record.name == "dfqc.calib"]
    # The held-out images are half noise by design: nobody can act on a warning of them.
    wanted = kept["warnings"] if stage == "synthesize" else []
    assert logged == [f"calibration images: {text}" for text in wanted]
    assert sheet.startswith(b"\x89PNG")


def test_noise_on_a_net_with_statistics_of_other_images_is_warned_of():
    found = warnings(score(models.trace_tiny("residual"), 3 * models.images(32)))
    assert any("away from the batch norms' statistics" in text for text in found)
    assert any("out of the range" in text for text in found)
