from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

from dfqc.calib import images
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import LoadError
from dfqc.compiler.graph import Graph

IMAGE = ImageSpec((3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
GRAPH = Graph(fx.symbolic_trace(nn.Conv2d(3, 2, 1)), IMAGE, "test")


@pytest.fixture
def archive(tmp_path) -> Path:
    """150 images, each of one value, which is also its label."""
    values = np.arange(150)
    pixels = np.broadcast_to(values[:, None, None, None], (150, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", images=pixels, labels=values)
    np.savez(tmp_path / "unlabeled.npz", images=pixels)
    return tmp_path / "set.npz"


def make(path: Path, count: int, seed: int = 0, **more: object):
    rng = torch.Generator().manual_seed(seed)
    options = images.Options(path=str(path))
    return images.synthesize(GRAPH, count, options, rng=rng, device=torch.device("cpu"), **more)


def test_images_are_normalized_and_keep_their_labels(archive):
    calib = make(archive, 130)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGE.mean, IMAGE.std))
    values = calib.labels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8) / 255
    torch.testing.assert_close(calib.images, (values - mean) / std)
    assert (calib.source, dict(calib.info)) == ("images/set.npz", {"available": 150})


def test_the_subset_is_random_and_without_repetition(archive):
    first = make(archive, 130).labels.tolist()
    assert len(set(first)) == 130
    assert first != sorted(first)  # any part of it is a sample too
    assert make(archive, 130).labels.tolist() == first
    assert set(make(archive, 130, seed=1).labels.tolist()) != set(first)
    assert sorted(make(archive, 150).labels.tolist()) == list(range(150))


def test_labels_are_optional(archive):
    calib = make(archive.with_name("unlabeled.npz"), 5)
    assert calib.labels is None
    assert len(calib.images) == 5


def test_too_few_images_are_refused(archive):
    with pytest.raises(LoadError, match=r"set\.npz: holds 150 images and 151 were asked for"):
        make(archive, 151)


def test_all_images_are_one_batch_for_the_driver():
    assert images.Options(path="x").batch_size > 10**9


def test_progress_counts_images(archive):
    seen = []
    make(archive, 130, progress=lambda done, total, note: seen.append((done, total)))
    assert seen == [(64, 130), (128, 130), (130, 130)]
