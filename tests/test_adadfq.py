"""AdaDFQ's losses against their formulas, its generator and its player."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from classifiers import trained
from dfqc.calib import _adaptability as adaptability
from dfqc.calib import adadfq
from dfqc.calib._bns import Moments
from dfqc.calib._conditional import LATENT, ConditionalGenerator, count_weights
from dfqc.calib._player import Player, count_classes
from dfqc.compiler.errors import UnsupportedError, UsageError
from dfqc.compiler.options import plugin_options
from dfqc.compiler.quantize._entropy import entropy, student_loss
from dfqc.compiler.quantize._game_options import GameOptions, resolve
from models import trace_module, trace_tiny

CPU = torch.device("cpu")
QUICK = {"iterations": 8, "game_batch": 6, "channels": 8, "batch_size": 8}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(rows: int, classes: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(rows, classes, generator=seeded(seed), dtype=torch.float64)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values)
    return powers / powers.sum(1, keepdims=True)


# --- losses


def test_entropy_is_that_of_the_softmax():
    rows = logits(5, 7, 0)
    shares = softmax(rows.numpy())
    np.testing.assert_allclose(entropy(rows), -(shares * np.log(shares)).sum(1), rtol=1e-12)
    assert entropy(torch.zeros(1, 7)).item() == pytest.approx(math.log(7))
    assert entropy(torch.tensor([[1000.0, 0.0]])).item() == 0  # no 0 * log 0


@pytest.mark.parametrize("count", [2, 5, 16, 33])
def test_entropies_are_normalized_by_the_batch_of_any_size(count):
    rows = logits(count, 10, 1)
    found = adaptability.normalized_entropy(rows).numpy()
    shares = softmax(rows.numpy())
    plain = -(shares * np.log(shares)).sum(1)
    np.testing.assert_allclose(
        found, (plain - plain.min()) / (np.log(10) - plain.min()), rtol=1e-9, atol=1e-12
    )
    assert found.min() == 0
    assert found.max() <= 1


def test_no_disagreement_at_all_is_finite_and_so_is_its_gradient():
    same = torch.zeros(4, 10, requires_grad=True)
    adaptability.normalized_entropy(same).sum().backward()
    assert torch.isfinite(same.grad).all()
    assert adaptability.normalized_entropy(torch.zeros(1, 10)).item() == pytest.approx(0, abs=1)


def test_one_row_is_the_smallest_of_its_batch():
    assert adaptability.normalized_entropy(logits(1, 10, 0)).tolist() == [0]


def test_bounds_are_a_hinge_on_either_side():
    spread = torch.tensor([0.0, 0.05, 0.1, 0.5, 0.8, 0.9, 1.0], dtype=torch.float64)
    expected = (0.1 + 0.05) / 7 + (0.1 + 0.2) / 7
    assert adaptability.bounds_loss(spread, 0.1, 0.8).item() == pytest.approx(expected)
    assert adaptability.in_bounds(spread, 0.1, 0.8).tolist() == [0, 0, 1, 1, 1, 0, 0]


def test_classes_are_asked_of_differences_and_sums():
    teacher, student, labels = logits(6, 4, 2), logits(6, 4, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    rows = np.arange(6)
    for found, mixed in zip(
        adaptability.class_losses(teacher, student, labels),
        ((teacher - student).numpy(), (teacher + student).numpy()),
        strict=True,
    ):
        expected = -np.log(softmax(mixed)[rows, labels.numpy()]).mean()
        assert found.item() == pytest.approx(expected, rel=1e-12)


def test_statistics_are_a_mean_over_channels_and_layers():
    found = [Moments(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])),
             Moments(torch.tensor([0.0]), torch.tensor([5.0]))]  # fmt: skip
    stored = [Moments(torch.tensor([0.0, 0.0]), torch.tensor([2.0, 4.0])),
              Moments(torch.tensor([2.0]), torch.tensor([5.0]))]  # fmt: skip
    expected = (((1 + 9) / 2 + (0 + 4) / 2) + (4 + 0)) / 2
    assert adaptability.bns_loss(found, stored).item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [5.0, 20.0])
def test_the_student_maximizes_the_entropy_of_the_disagreement(temperature):
    teacher, student = logits(5, 10, 4), logits(5, 10, 5)
    shares = softmax((teacher - student).numpy() / temperature)
    expected = (temperature**2) * (shares * np.log(shares)).sum(1).mean()
    assert student_loss(teacher, student, temperature).item() == pytest.approx(expected)
    shifted = student_loss(teacher, teacher + 3.0, temperature).item()
    assert shifted == pytest.approx(-(temperature**2) * math.log(10))  # the least there is
    assert shifted < student_loss(teacher, student, temperature).item()


# --- the generator


@pytest.mark.parametrize("size", [(3, 32, 32), (3, 30, 34), (1, 28, 28), (3, 64, 64), (3, 65, 70)])
def test_images_of_any_size_are_standardized(size):
    net = ConditionalGenerator(size, 5, seeded(), channels=6)
    assert net.form == ("norms" if min(size[1:]) >= 64 else "embedding")
    z = net(torch.randn(4, LATENT, generator=seeded(1)), torch.tensor([0, 4, 2, 2]))
    assert z.shape == (4, *size)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(size[0]), atol=1e-5)
    assert torch.allclose(z.var((0, 2, 3), correction=0), torch.ones(size[0]), atol=0.05)
    # The published trunk has these weights; the count leaves out biases of convolutions and what
    # norms have without classes.
    counted = sum(p.numel() for n, p in net.named_parameters() if p.dim() == 4)
    counted += net.linear.weight.numel() + net.linear.bias.numel()
    if net.form == "embedding":
        counted += net.embedding.numel()
    else:
        counted += sum(p.numel() for n, p in net.named_parameters() if n.startswith("norm"))
    assert counted == count_weights(size, 5, 6)


@pytest.mark.parametrize("form", ["embedding", "norms"])
def test_the_class_changes_the_image(form):
    net = ConditionalGenerator((3, 16, 16), 3, seeded(), channels=6, form=form)
    if form == "norms":  # they begin alike, and learn to differ
        assert all(torch.equal(n.scale, torch.ones_like(n.scale)) for n in (net.norm0, net.norm1))
        with torch.no_grad():
            net.norm1.scale[1] += 1
    latents = torch.randn(4, LATENT, generator=seeded(1))
    first, second = (net(latents, torch.full((4,), label)) for label in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_generator_is_the_published_network():
    """The same by torch's own layers: magnified maps, batch norms in training mode."""
    net = ConditionalGenerator((3, 32, 32), 4, seeded(), channels=8)
    inner = [nn.BatchNorm2d(8), nn.BatchNorm2d(8, 0.8), nn.BatchNorm2d(4, 0.8)]
    latents, labels = torch.randn(5, LATENT, generator=seeded(1)), torch.tensor([0, 1, 2, 3, 0])
    x = (net.embedding[labels] * latents) @ net.linear.weight.T + net.linear.bias
    x = inner[0](x.view(5, 8, 8, 8).permute(0, 3, 1, 2))
    for norm, conv in zip(inner[1:], (net.conv1, net.conv2), strict=True):
        x = nn.functional.interpolate(x, scale_factor=2)
        x = nn.functional.leaky_relu(
            norm(nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)), 0.2
        )
    x = torch.tanh(nn.functional.conv2d(x, net.conv3.weight, net.conv3.bias, padding=1))
    expected = nn.BatchNorm2d(3, affine=False)(x)
    assert torch.allclose(net(latents, labels), expected, atol=1e-4)


