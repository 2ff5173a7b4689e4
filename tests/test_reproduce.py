"""The command in the manifest says what the recipe says."""

import shlex

import pytest

from dfqc.compiler.cli import main
from dfqc.compiler.recipe import make_recipe
from dfqc.compiler.reproduce import build_command

CASES = [
    {"model": "net.pt2"},
    {"model": "my nets/net.pt", "arch": "net.py:build", "bits": "w4a4", "seed": 3},
    {"model": "timm:resnet18", "pretrained": False, "effort": "max", "ends": "same"},
    {"model": "net.pt2", "mean": "-0.5,0,0.5", "std": "1,1,1", "input_size": "3x32x32"},
    {"model": "net.pt2", "layer": ["a.*=w8a8", "re:b|c=w4a8"], "avg_bits": 4.0, "samples": 7},
    {"model": "net.pt2", "synth_option": ["iterations=5", "low_pass=true", "lr=0.1"]},
    {"model": "net.pt2", "quantizer_option": ["rounding=soft", "merge=2"], "unsafe_load": True},
    {"model": "net.pt2", "prune": "0.5", "sparsity": "2:4", "prune_layer": ["x=0.1", "y=0.2"]},
    {"model": "net.pt2", "calib_data": "images.npz", "max_drop": 1.5, "bake_preprocessing": True},
    {"model": "net.pt2", "synth": "mixmix", "zoo": "a.pt2,timm:resnet18", "memory": "8g"},
]


@pytest.mark.parametrize("flags", CASES, ids=lambda flags: "-".join(list(flags)[1:]))
def test_the_command_line_reads_it_back_as_the_same_recipe(flags, monkeypatch):
    recipe = make_recipe(flags)
    seen = []
    monkeypatch.setattr(
        "dfqc.compiler.build.run_plan", lambda given, file, listener: seen.append(given) or fault()
    )
    words = shlex.split(build_command(recipe))
    assert words[:3] == ["dfqc", "build", flags["model"]]
    main(["plan", *words[2:]])
    assert make_recipe(seen[0]).saved() == recipe.saved()


def fault():
    raise KeyboardInterrupt


def test_what_is_usual_is_left_out():
    assert build_command(make_recipe(CASES[0])) == "dfqc build net.pt2 --target ort --bits w8a8"
