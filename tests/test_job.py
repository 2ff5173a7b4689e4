import shutil

import pytest
import torch

from command import ARCHITECTURES
from dfqc.compiler.errors import EnvironmentFault, LoadError, UsageError
from dfqc.compiler.job import check_output, make_job, model_name, output_folder
from dfqc.compiler.recipe import make_recipe
from dfqc.compiler.stage_keys import quantize_options


def job(workspace, **flags):
    path, _, arch, *_ = workspace.weights()
    return make_job(make_recipe({"model": path, "arch": arch, **flags}))


def test_the_recipe_digest_is_about_content_and_not_about_places(workspace):
    path = workspace.weights()[0]
    moved = workspace.root / "moved.pt"
    shutil.copyfile(path, moved)
    copied = workspace.root / "copy.npz"
    shutil.copyfile(workspace.images(), copied)
    here = job(workspace, calib_data=str(workspace.images()), samples=4)
    there = job(workspace, model=str(moved), calib_data=str(copied), samples=4, output="/tmp/x",
                cache_dir="/tmp/y")  # fmt: skip
    assert here.recipe_digest() == there.recipe_digest()


@pytest.mark.parametrize(
    "change",
    [{"bits": "w4a4"}, {"seed": 1}, {"samples": 7}, {"layer": ["fc=w8a8"]}, {"resize": 20},
     {"synth_option": ["lr=0.1"]}, {"ends": "same"}, {"bias_correction": "none"},
     {"equalize": "cle"}],
    ids=str,
)  # fmt: skip
def test_what_changes_the_model_changes_the_recipe_digest(workspace, change):
    assert job(workspace).recipe_digest() != job(workspace, **change).recipe_digest()


@pytest.mark.parametrize(
    "change", [{"max_drop": 1.0}, {"min_speedup": 2.0}, {"budget": "1h"}, {"threads": 2}], ids=str
)
def test_gates_and_limits_do_not(workspace, change):
    assert job(workspace).recipe_digest() == job(workspace, **change).recipe_digest()


def test_other_weights_are_another_model(workspace):
    first = job(workspace)
    weights = torch.load(workspace.weights()[0], weights_only=True)
    weights["conv1.weight"][0, 0, 0, 0] += 1
    torch.save(weights, workspace.weights()[0])
    assert job(workspace).model_digest != first.model_digest


def test_missing_data_is_said_before_any_work(workspace):
    with pytest.raises(LoadError, match="none"):
        job(workspace, eval_data=str(workspace.root / "none"))


def test_an_architecture_for_a_zoo_model_is_refused():
    recipe = make_recipe({"model": "timm:resnet18", "arch": f"{ARCHITECTURES}:Plain"})
    with pytest.raises(UsageError, match="names its own"):
        make_job(recipe)


def test_names():
    zoo = make_recipe({"model": "timm:resnet18.a1_in1k", "bits": "w4a8"})
    file = make_recipe({"model": "models/net.v2.pt", "output": "x/y"})
    assert model_name(zoo) == "resnet18.a1_in1k"
    assert str(output_folder(zoo)) == "out/resnet18.a1_in1k-w4a8-ort"
    assert model_name(file) == "net.v2"
    assert str(output_folder(file)) == "x/y"


def test_output_folders(tmp_path):
    check_output(tmp_path / "new" / "deep")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "manifest.json").write_text("{}")
    check_output(tmp_path / "package")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is no package"):
        check_output(tmp_path / "file")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        check_output(tmp_path / "file" / "below")
    assert not list(tmp_path.glob(".*"))  # no probe is left behind


def test_how_biases_are_corrected_is_part_of_the_quantizers_key(workspace):
    found = quantize_options(job(workspace, bias_correction="none"))
    assert found != quantize_options(job(workspace))