# --- the player


def make_player(net: str = "residual", **options: object) -> Player:
    chosen = GameOptions(**({"game_batch": 6, "channels": 8} | options))
    return Player(trained(net), chosen, rng=seeded(), device=CPU)


def test_gradients_of_the_generator_flow_through_both_networks():
    """With one network cut off, the generator would make another step."""
    weight = torch.randn(10, 3 * 16 * 16, generator=seeded(3)) * 0.05

    def weights_after(cut: str) -> torch.Tensor:
        player = make_player()
        if cut == "teacher":
            whole = player.teacher
            player.teacher = lambda images: whole(images.detach())
            player.teacher.stored = whole.stored
        player.step(
            lambda images: (images.detach() if cut == "student" else images).flatten(1) @ weight.T,
            1.0,
        )
        return torch.cat([p.detach().flatten() for p in player.generator.parameters()])

    whole, again, *others = map(weights_after, ("none", "none", "teacher", "student"))
    assert torch.equal(whole, again)
    assert not any(torch.equal(whole, other) for other in others)


def test_the_students_gradients_outlive_the_generators_step():
    player = make_player()
    weight = torch.full((10, 3 * 16 * 16), 0.01, requires_grad=True)
    move = player.step(lambda images: images.flatten(1) @ weight.T, 1.0)
    assert not move.teacher.requires_grad
    (slope,) = torch.autograd.grad(student_loss(move.teacher, move.student, 20.0), weight)
    assert slope.abs().max() > 0
    assert weight.grad is None  # the generator's step leaves no gradients behind


