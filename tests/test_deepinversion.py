import dataclasses

import pytest
import torch
from pydantic import ValidationError

import models
from classifiers import LABELS, top1, trained
from dfqc.calib import _inversion, _objective, deepinversion
from dfqc.calib._inversion_options import LARGE, SMALL, resolve
from dfqc.calib._pixels import Z_HIGH, Z_LOW, pixel_map
from dfqc.compiler.calib_quality import bn_distance
from dfqc.compiler.contracts import ImageSpec, Supplies
from dfqc.compiler.errors import UnsupportedError
from dfqc.compiler.graph import Graph

CPU = torch.device("cpu")
QUICK = deepinversion.PRESETS["quick"] | {"iterations": 40}


def make(graph: Graph, seed: int = 0, supplies=None, progress=None, **options: object):
    rng = torch.Generator().manual_seed(seed)
    more = {} if progress is None else {"progress": progress}
    supplies = supplies or Supplies(labels=LABELS)
    settings = deepinversion.Options(**(QUICK | options))
    count = 20 if supplies.labels is None else len(supplies.labels)
    return deepinversion.synthesize(
        graph, count, settings, rng=rng, device=CPU, supplies=supplies, **more
    )


@pytest.mark.parametrize("net", ["residual", "depthwise"])
def test_images_are_of_their_classes_and_match_the_norms(net):
    graph = trained(net)
    calib = make(graph)
    start = make(graph, iterations=1, lr=1e-9)
    assert (calib.images.shape, calib.images.dtype) == ((20, 3, 16, 16), torch.float32)
    assert torch.equal(calib.labels, LABELS)
    assert calib.source == "deepinversion"
    assert calib.info["loss"] < 0.3 * calib.info["first_loss"]
    assert top1(graph, start.images, LABELS) < 0.4
    assert top1(graph, calib.images, LABELS) > 0.8
    distances = [sum(bn_distance(graph, c.images).values()) for c in (calib, start)]
    assert distances[0] < 0.5 * distances[1]


@pytest.mark.parametrize("published", [SMALL, LARGE], ids=["small", "large"])
def test_published_settings_make_the_loss_fall(published, monkeypatch):
    monkeypatch.setattr(_inversion, "resolve", lambda options, _: dataclasses.replace(
        published, iterations=options.iterations, bn_weight=0.1))  # fmt: skip
    graph = trained("residual")
    options = deepinversion.Options(iterations=90, warm_up=5)
    calib = deepinversion.synthesize(
        graph, 20, options, rng=torch.Generator().manual_seed(0), device=CPU,
        supplies=Supplies(labels=LABELS),
    )  # fmt: skip
    assert calib.info["low_res_iterations"] == (60 if published is LARGE else 0)
    assert calib.info["iterations"] == 90
    assert calib.info["loss"] < 0.5 * calib.info["first_loss"]
    assert top1(graph, calib.images, LABELS) > 0.5


def test_without_the_class_loss_there_are_no_classes():
    graph = trained("residual")
    assert top1(graph, make(graph, classify=0.0).images, LABELS) < 0.5


def test_total_variation_smooths():
    graph = trained("residual")
    rough, smooth = (make(graph, tv=tv).images.diff(dim=3).square().mean() for tv in (0.0, 1.0))
    assert smooth < 0.5 * rough


