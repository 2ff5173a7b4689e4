import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import models
from classifiers import LABELS, top1, trained
from dfqc.calib import _augment, _objective, mixmix
from dfqc.calib._inversion_options import SMALL
from dfqc.calib._pixels import pixel_map
from dfqc.compiler.contracts import ImageSpec, Supplies
from dfqc.compiler.errors import UnsupportedError, UsageError
from dfqc.compiler.graph import Graph

CPU = torch.device("cpu")
QUICK = mixmix.PRESETS["quick"] | {"iterations": 40}


def make(graph: Graph, *zoo: Graph, seed: int = 0, seconds=None, **options: object):
    return mixmix.synthesize(
        graph, len(LABELS), mixmix.Options(**(QUICK | options)),
        rng=torch.Generator().manual_seed(seed), device=CPU,
        supplies=Supplies(zoo=zoo, labels=LABELS, seconds=seconds),
    )  # fmt: skip


def named(graph: Graph, name: str) -> Graph:
    return dataclasses.replace(graph, source=name)


def objective(nets, *, mix=0.0, learn=False, **settings: object):
    chosen = dataclasses.replace(SMALL, roll=0, **settings)
    return _objective.Objective(
        nets, LABELS, mixmix.Options(), chosen, _objective.Method("test", mix, learn),
        torch.Generator().manual_seed(0),
    )  # fmt: skip


def images(seed: int = 0) -> torch.Tensor:
    return models.images(20, seed=seed)


def test_all_nets_recognize_the_images_and_one_alone_does_not():
    graph, other = trained("residual"), trained("depthwise", 1)
    alone, mixed = make(graph), make(graph, other, iterations=100)
    assert torch.equal(mixed.labels, LABELS)
    assert (mixed.source, mixed.images.shape) == ("mixmix", (20, 3, 16, 16))
    assert min(top1(net, mixed.images, LABELS) for net in (graph, other)) > 0.8
    assert top1(graph, alone.images, LABELS) > 0.8
    assert top1(other, alone.images, LABELS) < 0.6
    assert mixed.info["loss"] < 0.5 * mixed.info["first_loss"]


def test_one_net_alone_says_so():
    calib = make(trained("residual"), iterations=1)
    assert len(calib.info["models"]) == 1
    assert "no other models were given" in calib.info["note"]  # the driver says it, once
    assert "note" not in make(trained("residual"), trained("depthwise"), iterations=1).info


def test_nets_are_drawn_per_batch():
    own = named(trained("residual"), "own")
    nets = [own, *(named(own, name) for name in "abc")]

    def choose(seed, **options):
        chosen = mixmix._choose(
            nets, mixmix.Options(**options), torch.Generator().manual_seed(seed)
        )
        return [net.source for net in chosen]

    for always in (True, False):
        drawn = [choose(seed, models=2, own=always) for seed in range(40)]
        assert all(len(set(names)) == 2 for names in drawn)
        assert {name for names in drawn for name in names} == {"own", "a", "b", "c"}
        with_own = sum("own" in names for names in drawn)
        assert with_own == 40 if always else 10 <= with_own <= 30
    assert choose(0, models=9) == ["own", "a", "b", "c"]
    calib = make(own, *nets[1:], iterations=1, models=2, seed=7)
    assert len(calib.info["models"]) == 2
    assert "own" in calib.info["models"]


def test_losses_are_the_mean_over_nets():
    nets = [trained("residual"), trained("depthwise", 1)]
    found = []
    for chosen in (nets[:1], nets[1:], nets):
        leaf = images().requires_grad_()
        found.append((objective(chosen).backward(leaf, 1), leaf.grad))
    (first, of_first), (second, of_second), (both, of_both) = found
    assert torch.allclose(both, (first + second) / 2, rtol=1e-5)
    assert torch.allclose(of_both, (of_first + of_second) / 2, rtol=1e-3, atol=1e-7)