def test_the_loss_is_the_weighted_sum_of_its_terms():
    player = make_player(alpha_ds=0.3, alpha_as=0.7, beta=2.0, gamma=0.5, lambda_l=0.4)
    teacher, student, labels = logits(6, 10, 1), logits(6, 10, 2), torch.arange(6)
    found = [Moments(s.mean + 0.5, s.var) for s in player.teacher.stored]
    terms = player.terms(found, teacher, student, labels)
    assert terms.statistics.item() == pytest.approx(0.25)
    expected = terms.bounds + 2.0 * (0.3 * terms.disagreement + 0.7 * terms.agreement) + 0.5 * 0.25
    assert player.total(terms).item() == pytest.approx(expected.item())


def test_a_restored_player_goes_on_as_it_would_have():
    def student(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :10]

    player = make_player()
    player.step(student, 1.0)
    kept = player.snapshot()
    expected = [player.step(student, 1.0).loss.item() for _ in range(2)]
    other = make_player()
    other.restore(kept)
    assert [other.step(student, 1.0).loss.item() for _ in range(2)] == expected


def test_a_network_without_classes_is_refused():
    class Map(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    with pytest.raises(UnsupportedError, match=r"shape \(1, 4, 14, 14\).*expected logits"):
        count_classes(trace_module(Map()))
    assert count_classes(trace_tiny("plain")) == 10


# --- options


def test_adasg_is_a_case_of_adadfq():
    given = resolve(GameOptions(alpha_ds=0.1, lambda_l=0.3), (3, 32, 32))
    assert resolve(GameOptions(method="adasg"), (3, 32, 32)) == given
    assert resolve(GameOptions(), (3, 32, 32)) != given


@pytest.mark.parametrize(
    ("size", "warm_up", "rate", "temperature", "milestones"),
    [(32, 4 / 400, 1e-4, 20, (0.25, 0.5, 0.75)), (224, 50 / 400, 1e-5, 5, (0.875,))],
)
def test_the_published_constants(size, warm_up, rate, temperature, milestones):
    options = adadfq.Options(**adadfq.PRESETS["max"])
    found = resolve(options, (3, size, size))
    assert options.iterations == 400 * 200
    assert (options.game_batch, options.lr_generator, options.weight_decay) == (16, 1e-3, 1e-4)
    assert (options.alpha_as, options.lambda_u, options.beta, options.gamma) == (0.1, 0.8, 1, 1)
    assert (found.alpha_ds, found.lambda_l) == (0.2, 0.1)
    assert (found.warm_up, found.lr_student) == (warm_up, rate)
    assert (found.temperature, found.milestones) == (temperature, milestones)
    assert found.factor(milestones[0] - 1e-6, 0.1) == 1
    assert found.factor(1.0, 0.1) == pytest.approx(0.1 ** len(milestones))


def test_short_games_warm_up_for_long_enough():
    assert resolve(GameOptions(iterations=2000), (3, 32, 32)).observe == 0.1
    assert resolve(GameOptions(iterations=100), (3, 32, 32)).warm_up == 0.25
    assert resolve(GameOptions(iterations=100, warm_up=0.0), (3, 32, 32)).warm_up == 0


@pytest.mark.parametrize("wrong", [{"bits": "w4a16"}, {"bits": "4"}, {"lambda_u": 1.5}])
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        adadfq.Options(**wrong)


@pytest.mark.parametrize("name", ["lr_latent", "lr_steps"])
def test_options_of_a_reconstructed_student_are_refused(name):
    with pytest.raises(UsageError, match=rf"{name}: read only by --quantizer adadfq"):
        plugin_options(adadfq, "adadfq", "quick", {name: 0.5})
    default = GameOptions.model_fields[name].default
    assert plugin_options(adadfq, "adadfq", "quick", {name: default, "lr_student": 0.5})
