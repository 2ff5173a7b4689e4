"""What judges is not fitted to; kinds of images count by their ratios; copies stay images."""

import pytest
import torch

import models
from dfqc.compiler import judging


@pytest.mark.parametrize(("count", "judges"), [(3, 0), (4, 1), (7, 1), (64, 16), (256, 64)])
def test_judges_are_about_a_quarter_and_apart(count, judges):
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1)
    learn, judge = judging.split_judges(images)
    assert len(judge) in (judges, judges + 1)
    assert sorted(torch.cat([learn, judge]).flatten().tolist()) == list(range(count))


@pytest.mark.parametrize(("count", "judges"), [(400, 100), (1024, 256), (2000, 286), (4096, 256)])
def test_of_many_images_some_256_judge(count, judges):
    learn, judge = judging.split_judges(torch.zeros(count, 1, 1, 1))
    assert len(judge) == judging.count_judges(count) == judges
    assert len(learn) + len(judge) == count


def test_divergences_count_by_their_ratios():
    assert judging.mean_divergence([4.0, 9.0]) == pytest.approx(6.0)
    assert judging.mean_divergence([1e-3, 1e3, 1.0]) == pytest.approx(1.0)
    assert judging.mean_divergence([0.0, 1.0]) > 0  # one kind without error decides not all


def test_copies_are_mirrored_and_shifted_and_the_originals_stay():
    images = models.images(8, seed=3)
    rng = torch.Generator().manual_seed(0)
    found = judging.augmented(images, 3, rng)
    assert torch.equal(found[:8], images)
    reach = round(judging.SHIFT * images.shape[2])
    shifts = [(a, b) for a in range(-reach, reach + 1) for b in range(-reach, reach + 1)]
    moved = set()
    for index in range(8, 24):
        source = images[index % 8]
        kinds = [
            (flip, shift)
            for flip, base in ((False, source), (True, source.flip(2)))
            for shift in shifts
            if torch.equal(found[index], base.roll(shift, (1, 2)))
        ]
        assert len(kinds) == 1
        moved.add(kinds[0])
    assert {flip for flip, _ in moved} == {False, True}
    assert len({shift for _, shift in moved}) > 4
    assert torch.equal(found, judging.augmented(images, 3, torch.Generator().manual_seed(0)))
    assert torch.equal(judging.augmented(images, 1, rng), images)
