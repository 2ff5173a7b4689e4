import numpy as np
import pytest
import torch
import torch.nn.functional as F

from classifiers import trained
from dfqc.calib import _dafl, dafl
from dfqc.calib._dafl import Generator
from dfqc.compiler.calib_quality import bn_distance
from dfqc.compiler.contracts import Supplies
from dfqc.compiler.errors import UnsupportedError
from models import IMAGE, trace_tiny

CPU = torch.device("cpu")
SMALL = {"channels": 8, "lr": 0.01, "train_batch": 16, "iterations": 8, "batch_size": 16}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def source(graph=None, zoo=(), seed=0, **options):
    settings = dafl.Options(**(SMALL | options))
    return dafl.open_source(
        graph or trained("residual"), zoo, settings, rng=seeded(seed), device=CPU
    )


@pytest.mark.parametrize("size", [(3, 32, 32), (1, 28, 28), (3, 9, 14)], ids=str)
def test_the_generator_is_the_published_trunk(size):
    """The layers as the paper's code has them, with magnified maps, in float64."""
    net = Generator(size, seeded(), channels=6).double()
    z = torch.randn(5, _dafl.LATENT, generator=seeded(1), dtype=torch.float64)

    def norm(x, layer):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (var + layer.eps).sqrt()
        if layer.weight is None:
            return x
        return x * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

    def conv(x, layer):
        return F.conv2d(x, layer.weight, layer.bias, padding=1)

    grid = [-(-side // 4) for side in size[1:]]
    # Our linear layer gives channels last; torch's view of it would give them first.
    x = norm(net.linear(z).view(5, *grid, 6).permute(0, 3, 1, 2), net.norm0)
    x = F.leaky_relu(norm(conv(F.interpolate(x, scale_factor=2), net.conv1), net.norm1), 0.2)
    x = F.leaky_relu(norm(conv(F.interpolate(x, scale_factor=2), net.conv2), net.norm2), 0.2)
    x = torch.tanh(conv(x, net.conv3))
    top, left = ((have - want) // 2 for have, want in zip(x.shape[2:], size[1:], strict=True))
    expected = norm(x[:, :, top : top + size[1], left : left + size[2]], net.norm3)
    torch.testing.assert_close(net(z), expected)
    assert (net.norm1.eps, net.norm2.eps, net.norm0.eps) == (0.8, 0.8, 1e-5)
    weights = sum(p.numel() for p in (net.linear.weight, net.linear.bias, net.conv1.weight,
                                      net.conv2.weight, net.conv3.weight))  # fmt: skip
    assert weights == _dafl.count_weights(size, 6)


def test_losses_are_the_formulas():
    logits = np.random.default_rng(0).normal(size=(6, 4)) * 3
    powers = np.exp(logits)
    p = powers / powers.sum(1, keepdims=True)
    found = torch.tensor(logits)
    assert float(_dafl.one_hot_loss(found)) == pytest.approx(-np.log(p.max(1)).mean())
    mean = p.mean(0)
    expected = (mean * np.log10(mean)).sum()
    assert float(_dafl.information_loss(found)) == pytest.approx(expected)
    assert float(_dafl.activation_loss(found)) == pytest.approx(-np.abs(logits).mean())


def test_information_is_least_where_classes_are_even():
    even = torch.eye(4) * 50
    assert float(_dafl.information_loss(even)) == pytest.approx(-np.log10(4), rel=1e-5)
    assert float(_dafl.information_loss(even[:1])) == pytest.approx(0, abs=1e-5)


def test_a_loss_is_the_weighted_sum_of_its_terms():
    terms = ("one_hot", "information", "activation", "bn_weight")
    none = dict.fromkeys(terms, 0.0)
    weights = {"one_hot": 0.05, "information": 5.0, "activation": 0.01, "bn_weight": 1.0}

    def loss(**options):
        one = source(**(none | options))
        one.draw(16)
        return one.loss

    parts = [loss(**{name: weight}) for name, weight in weights.items()]
    assert loss(**weights) == pytest.approx(sum(parts), rel=1e-5)
    assert all(abs(part) > 1e-4 for part in parts)


def test_drawing_trains_the_generator():
    graph = trained("residual")
    one = source(graph)
    losses, images = [], []
    for _ in range(30):
        images.append(one.draw(16))
        losses.append(one.loss)
    assert not images[0].requires_grad
    assert np.mean(losses[-5:]) < np.mean(losses[:5])

    def distance(batch):
        return np.mean(list(bn_distance(graph, batch).values()))

    assert distance(images[-1]) < distance(images[0])
    low, high = IMAGE.pixel_range()
    assert images[-1].min() >= low - 1e-5
    assert images[-1].max() <= high + 1e-5


def test_a_restored_source_goes_on_as_it_would_have():
    first = source()
    first.draw(16)
    kept = {k: v.clone() for k, v in first.state().items()}
    place = first.rng.get_state()
    expected = [first.draw(16) for _ in range(3)]
    again = source(seed=9)
    again.restore(kept)
    again.rng.set_state(place)
    assert all(torch.equal(again.draw(16), images) for images in expected)


def test_a_zoo_judges_too():
    alone, judged = source(), source(zoo=[trained("plain")])
    assert len(judged.judges) == 2
    assert not torch.equal(alone.draw(16) * 0 + alone.loss, judged.draw(16) * 0 + judged.loss)


def test_mixed_images_have_both_classes_by_area():
    logits = torch.randn(6, 4, generator=seeded())
    labels, others = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 1, 0, 0, 3, 2])
    share = torch.tensor([0.0, 0.25, 0.5, 1.0, 0.1, 0.9])
    found = dafl._classify(logits, dafl._View(logits, labels, others, share))
    logs = logits.double().log_softmax(1)
    rows = torch.arange(6)
    expected = -((1 - share) * logs[rows, labels] + share * logs[rows, others])
    torch.testing.assert_close(found.double(), expected.double())
    assert source(mix=1.0).draw(16).shape == (16, *IMAGE.size)


def test_a_calibration_set_is_labelled_by_the_model():
    graph = trained("residual")
    options = dafl.Options(**SMALL)
    calib = dafl.synthesize(
        graph, 12, options, rng=seeded(), device=CPU, supplies=Supplies(zoo=[trained("plain")])
    )
    assert calib.images.shape == (12, *IMAGE.size)
    with torch.no_grad():
        assert torch.equal(graph.module(calib.images).argmax(1), calib.labels)
    assert calib.info["iterations"] == 8


def test_a_model_without_batch_norms_is_refused():
    with pytest.raises(UnsupportedError, match="batch norm"):
        source(trace_tiny("no_norm"))


def test_max_is_as_published():
    options = dafl.Options(**dafl.PRESETS["max"])
    assert (options.lr, options.train_batch, options.channels) == (0.02, 1024, 128)
    assert (options.one_hot, options.information, options.activation) == (0.05, 5.0, 0.01)
    assert _dafl.LATENT == 1000