class Normalized(nn.Module):
    """Normalizes pixels 0..1 by hand for the net in it."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.inner, self.image = graph.module, graph.image

    def forward(self, x):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.image.mean, self.image.std))
        return self.inner((x - mean) / std)


def test_each_net_gets_its_own_normalization():
    graph, other = trained("residual"), trained("depthwise", 1)
    plain = ImageSpec((3, 16, 16), (0.0,) * 3, (1.0,) * 3)
    by_hand = models.trace_module(Normalized(other), plain)
    first, second = (make(graph, net, iterations=4).images for net in (other, by_hand))
    assert torch.allclose(first, second, atol=1e-3)
    wrong = dataclasses.replace(other, image=plain)
    assert not torch.allclose(make(graph, wrong, iterations=4).images, first, atol=0.1)


def test_classes_are_mixed_by_area(monkeypatch):
    """MixMix, eqs. 8 and 9, image by image."""
    graph = trained("residual")
    boxes = torch.tensor([[2, 3, 4, 8]] * 10 + [[0, 0, 16, 16]] * 10)
    order = torch.roll(torch.arange(20), 1)
    monkeypatch.setattr(_augment, "draw_boxes", lambda *_: boxes)
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: order)
    pixels = images()
    terms = objective([graph], mix=1.0, bn_weight=0, tv=0.5).backward(
        pixels.clone().requires_grad_(), 1
    )
    mixed, share = _augment.mix(pixels, order, boxes)
    assert share.tolist() == [32 / 256] * 10 + [1.0] * 10
    with torch.no_grad():
        logits = graph.module(pixel_map(graph.image, CPU).to_normalized(mixed)).double().numpy()
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = np.mean([
        -(1 - b) * logs[i, LABELS[i]] - b * logs[i, LABELS[order[i]]]
        for i, b in enumerate(share.tolist())
    ])  # fmt: skip
    assert terms[0].item() == pytest.approx(expected, rel=1e-4)
    # Priors are those of the images before they are mixed.
    assert terms[2] == objective([graph], tv=0.5).backward(pixels.requires_grad_(), 1)[2]


def test_learned_weights_make_losses_count_alike():
    made = objective([trained("residual")], learn=True)
    losses = torch.tensor([4.0, 20.0, 0.01])
    for _ in range(3000):
        made._learn(losses)
    # The minimum of exp(-a) L + a is at a = log L, where every loss counts 1.
    assert torch.allclose((-made.logs.detach()).exp() * losses, torch.ones(3), atol=0.01)
    off = objective([trained("residual")], learn=True)
    off._learn(torch.tensor([4.0, 20.0, 0.0]))  # the last one is switched off
    assert off.logs.ne(0).tolist() == [True, True, False]
    unlearned = objective([trained("residual")])
    unlearned.backward(images().requires_grad_(), 1)
    assert not unlearned.logs.any()


def test_learned_weights_reach_the_images():
    leaf, plain = (images().requires_grad_() for _ in range(2))
    nets = [trained("residual")]
    weighted = objective(nets, learn=True, tv=0.0)
    weighted.logs.data = -torch.tensor([0.5, 3.0, 1.0]).log()
    terms = weighted.backward(leaf, 1)
    by_hand = objective(nets, tv=0.0)
    by_hand.options = by_hand.options.model_copy(update={"classify": 0.5})
    by_hand.settings = dataclasses.replace(by_hand.settings, bn_weight=3 * SMALL.bn_weight)
    by_hand.backward(plain, 1)
    assert torch.allclose(leaf.grad, plain.grad, rtol=1e-3, atol=1e-6)
    assert torch.equal(terms, objective(nets, tv=0.0).backward(images().requires_grad_(), 1))


@pytest.mark.parametrize("options", [{"learn_weights": True}, {"mix": 1.0}, {"mix": 0.0}], ids=str)
def test_every_option_makes_the_loss_fall(options):
    graph = trained("residual")
    calib = make(graph, trained("depthwise", 1), iterations=60, **options)
    assert calib.info["loss"] < 0.3 * calib.info["first_loss"]
    assert top1(graph, calib.images, LABELS) > 0.25  # of 10 classes


def test_a_seed_decides_every_bit():
    nets = trained("residual"), trained("depthwise", 1)
    first = make(*nets, seed=5, iterations=4, mix=1.0).images
    assert torch.equal(make(*nets, seed=5, iterations=4, mix=1.0).images, first)
    assert not torch.equal(make(*nets, seed=6, iterations=4, mix=1.0).images, first)


def test_no_time_is_few_iterations():
    calib = make(trained("residual"), iterations=1000, seconds=0.0)
    assert 1 <= calib.info["iterations"] <= 3
    assert calib.info["shortened"] is True


def test_nets_that_do_not_fit_are_refused():
    graph = named(trained("residual"), "model.pt")
    seven = nn.Sequential(models.build("plain"), nn.Linear(10, 7))
    with pytest.raises(UsageError, match=r"seven\.pt has 7 outputs and model\.pt has 10"):
        make(graph, named(models.trace_module(seven), "seven.pt"))
    with pytest.raises(UnsupportedError, match=r"bare\.pt has no batch norm"):
        make(graph, named(models.trace_tiny("no_norm"), "bare.pt"))
    large = models.trace_module(models.build("plain"), ImageSpec((3, 20, 20)))
    with pytest.raises(UsageError, match=r"large\.pt reads images of \(3, 20, 20\)"):
        make(graph, named(large, "large.pt"))


@pytest.mark.parametrize("name", mixmix.PRESETS)
def test_presets_are_options(name):
    assert mixmix.Options(**mixmix.PRESETS[name]).models == 3
    assert set(mixmix.PRESETS) == {"quick", "standard", "max"}
