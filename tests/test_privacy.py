import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import models
from dfqc.compiler import privacy
from dfqc.compiler.contracts import CalibSet, ImageSpec
from dfqc.compiler.dataset import open_dataset
from dfqc.compiler.errors import LoadError
from dfqc.compiler.privacy import compare, compare_to, describe
from dfqc.compiler.stages_calib import as_pixels

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (models.IMAGE.mean, models.IMAGE.std))


@pytest.fixture(scope="module")
def graph():
    return models.trace_tiny("residual")


def photographs(count, seed=0, size=16):
    """Random images with structure, uint8 (n, h, w, 3)."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=rng)
    fine = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (255 * fine).round().byte().permute(0, 2, 3, 1).numpy()


def normalized(images):
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def archive(tmp_path, images):
    path = tmp_path / "supplied.npz"
    np.savez(path, images=images)
    return path


def rms(a, b):
    """Root mean square difference of two uint8 images over 0..1, in float64."""
    return float(np.sqrt(np.mean((a.astype(float) - b.astype(float)) ** 2)) / 255)


def likeness(a, b):
    return min(rms(a, b), rms(a, b[:, ::-1]))


def test_every_distance_is_that_of_all_pairs(graph, tmp_path):
    ours, theirs = photographs(9, seed=1), photographs(70, seed=2)
    report = compare_to(graph, calib(ours), archive(tmp_path, theirs)).report
    nearest = [min(likeness(a, b) for b in theirs) for a in ours]
    own = [
        min(likeness(a, b) for j, b in enumerate(theirs) if j != i) for i, a in enumerate(theirs)
    ]
    for found, expected in (("synthetic", nearest), ("supplied", own)):
        quantiles = np.quantile(expected, [0, 0.01, 0.5])
        np.testing.assert_allclose(list(report["pixels"][found].values()), quantiles, atol=1e-6)
    assert list(report["pixels"]["synthetic"]) == ["min", "p1", "median"]
    order = np.argsort(nearest)[:8]
    assert [pair["image"] for pair in report["closest"]] == order.tolist()
    for pair in report["closest"]:
        every = [likeness(ours[pair["image"]], b) for b in theirs]
        assert pair["position"] == int(np.argmin(every))
        assert pair["distance"] == pytest.approx(min(every), abs=1e-6)
    assert (report["images"], report["supplied"]) == (9, 70)
    assert json.loads(json.dumps(report)) == report


def calib(images):
    return CalibSet(normalized(images), None, "test")


def test_features_are_compared_by_cosine(graph, tmp_path):
    ours, theirs = photographs(4, seed=1), photographs(20, seed=2)
    report = compare_to(graph, calib(ours), archive(tmp_path, theirs)).report
    seen = []
    hook = graph.module.get_submodule("head.fc").register_forward_pre_hook(
        lambda _, x: seen.append(x[0].double())
    )
    with torch.no_grad():
        graph.module(normalized(ours))
        graph.module(normalized(theirs))
    hook.remove()
    cosine = nn.functional.cosine_similarity(seen[0][:, None], seen[1][None], dim=2)
    expected = (1 - cosine).amin(1)
    found = report["features"]["synthetic"]
    assert found["min"] == pytest.approx(float(expected.min()), rel=1e-3)
    assert found["median"] == pytest.approx(float(expected.quantile(0.5)), rel=1e-3)


def test_planted_copies_are_found_and_named(graph, tmp_path):
    ours, theirs = photographs(40, seed=1), photographs(200, seed=2)
    ours[5] = theirs[123]
    ours[6] = theirs[77][:, ::-1]
    noise = np.random.default_rng(0).normal(0, 8, ours[7].shape)
    ours[7] = (0.95 * theirs[31] + noise).clip(0, 255).astype(np.uint8)
    report = compare_to(graph, calib(ours), archive(tmp_path, theirs)).report
    limit = report["pixels"]["supplied"]["p1"]
    near = [i for i, a in enumerate(ours) if min(likeness(a, b) for b in theirs) <= limit]
    assert set(near) >= {5, 6, 7}
    assert report["pixels"]["nearer"] == len(near) < 6
    first, second, third = report["closest"][:3]
    assert {(p["image"], p["position"], p["mirrored"]) for p in (first, second)} == {
        (5, 123, False),
        (6, 77, True),
    }
    # A copy is at distance 0, not at what float32 leaves of it.
    assert max(first["distance"], second["distance"]) < 1e-6
    assert (third["image"], third["position"]) == (7, 31)
    assert third["file"].startswith("image 31 of ")
    text = "\n".join(describe(report))
    assert f"{len(near)} of 40 are as near to a supplied image" in text
    assert "image 123 of" in text
    assert "(mirrored)" in text


def test_images_of_other_origin_are_no_copies(graph, tmp_path):
    ours = np.random.default_rng(1).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    report = compare_to(graph, calib(ours), archive(tmp_path, photographs(200))).report
    assert report["pixels"]["nearer"] == 0
    text = "\n".join(describe(report))
    assert "None is as near" in text
    assert "no proof of privacy" in text


def test_few_of_fresh_images_count(graph, tmp_path):
    """Images of the same source are not copies: about as many are that near as there must be."""
    everything = photographs(1200, seed=3)
    report = compare_to(graph, calib(everything[:400]), archive(tmp_path, everything[400:])).report
    # 1 % of 400, with a spread of about 2 and the scatter of the percentile itself.
    assert report["pixels"]["nearer"] <= 14


def test_a_folder_is_compared_by_the_names_of_its_files(graph, tmp_path):
    pictures = photographs(6)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"cat{i}.png")
    report = compare_to(graph, calib(pictures[4:5]), tmp_path).report
    assert report["closest"][0]["file"] == str(tmp_path / "cat4.png")
    assert report["source"] == str(tmp_path)


def test_the_sheet_shows_the_pairs_side_by_side(graph, tmp_path):
    ours, theirs = photographs(3, seed=1), photographs(30, seed=2)
    done = compare_to(graph, calib(ours), archive(tmp_path, theirs))
    sheet = np.asarray(Image.open(io.BytesIO(done.sheet)))[::6, ::6]  # enlarged 96 // 16 times
    assert sheet.shape == (16, 6 * 17 - 1, 3)
    shown = as_pixels(normalized(ours), models.IMAGE)
    for place, pair in enumerate(done.report["closest"]):
        tiles = (shown[pair["image"]], theirs[pair["position"]])
        for column, tile in enumerate(tiles, start=2 * place):
            np.testing.assert_array_equal(sheet[:, column * 17 : column * 17 + 16], tile)


def test_one_supplied_image_has_nothing_to_judge_by(graph, tmp_path):
    pictures = photographs(3)
    report = compare_to(graph, calib(pictures), archive(tmp_path, pictures[:1])).report
    assert (report["pixels"]["supplied"], report["pixels"]["nearer"]) == (None, None)
    assert report["closest"][0]["image"] == 0
    assert any("nothing to judge by" in line for line in describe(report))


def test_no_images_is_a_fault_of_the_user(graph, tmp_path):
    with pytest.raises(LoadError, match="no images"):
        compare_to(graph, calib(photographs(2)), tmp_path)


def test_a_model_of_one_layer_has_no_features(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))  # weights do not matter
    report = compare_to(
        models.trace_module(net), calib(photographs(2)), archive(tmp_path, photographs(5, seed=1))
    ).report
    assert report["features"] is None
    assert not any("features" in line for line in describe(report))


@pytest.mark.parametrize("net", ["attention", "no_norm", "transposed", "linear_norm"])
def test_every_kind_of_net_gives_features(net, tmp_path):
    supplied = archive(tmp_path, photographs(10, seed=1))
    pictures = photographs(4)
    report = compare_to(models.trace_tiny(net), calib(pictures), supplied).report
    assert 0 <= report["features"]["synthetic"]["min"] <= 2


def test_large_images_are_compared_smaller(tmp_path):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, 8)
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)))

    image = ImageSpec((3, 128, 128), models.IMAGE.mean, models.IMAGE.std)
    theirs, ours = photographs(6, size=128), photographs(1, seed=9, size=128)
    report = compare_to(
        models.trace_module(Wide(), image), calib(ours), archive(tmp_path, theirs)
    ).report

    def shrunk(x):
        return x.astype(float).reshape(64, 2, 64, 2, 3).mean((1, 3))

    expected = min(likeness(shrunk(ours[0]), shrunk(x)) for x in theirs)
    assert report["pixels"]["synthetic"]["min"] == pytest.approx(expected, abs=1e-6)


def test_a_large_set_is_sampled_for_its_own_distances(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "_BASELINE", 10)
    theirs = photographs(100)
    supplied = open_dataset(archive(tmp_path, theirs), graph.image, need_labels=False)
    seen = []
    report = compare(
        graph, normalized(photographs(3, seed=4)), supplied, progress=lambda *r: seen.append(r)
    )
    every = [
        min(likeness(theirs[i], b) for j, b in enumerate(theirs) if j != i)
        for i in range(0, 100, 10)
    ]
    assert report["pixels"]["supplied"]["median"] == pytest.approx(np.median(every), abs=1e-6)
    assert seen[-1][:2] == (100, 100)
