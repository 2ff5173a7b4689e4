import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import fx, nn

from dfqc.calib import noise
from dfqc.calib._pixels import PIXEL_MEAN, PIXEL_STD, pixel_map
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.graph import Graph

CPU = torch.device("cpu")
IMAGENET = ImageSpec((3, 32, 32))
BYTES = ImageSpec((3, 32, 32), (0.0,) * 3, (1 / 255,) * 3)  # inputs are 0..255


def graph_of(image: ImageSpec) -> Graph:
    return Graph(fx.symbolic_trace(nn.Sequential(nn.Conv2d(image.size[0], 2, 1))), image, "test")


def make(image: ImageSpec = IMAGENET, count: int = 64, seed: int = 0, **options: object):
    rng = torch.Generator().manual_seed(seed)
    return noise.synthesize(graph_of(image), count, noise.Options(**options), rng=rng, device=CPU)


def pixels_of(images: torch.Tensor, image: ImageSpec) -> np.ndarray:
    """Return the images as RGB of 0..1, by the definition of normalization."""
    std, mean = (np.reshape(v, (-1, 1, 1)) for v in (image.std, image.mean))
    return images.double().numpy() * std + mean


@pytest.mark.parametrize("image", [IMAGENET, BYTES])
def test_gaussian_noise_has_the_pixel_statistics_for_every_preprocessing(image):
    calib = make(image)
    pixels = pixels_of(calib.images, image)
    assert (calib.images.dtype, calib.images.shape) == (torch.float32, (64, 3, 32, 32))
    assert (calib.labels, calib.source) == (None, "noise/gaussian")
    assert pixels.mean((0, 2, 3)) == pytest.approx(PIXEL_MEAN, abs=0.005)
    assert pixels.std((0, 2, 3)) == pytest.approx(PIXEL_STD, rel=0.02)
    # As in the literature it is not clipped: 2.3 % + 0.7 % of a normal are outside of 0..1.
    assert ((pixels < 0) | (pixels > 1)).mean() == pytest.approx(0.030, abs=0.003)


def test_standardized_pixels_are_about_imagenets_normalized_pixels():
    z = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = pixel_map(IMAGENET, CPU)
    x = pixels.to_normalized(z)
    torch.testing.assert_close(pixels.to_z(x), z, rtol=1e-5, atol=1e-5)
    expected = PIXEL_MEAN + PIXEL_STD * z.double().numpy() - np.reshape(IMAGENET.mean, (3, 1, 1))
    np.testing.assert_allclose(x, expected / np.reshape(IMAGENET.std, (3, 1, 1)), atol=1e-5)
    assert (x - z).abs().max() < 0.3


@pytest.mark.parametrize("image", [IMAGENET, BYTES])
@pytest.mark.parametrize("kind", ["pink", "uniform"])
def test_other_kinds_are_valid_pixels(kind, image):
    pixels = pixels_of(make(image, kind=kind).images, image)
    assert -1e-6 < pixels.min() < 0.01
    assert 0.99 < pixels.max() < 1 + 1e-6


def test_uniform_noise_is_uniform():
    pixels = pixels_of(make(kind="uniform").images, IMAGENET)
    counts, _ = np.histogram(pixels, bins=10, range=(0, 1))
    assert counts / pixels.size == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("size", [(64, 64), (63, 48)])
def test_the_spectrum_of_pink_noise_falls_with_its_exponent(exponent, size):
    white = torch.randn(200, 1, *size, generator=torch.Generator().manual_seed(0))
    texture = noise._filter(white, exponent)[:, 0].double().numpy()
    assert np.abs(texture.mean((1, 2))).max() < 1e-5
    assert texture.var() == pytest.approx(1, rel=0.15)  # few waves carry most of it
    power = (np.abs(np.fft.fft2(texture)) ** 2).mean(0)
    frequency = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1]))
    inside = frequency > 0
    slope = np.polyfit(np.log(frequency[inside]), np.log(power[inside]), 1)[0]
    assert slope == pytest.approx(-2 * exponent, abs=0.03)


def test_pink_noise_varies_as_photographs_do():
    pixels = pixels_of(make(count=500, kind="pink").images, IMAGENET)
    flat = pixels.transpose(1, 0, 2, 3).reshape(3, -1)
    correlation = np.corrcoef(flat)
    assert flat.mean(1) == pytest.approx(PIXEL_MEAN, abs=0.02)
    assert flat.std(1) == pytest.approx(PIXEL_STD, rel=0.1)
    # Neighbors on the spectrum are more alike than red and blue.
    assert 0.6 < correlation[0, 2] < correlation[0, 1] < 0.97
    assert 0.6 < correlation[0, 2] < correlation[1, 2] < 0.97
    assert pixels.mean((1, 2, 3)).std() > 0.05  # brightness
    contrast = np.log(pixels.std((2, 3)))
    assert contrast.std() > 0.15
    neighbors = np.corrcoef(pixels[..., :-1].ravel(), pixels[..., 1:].ravel())[0, 1]
    assert neighbors > 0.8


@pytest.mark.parametrize("kind", ["gaussian", "pink", "uniform"])
@pytest.mark.parametrize("size", [(1, 28, 28), (3, 7, 10), (4, 5, 5), (3, 1, 1)])
def test_all_sizes_work(kind, size):
    image = ImageSpec(size, (0.5,) * size[0], (0.25,) * size[0])
    images = make(image, count=3, kind=kind).images
    assert images.shape == (3, *size)
    assert torch.isfinite(images).all()


@pytest.mark.parametrize("kind", ["gaussian", "pink", "uniform"])
def test_seeds_decide(kind):
    first = make(kind=kind, seed=3).images
    assert torch.equal(make(kind=kind, seed=3).images, first)
    assert not torch.equal(make(kind=kind, seed=4).images, first)


@pytest.mark.parametrize("wrong", [{"kind": "blue"}, {"exponent": -1}, {"batch_size": 0}, {"a": 1}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        noise.Options(**wrong)
