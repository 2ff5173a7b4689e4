import numpy as np
import pytest
import torch

from dfqc.compiler import _likeness
from dfqc.compiler._likeness import Nearest, find_twins


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_twins_are_found_whatever_their_brightness_and_contrast():
    x = uniform(7, 3, 16, 16)
    x[3] = 0.5 * x[0] + 0.3
    x[5] = (x[1] + 0.05 * (uniform(3, 16, 16, seed=1) - 0.5)).clamp(0, 1)
    found = find_twins(x.flatten(1))
    assert found.images == 2
    assert [pair[:2] for pair in found.pairs] == [(0, 3), (1, 5)]
    assert [pair[2] for pair in found.pairs] == pytest.approx(
        [np.corrcoef(x[i].flatten(), x[j].flatten())[0, 1] for i, j in ((0, 3), (1, 5))], abs=1e-5
    )


@pytest.mark.parametrize("block", [1, 4, 100])
def test_the_closest_pair_is_that_of_all_pairs(block, monkeypatch):
    monkeypatch.setattr(_likeness, "_BLOCK", block)
    x = uniform(11, 40)
    every = np.corrcoef(x.numpy()) - 2 * np.eye(11)
    found = find_twins(x)
    assert found.closest == pytest.approx(every.max(), abs=1e-5)
    assert (found.images, found.pairs) == (0, ())
    assert find_twins(x[:1]).images == 0
    assert find_twins(x.repeat(3, 1)).images == 22


def test_flat_images_are_twins_of_each_other_only():
    x = uniform(4, 48)
    x[1], x[3] = 0.2, 0.9
    assert find_twins(x).pairs == ((1, 3, 1.0),)


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_nearest_rows_are_those_of_all_rows(block, monkeypatch):
    monkeypatch.setattr(_likeness, "_BLOCK", block)
    queries, rows = uniform(15, 6), uniform(50, 6, seed=1)
    search = Nearest(queries)
    nearer = [search.add(rows[start : start + 8], start) for start in range(0, 50, 8)]
    every = torch.cdist(queries.double(), rows.double()) / 6**0.5
    torch.testing.assert_close(search.distance.double(), every.amin(1), rtol=1e-5, atol=1e-7)
    assert torch.equal(search.index, every.argmin(1))
    assert torch.equal(nearer[0], torch.ones(15, dtype=torch.bool))
    best = torch.stack([part.amin(1) for part in every.split(8, dim=1)])
    assert torch.equal(nearer[3], best[3] < best[:3].amin(0))


def test_a_row_is_not_its_own_neighbor():
    rows = uniform(9, 4)
    search = Nearest(rows[[2, 8]])
    for start in range(0, 9, 4):
        search.add(rows[start : start + 4], start, own=torch.tensor([2, 8]))
    every = torch.cdist(rows, rows).fill_diagonal_(torch.inf) / 2
    torch.testing.assert_close(search.distance, every[[2, 8]].amin(1))
