"""Every synthesizer on a real network: a minute, so `slow`; figures are in benchmarks/results."""

import json

import pytest

from command import asset_flags, run

pytestmark = pytest.mark.slow

NET, OTHER = "resnet20_cifar10", "resnet8_cifar10"


def member(assets, name, folder):
    """Write a network of the zoo as the recipe that names it."""
    model, *rest = asset_flags(assets, name)
    keys = {"model": str(model)} | {k[2:]: v for k, v in zip(rest[::2], rest[1::2], strict=True)}
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
    return path


@pytest.mark.parametrize("method", ["zeroq", "deepinversion", "mixmix", "genie"])
def test_images_are_as_near_to_the_statistics_as_real_ones(assets, shared, capsys, method):
    zoo = ("--zoo", member(assets, OTHER, shared.root)) if method == "mixmix" else ()
    done = run(
        capsys, shared, "synth", *asset_flags(assets, NET), "--method", method, *zoo,
        "--effort", "quick", "-o", shared.root / f"{method}.safetensors", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    quality = done.json["quality"]
    assert quality["bn_distance"] < 0.22  # 64 real images: 0.147; 1/f noise: 0.48
    assert quality["warnings"] == []
    if method in ("deepinversion", "mixmix"):
        assert quality["agreement"] > 0.9


def test_noise_is_warned_of(assets, shared, capsys):
    done = run(
        capsys, shared, "synth", *asset_flags(assets, NET), "--method", "noise", "--samples", "64",
        "-o", shared.root / "noise.safetensors", "--json",
    )  # fmt: skip
    assert len(done.json["quality"]["warnings"]) >= 2
