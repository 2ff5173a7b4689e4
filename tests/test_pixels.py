import math

import pytest
import torch

from dfqc.calib._pixels import Z_HIGH, Z_LOW, ImageOptions, filter_low, finish, pixel_map
from dfqc.compiler.contracts import ImageSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [(32, 32), (30, 45), (7, 9)])
@pytest.mark.parametrize("waves", [(0, 1), (2, 0), (3, 2)])
def test_a_wave_is_damped_by_the_closed_form(size, waves):
    height, width = size
    y, x = torch.arange(height).view(-1, 1), torch.arange(width)
    phase = 2 * math.pi * (waves[0] * y / height + waves[1] * x / width) + 0.3
    wave = torch.cos(phase).expand(2, 3, height, width)
    frequency = math.hypot(waves[0] / height, waves[1] / width)
    expected = math.exp(-(frequency**2) / (2 * 0.2**2)) * wave
    torch.testing.assert_close(filter_low(wave, 0.2), expected, atol=1e-5, rtol=1e-5)


def test_brightness_stays():
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(4, 3, 16, 16, generator=rng)
    filtered = filter_low(z, 0.1)
    torch.testing.assert_close(filtered.mean((2, 3)), z.mean((2, 3)))
    assert filtered.std() < 0.7 * z.std()


def test_finished_images_are_filtered_then_clipped():
    rng = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(4, 3, 16, 16, generator=rng)
    pixels = pixel_map(ImageSpec((3, 16, 16)), CPU)
    plain = pixels.to_z(finish(z, pixels, ImageOptions(clip=False)))
    torch.testing.assert_close(plain, z, atol=1e-4, rtol=1e-4)
    both = pixels.to_z(finish(z, pixels, ImageOptions(low_pass=0.2)))
    expected = filter_low(z, 0.2).clamp(Z_LOW, Z_HIGH)
    torch.testing.assert_close(both, expected, atol=1e-4, rtol=1e-4)
    assert (expected - filter_low(z.clamp(Z_LOW, Z_HIGH), 0.2)).abs().max() > 0.1
