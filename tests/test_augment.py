import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dfqc.calib._augment import draw_boxes, jitter, mix


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape):
    return torch.randn(shape, generator=seeded(), dtype=torch.float64)


def mix_one_by_one(images, order, boxes):
    """Resize and paste by slicing."""
    mixed, shares = images.clone(), []
    for i, (top, left, height, width) in enumerate(boxes.int().tolist()):
        second = images[order[i]].unsqueeze(0)
        small = F.interpolate(second, (height, width), mode="bilinear", align_corners=False)
        mixed[i, :, top : top + height, left : left + width] = small[0]
        shares.append(height * width / images[0, 0].numel())
    return mixed, torch.tensor(shares, dtype=torch.float64)


@pytest.mark.parametrize("size", [(12, 12), (9, 14), (1, 5)])
def test_mixing_is_resizing_and_pasting(size):
    images = draw(40, 3, *size)
    order = torch.randperm(40, generator=seeded())
    boxes = draw_boxes(40, size, seeded(1))
    mixed, share = mix(images, order, boxes)
    expected, shares = mix_one_by_one(images, order, boxes)
    assert torch.allclose(mixed, expected, atol=1e-10)
    assert torch.allclose(share, shares)


def resize_by_formula(image, height, width):
    """Interpolate between the two nearest pixel centers along each axis, in numpy."""

    def matrix(length, extent):
        source = np.clip((np.arange(extent) + 0.5) * length / extent - 0.5, 0, length - 1)
        low = np.floor(source).astype(int)
        weights = np.zeros((extent, length))
        weights[np.arange(extent), low] += 1 - (source - low)
        weights[np.arange(extent), np.minimum(low + 1, length - 1)] += source - low
        return weights

    return matrix(image.shape[1], height) @ image @ matrix(image.shape[2], width).T


def test_the_whole_second_image_is_in_the_box():
    images = draw(2, 3, 8, 10)
    boxes = torch.tensor([[2.0, 3.0, 4.0, 5.0], [0.0, 0.0, 8.0, 10.0]])
    mixed, share = mix(images, torch.tensor([1, 0]), boxes)
    expected = resize_by_formula(images[1].numpy(), 4, 5)
    np.testing.assert_allclose(mixed[0, :, 2:6, 3:8].numpy(), expected, atol=1e-12)
    outside = torch.ones(8, 10, dtype=torch.bool)
    outside[2:6, 3:8] = False
    assert torch.equal(mixed[0][:, outside], images[0][:, outside])
    assert torch.allclose(mixed[1], images[0])  # a full box replaces the image
    assert share.tolist() == [0.25, 1.0]


def test_both_images_get_gradients():
    images = draw(2, 1, 4, 4).requires_grad_()
    order, boxes = torch.tensor([1, 0]), torch.tensor([[0, 0, 2, 2], [1, 1, 2, 3]])
    assert torch.autograd.gradcheck(lambda x: mix(x, order, boxes)[0], images)


def test_boxes_are_uniform_and_inside():
    boxes = draw_boxes(20000, (4, 6), seeded())
    top, left, height, width = boxes.T
    assert torch.equal(boxes, boxes.round())
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 4).all()
    assert (left + width <= 6).all()
    for extent, limit in ((height, 4), (width, 6)):
        counts = torch.bincount(extent.long(), minlength=limit + 1)
        assert counts[0] == 0
        # 5 standard deviations of a binomial count
        assert (counts[1:] / 20000 - 1 / limit).abs().max() < 5 * (0.25 / 20000) ** 0.5
    places = torch.bincount(left[width == 1].long(), minlength=6) / (width == 1).sum()
    assert (places - 1 / 6).abs().max() < 0.05


def test_jitter_rolls_and_mirrors_all_images_alike():
    images, host = draw(2, 3, 8, 16), seeded()
    known = {
        (down, right, flip): images.roll((down, right), (2, 3)).flip([3] if flip else [])
        for down in range(-2, 3) for right in range(-4, 5) for flip in (False, True)
    }  # fmt: skip
    seen = set()
    for _ in range(300):
        moved = jitter(images, 0.25, True, host)
        (match,) = [key for key, image in known.items() if torch.equal(image, moved)]
        seen.add(match)
    assert {key[0] for key in seen} == set(range(-2, 3))  # a quarter of each side, both ways
    assert {key[1] for key in seen} == set(range(-4, 5))
    assert {key[2] for key in seen} == {False, True}


def test_jitter_of_nothing_is_nothing():
    images = draw(2, 3, 8, 8)
    assert torch.equal(jitter(images, 0.0, False, seeded()), images)
