import pytest
import torch

import models
from command import ARCHITECTURES
from dfqc.compiler.errors import LoadError, UsageError
from dfqc.compiler.mixing_zoo import count_outputs, digest_zoo, load_zoo
from dfqc.compiler.recipe import make_recipe


def save(tmp_path, name, seed=0, **options):
    path = tmp_path / f"{name}-{seed}.pt"
    torch.save(models.build(name, seed).state_dict(), path)
    return f"{path}@{ARCHITECTURES}:{models.TINY[name].__name__}"


def recipe(*members, **more):
    flags = {"model": "net.pt", "synth": "mixmix", "zoo": ",".join(map(str, members)), **more}
    return make_recipe(flags)


def test_members_are_traced_with_their_own_weights(tmp_path):
    graph = models.trace_tiny("plain")
    chosen = recipe(save(tmp_path, "residual", 3), save(tmp_path, "depthwise"))
    zoo = load_zoo(chosen, graph)
    assert len(zoo) == 2
    images = models.images(4)
    with torch.no_grad():
        expected = models.build("residual", 3).eval()(images)
        assert torch.allclose(zoo[0].module(images), expected, atol=1e-5)


def test_unknown_normalization_is_the_main_models(tmp_path):
    graph = models.trace_tiny("plain")
    (member,) = load_zoo(recipe(save(tmp_path, "residual")), graph)
    assert member.image == graph.image


def test_a_recipe_says_what_a_file_cannot(tmp_path):
    model, _, arch = save(tmp_path, "residual").partition("@")
    file = tmp_path / "other.yaml"
    file.write_text(f"model: {model}\narch: {arch}\nmean: 0,0,0\nstd: 1,1,1\n")
    (member,) = load_zoo(recipe(file), models.trace_tiny("plain"))
    assert (member.image.mean, member.image.std) == ((0, 0, 0), (1, 1, 1))


def test_another_number_of_classes_is_refused(tmp_path):
    graph = models.trace_tiny("plain")
    other = models.trace_module(torch.nn.Sequential(models.Plain(), torch.nn.Linear(10, 7)))
    assert (count_outputs(graph), count_outputs(other)) == (10, 7)
    with pytest.raises(UsageError, match=r"has 10 outputs and net\.pt has 7"):
        load_zoo(recipe(save(tmp_path, "residual")), other)


def test_digests_are_of_content(tmp_path):
    first = digest_zoo(recipe(save(tmp_path, "residual", 0)))
    assert digest_zoo(recipe(save(tmp_path, "residual", 1))) != first
    (tmp_path / "elsewhere").mkdir()
    assert digest_zoo(recipe(save(tmp_path / "elsewhere", "residual", 0))) == first
    assert digest_zoo(make_recipe({"model": "net.pt"})) == ()


def test_faults_say_what_to_do(tmp_path):
    with pytest.raises(LoadError, match="nowhere"):
        digest_zoo(recipe(tmp_path / "nowhere.pt"))
    with pytest.raises(UsageError, match="separated by commas"):
        digest_zoo(recipe("@timm:resnet18"))
    with pytest.raises(UsageError, match=r"--synth zeroq reads no other models; .*mixmix"):
        recipe("timm:resnet18", synth="zeroq")