def test_the_loss_is_the_published_sum():
    """DeepInversion, eqs. 2 to 4, written out with torch's own batch norms."""
    graph = trained("residual")
    z = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    options = deepinversion.Options(roll=0, flip=False, first_bn=10, bn_weight=0.5, tv=0.2, l2=0.3)
    objective = _objective.Objective(
        [graph], LABELS, options, resolve(options, (3, 16, 16)), _objective.Method("test"),
        torch.Generator(),
    )  # fmt: skip
    ours, theirs = (z.clone().requires_grad_() for _ in range(2))
    terms = objective.backward(ours, 1)

    inputs = []
    norms = [m for m in graph.module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [m.register_forward_pre_hook(lambda m, x: inputs.append((m, x[0]))) for m in norms]
    logits = graph.module(pixel_map(graph.image, CPU).to_normalized(theirs))
    for hook in hooks:
        hook.remove()
    matched = torch.stack([
        (x.mean((0, 2, 3)) - m.running_mean).norm()
        + (x.var((0, 2, 3), unbiased=False) - m.running_var).norm()
        for m, x in inputs
    ])  # fmt: skip
    rough = sum(
        d.norm() for d in (
            theirs.diff(dim=2), theirs.diff(dim=3),
            theirs[..., 1:, 1:] - theirs[..., :-1, :-1],
            theirs[..., 1:, :-1] - theirs[..., :-1, 1:],
        )
    )  # fmt: skip
    expected = torch.stack([
        torch.nn.functional.cross_entropy(logits, LABELS),
        0.5 * (10 * matched[0] + matched[1:].sum()),
        0.2 * rough + 0.3 * theirs.flatten(1).norm(dim=1).mean(),
    ])  # fmt: skip
    expected.sum().backward()
    assert torch.allclose(terms, expected.detach(), rtol=1e-4)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_a_seed_decides_every_bit():
    graph = trained("residual")
    first = make(graph, seed=5, iterations=3).images
    assert torch.equal(make(graph, seed=5, iterations=3).images, first)
    assert not torch.equal(make(graph, seed=6, iterations=3).images, first)


def test_labels_are_drawn_balanced_where_none_are_given():
    labels = make(trained("residual"), supplies=Supplies(), iterations=1).labels
    assert labels.bincount().tolist() == [2] * 10


def test_normalization_is_undone():
    """A net with another normalization built in sees the same pixels, and gives the same images."""
    graph = trained("residual")
    other = dataclasses.replace(
        graph, module=Renormalized(graph), image=ImageSpec((3, 16, 16), (0.0,) * 3, (1 / 255,) * 3)
    )
    other = models.trace_module(other.module, other.image)
    first, second = (make(g, iterations=3) for g in (graph, other))
    pixels = [pixel_map(g.image, CPU).to_z(c.images) for g, c in ((graph, first), (other, second))]
    assert torch.allclose(*pixels, atol=1e-3)


class Renormalized(torch.nn.Module):
    """Takes 0..255 and normalizes by hand for the graph in it."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.inner = graph.module
        self.image = graph.image

    def forward(self, x):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.image.mean, self.image.std))
        return self.inner((x / 255 - mean) / std)


def test_clip_keeps_pixels_real():
    graph = trained("residual")
    pixels = pixel_map(graph.image, CPU)
    free, clipped = (pixels.to_z(make(graph, clip=clip, lr=1.0).images) for clip in (False, True))
    assert ((free < Z_LOW) | (free > Z_HIGH)).any()
    assert clipped.min() > Z_LOW - 1e-4
    assert clipped.max() < Z_HIGH + 1e-4


def test_progress_counts_both_phases():
    seen = []
    make(trained("residual"), iterations=5, low_res=0.5, progress=lambda *r: seen.append(r[:2]))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5), (5, 5)]


def test_less_time_is_fewer_iterations_in_both_phases(monkeypatch):
    # A clock that only the optimization moves: 1 s per iteration at half resolution, 4 at full.
    clock = {"now": 0.0}
    plain = _objective.Objective.backward

    def backward(self, leaf, pool):
        clock["now"] += 4 / pool**2
        return plain(self, leaf, pool)

    monkeypatch.setattr(_objective.Objective, "backward", backward)
    steps = _inversion.Steps
    monkeypatch.setattr(
        _inversion, "Steps", lambda n, s: steps(n, s, clock=lambda: clock["now"])
    )  # fmt: skip
    monkeypatch.setattr(_inversion.time, "monotonic", lambda: clock["now"])
    graph, labels = trained("residual"), LABELS
    calib = make(
        graph, iterations=300, low_res=2 / 3, supplies=Supplies(labels=labels, seconds=90.0)
    )
    assert calib.info["shortened"] is True
    # Planned: 200 s at half and 400 s at full resolution; a third of the time each to one half.
    assert calib.info["low_res_iterations"] == 30
    assert calib.info["iterations"] == 45
    assert clock["now"] <= 90
    assert make(graph, iterations=3).info["shortened"] is False


def test_a_net_with_a_fixed_size_stays_at_full_resolution():
    calib = make(trained("concat"), iterations=3, low_res=0.5)  # its reshape knows height and width
    assert calib.info["low_res_iterations"] == 0
    assert "cannot read images of half the size" in calib.info["note"]


def test_what_none_means_depends_on_the_size():
    none = deepinversion.Options()
    assert resolve(none, (3, 32, 32)) == SMALL
    assert resolve(none, (3, 224, 224)) == resolve(none, (3, 64, 96)) == LARGE
    chosen = resolve(deepinversion.Options(lr=0.3, roll=0.0, flip=False), (3, 224, 224))
    assert chosen == dataclasses.replace(LARGE, lr=0.3, roll=0.0, flip=False)
    calib = make(trained("residual"), iterations=1, roll=None)
    assert calib.info["settings"] == SMALL.to_json() | {
        k: v for k, v in QUICK.items() if k in SMALL.to_json() and k not in ("roll", "iterations")
    } | {"iterations": 1}  # fmt: skip


@pytest.mark.parametrize("name", deepinversion.PRESETS)
def test_presets_are_options(name):
    assert deepinversion.Options(**deepinversion.PRESETS[name]).batch_size >= 1
    assert set(deepinversion.PRESETS) == {"quick", "standard", "max"}


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"lr": 0}, {"roll": 0.6}, {"low_res": 1.0}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        deepinversion.Options(**wrong)


def test_what_cannot_be_inverted_is_refused():
    with pytest.raises(UnsupportedError, match="no batch norm"):
        make(models.trace_tiny("no_norm"))
    headless = torch.nn.Sequential(*models.conv_bn(3, 4))
    with pytest.raises(UnsupportedError, match="not one row of class scores"):
        make(models.trace_module(headless), supplies=Supplies())
