"""`dfqc synth`: images alone, by every method, what is said of them and what can be done."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import models
from command import ARCHITECTURES, QUICK, build, run

FEW = ("--synth-option", "iterations=3")


def synth(capsys, shared, *arguments, net="residual", file="images.safetensors"):
    done = run(
        capsys, shared, "synth", *shared.weights(net), *QUICK, *arguments,
        "-o", shared.root / file, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    return done


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_images_that_were_written_calibrate(suffix, shared, capsys):
    file = f"again.{suffix}"
    made = synth(capsys, shared, *FEW, file=file).json
    assert (made["images"], made["asked"]) == (8, 8)
    manifest = build(capsys, shared, "--calib-data", shared.root / file, output=suffix)
    assert manifest["calib"]["images"] == 8
    assert manifest["calib"]["score"] == pytest.approx(made["score"], rel=0.05)


def test_pixels_are_8_bits_and_tensors_are_what_the_model_reads(shared, capsys):
    synth(capsys, shared, *FEW, file="a.npz")
    synth(capsys, shared, *FEW, file="a.safetensors")
    with np.load(shared.root / "a.npz") as content:
        pixels = torch.from_numpy(content["images"])
    images = load_file(shared.root / "a.safetensors")["images"]
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (8, 16, 16, 3))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (models.IMAGE.mean, models.IMAGE.std))
    expected = (255 * (images * std + mean)).permute(0, 2, 3, 1)
    assert (pixels - expected).abs().max() < 0.51


@pytest.mark.parametrize("method", ["zeroq", "deepinversion", "genie", "mixmix", "dafl", "noise"])
def test_every_method(method, shared, capsys):
    options = () if method == "noise" else FEW
    made = synth(capsys, shared, "--method", method, *options, file=f"{method}.safetensors").json
    assert made["images"] == 8
    assert made["method"].startswith(method)
    tensors = load_file(shared.root / f"{method}.safetensors")
    assert tensors["images"].shape == (8, 3, 16, 16)
    if method in ("deepinversion", "mixmix"):
        assert sorted(tensors["labels"].tolist()) == sorted(set(tensors["labels"].tolist()))


def test_a_zoo_is_mixed_and_its_content_is_part_of_the_key(shared, capsys):
    keys = []
    for seed in (1, 2):
        path = shared.root / f"member-{seed}.pt"
        torch.save(models.build("plain", seed).state_dict(), path)
        zoo = f"{path}@{ARCHITECTURES}:{models.TINY['plain'].__name__}"
        made = synth(capsys, shared, "--synth", "mixmix", "--zoo", zoo, *FEW).json
        keys.append(next(s["key"] for s in made["stages"] if s["name"] == "synthesize"))
        assert not made["stages"][-1]["cached"]
    assert keys[0] != keys[1]
    alone = synth(capsys, shared, "--synth", "mixmix", *FEW).json
    assert alone["stages"][-1]["key"] not in keys


def test_a_poor_set_is_said_to_be_one(shared, capsys):
    done = synth(capsys, shared, "--method", "noise", "--samples", "32", file="noise.safetensors")
    assert "warning: calibration images: " in done.err
    assert done.json["quality"]["warnings"]


def test_copies_among_the_images_of_the_user_are_found(shared, capsys):
    synth(capsys, shared, *FEW, file="mine.npz")
    with np.load(shared.root / "mine.npz") as content:
        planted = content["images"][:2]
    rng = np.random.default_rng(0)
    others = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(shared.root / "theirs.npz", images=np.concatenate([others, planted]))
    done = synth(capsys, shared, *FEW, "--compare", shared.root / "theirs.npz", file="mine.npz")
    report = done.json["compare"]
    assert {pair["position"] for pair in report["closest"][:2]} == {40, 41}
    assert {pair["image"] for pair in report["closest"][:2]} == {0, 1}
    assert all(pair["distance"] < 0.01 for pair in report["closest"][:2])
    assert (shared.root / "mine.pairs.png").read_bytes().startswith(b"\x89PNG")


def test_images_to_compare_with_are_looked_for_before_any_are_made(workspace, capsys):
    done = run(capsys, workspace, "synth", *workspace.weights(), *QUICK, "--compare", "nowhere",
               "-o", workspace.root / "a.npz")  # fmt: skip
    assert done.code == 3
    assert "nowhere: no such file or folder" in done.user_fault
    assert "synthesize" not in done.err


def test_a_budget_makes_the_best_of_its_time(workspace, capsys):
    slow = ("--samples", "8", "--synth-option", "batch_size=8", "--effort", "quick",
            "--synth-option", "iterations=100000", "--synth-option", "patience=0")  # fmt: skip
    done = run(
        capsys, workspace, "synth", *workspace.weights(), *slow, "--budget", "20",
        "-o", workspace.root / "best.npz", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "1 of 1 batches with fewer iterations than planned" in done.err
    records = workspace.cache.glob("v1/objects/*/*/artifact.json")
    stored = [json.loads(path.read_text()) for path in records]
    limits = [r["fields"]["seconds"] for r in stored if r["stage"] == "synthesize.part"]
    assert limits == [20]  # runs with another limit, or with none, do not take it
