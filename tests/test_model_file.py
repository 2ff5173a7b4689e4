import io
import zipfile

import pytest
import torch

import models
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import EnvironmentFault, LoadError, UsageError
from dfqc.compiler.frontend import trace
from dfqc.compiler.graph import Graph, batch_norms
from dfqc.compiler.loading import ImageOverrides, load_model
from dfqc.compiler.model_file import save_model


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.pt2"
    save_model(models.trace_tiny("residual"), path)
    return path


def test_what_was_saved_is_read_back_with_its_norms_and_preprocessing(file):
    graph, loaded = models.trace_tiny("residual"), load_model(str(file))
    assert loaded.image == models.IMAGE
    back = trace(loaded)
    x = models.images(5)
    assert torch.equal(back.module(x), graph.module(x))
    assert [n.path for n in batch_norms(back)] == [n.path for n in batch_norms(graph)]


def test_equal_models_are_equal_files(file, tmp_path):
    other = tmp_path / "other.pt2"
    save_model(models.trace_tiny("residual"), other)
    assert other.read_bytes() == file.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt2", "other.pt2"]


@pytest.mark.parametrize("resize", [None, 16, 17, 20, 37])
@pytest.mark.parametrize("assumed", [True, False])
def test_every_preprocessing_comes_back(resize, assumed, tmp_path):
    graph = models.trace_tiny("plain")
    image = ImageSpec(graph.image.size, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), resize, assumed)
    save_model(Graph(graph.module, image, ""), tmp_path / "m.pt2")
    assert load_model(str(tmp_path / "m.pt2")).image == image


def test_flags_win_over_what_the_file_says(file):
    given = ImageOverrides(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), resize=18)
    image = load_model(str(file), image=given).image
    assert (image.mean, image.std, image.resize) == ((0, 0, 0), (1, 1, 1), 18)


def test_an_archive_of_torch_says_nothing_of_images(exported):
    assert load_model(str(exported)).image.assumed


WORDS = '{"mean": ["a"], "std": [1], "resize": null}'


@pytest.mark.parametrize("facts", ["{", "[]", '{"mean": [0]}', WORDS])
def test_damaged_preprocessing_is_refused(facts, file):
    content = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(content, "w") as new:
        for name in old.namelist():
            new.writestr(name, facts if "/extra/" in name else old.read(name))
    file.write_bytes(content.getvalue())
    with pytest.raises(LoadError, match="preprocessing"):
        load_model(str(file))


def test_values_no_model_has_are_refused(tmp_path):
    graph = models.trace_tiny("plain")
    image = ImageSpec(graph.image.size, (0.1, 0.2, 0.3), (0.4, -0.5, 0.6))
    save_model(Graph(graph.module, image, ""), tmp_path / "m.pt2")
    with pytest.raises(UsageError, match="positive"):
        load_model(str(tmp_path / "m.pt2"))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(EnvironmentFault, match="choose another with -o"):
        save_model(models.trace_tiny("plain"), tmp_path / "missing" / "m.pt2")
