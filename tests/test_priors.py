import math

import numpy as np
import pytest
import torch

from dfqc.calib._priors import l2_norm, total_variation


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_total_variation_against_a_loop():
    images = draw(2, 3, 5, 6)
    pixels, expected = images.numpy(), 0.0
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        squares = 0.0
        for row in range(5 - down):
            for column in range(max(0, -right), 6 - max(0, right)):
                difference = pixels[..., row + down, column + right] - pixels[..., row, column]
                squares += float((difference**2).sum())
        expected += math.sqrt(squares)
    assert total_variation(images).item() == pytest.approx(expected, rel=1e-12)


def test_total_variation_of_a_ramp_and_of_nothing():
    ramp = torch.arange(4.0, dtype=torch.float64).expand(1, 1, 3, 4)
    # Across, 3 rows of 3 ones; down nothing; along either diagonal 2 rows of 3.
    assert total_variation(ramp).item() == pytest.approx(3 + 2 * math.sqrt(6))
    flat = torch.ones(2, 3, 4, 4, requires_grad=True)
    total_variation(flat).backward()
    assert total_variation(flat) == 0
    assert torch.equal(flat.grad, torch.zeros_like(flat))  # where norms have no derivative


def test_l2_norm_is_the_mean_of_the_images_norms():
    images = draw(4, 3, 5, 5)
    expected = np.mean([np.linalg.norm(image.ravel()) for image in images.numpy()])
    assert l2_norm(images).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prior", [total_variation, l2_norm])
def test_gradients(prior):
    assert torch.autograd.gradcheck(prior, draw(2, 2, 4, 3).requires_grad_())
