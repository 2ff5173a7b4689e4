import pytest
import torch

from dfqc.compiler import views


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=32, height=8, width=6):
    return torch.arange(count * 3 * height * width, dtype=torch.float32).view(
        count, 3, height, width
    )


def test_every_image_is_moved_by_its_own_whole_pixels():
    images = pictures()
    moved = views.shift(images, 0.25, rng())
    found = set()
    for image, result in zip(images, moved, strict=True):
        padded = torch.nn.functional.pad(image[None], (2, 2, 2, 2), mode="reflect")[0]
        places = [
            (u, v)
            for u in range(5)
            for v in range(5)
            if torch.equal(padded[:, u : u + 8, v : v + 6], result)
        ]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) > 10


def test_mixup_is_on_the_line_between_two_images():
    images = pictures()
    mixed = views.blend(images, rng())
    values = images[:, 0, 0, 0]
    assert not torch.equal(mixed, images)
    # Images differ by a constant here, and so do mixtures of two of them.
    offsets = mixed - mixed[:, :1, :1, :1]
    torch.testing.assert_close(offsets, (images - images[:, :1, :1, :1]), rtol=0, atol=0.01)
    assert (mixed[:, 0, 0, 0] >= values.min()).all()
    assert (mixed[:, 0, 0, 0] <= values.max()).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_pasted_box_is_of_one_other_image(seed):
    images = pictures()
    mixed = views.paste(images, rng(seed))
    changed = (mixed != images).any(1)
    place = changed.any(0)
    rows, columns = place.any(1).nonzero(), place.any(0).nonzero()
    box = torch.zeros_like(place)
    box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    assert torch.equal(place, box)
    shifts = (mixed - images)[:, 0][:, box]
    assert (shifts == shifts[:, :1]).all()


def test_views_depend_on_the_generator_alone():
    images = pictures()
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(made))
        made.append(views.augment(images, rng(seed), crop=0.25, flip=True, mix=1.0))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_nothing_asked_is_nothing_done():
    images = pictures()
    assert torch.equal(views.augment(images, rng(), crop=0.0, flip=False, mix=0.0), images)
