"""Quantizers on a real network: minutes, so `slow`; figures are in benchmarks/results."""

import pytest

from command import asset_flags, run

pytestmark = pytest.mark.slow

NET = "resnet20_cifar10"


def top1(assets, shared, capsys, quantizer):
    """Build W3A3 from 128 synthetic images; return float and engine top-1 on 5,000 real ones."""
    data = assets / "data" / "cifar10" / "cifar10_test.npz"
    done = run(
        capsys, shared, "build", *asset_flags(assets, NET), "--bits", "w3a3", "--effort", "quick",
        "--samples", "128", "--quantizer", quantizer, "--eval-data", data,
        "-o", shared.root / quantizer, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = done.json["metrics"]["top1"]
    assert found["engine"] == pytest.approx(found["simulated"], abs=0.05)
    return found["float"], found["engine"]


def test_each_heavier_quantizer_is_better_on_real_images(assets, shared, capsys):
    found = {name: top1(assets, shared, capsys, name) for name in ("rtn", "gptq", "reconstruct")}
    exact = found["rtn"][0]
    assert exact == pytest.approx(91.6, abs=0.1)
    drops = {name: exact - engine for name, (_, engine) in found.items()}
    assert drops["gptq"] < drops["rtn"]
    assert drops["reconstruct"] < drops["gptq"]
    assert drops["reconstruct"] < 4
