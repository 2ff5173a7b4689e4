import json
import pickle
import zipfile

import pytest
import torch

from dfqc.compiler import _archive
from dfqc.compiler.errors import LoadError
from dfqc.compiler.loading import load_model
from model_files import refuse


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


@pytest.mark.parametrize("arch", [None, "timm:resnet18"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_executed(tmp_path, zipped, arch):
    path, marker = tmp_path / "evil.pt", tmp_path / "executed"
    content = {"state_dict": {"w": torch.ones(2)}, "extra": Attack(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refuse("could run any code", path, arch=arch)
    assert "nothing of it was executed" in message
    assert not marker.exists()
    with pytest.raises(LoadError):  # it does execute when the user vouches for it: a real attack
        load_model(str(path), unsafe_load=True)
    assert marker.exists()


def edit_archive(path, change):
    """Rewrite a .pt2 archive; `change(name, content)` returns the new content."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def test_code_in_the_sample_inputs_of_an_archive_is_not_executed(tmp_path, exported):
    marker = tmp_path / "executed"
    evil = pickle.dumps(((Attack(marker),), {}))
    edit_archive(exported, lambda name, old: evil if "sample_inputs" in name else old)
    refuse("pickle that needs code", exported)
    assert not marker.exists()


def test_code_in_a_pickled_weight_of_an_archive_is_not_executed(tmp_path, exported):
    marker = tmp_path / "executed"

    def change(name, old):
        if name.endswith("weights_config.json"):
            config = json.loads(old)
            for item in config["config"].values():
                item["use_pickle"] = True
            return json.dumps(config)
        return pickle.dumps(Attack(marker)) if name.endswith("/weight_0") else old

    edit_archive(exported, change)
    refuse("pickle that needs code", exported)
    assert not marker.exists()


def test_code_in_a_size_expression_of_an_archive_is_not_executed(tmp_path, exported):
    marker = tmp_path / "executed"

    def poison(value):
        if isinstance(value, dict):
            evil = f"__import__('os').close(__import__('os').open({str(marker)!r}, 65))"
            return {k: evil if k == "expr_str" else poison(v) for k, v in value.items()}
        return [poison(v) for v in value] if isinstance(value, list) else value

    edit_archive(
        exported,
        lambda name, old: json.dumps(poison(json.loads(old))) if "models/" in name else old,
    )
    refuse("holds the expression", exported)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Mul(Integer(49), Symbol('s0', integer=True))", True),
        ("FloorDiv(s0 - 1, 2) + 1", True),
        ("__import__('os')", False),
        ("Symbol('os.system')", False),
        ("().real", False),
        ("exec(s0)", False),
        ("preview(s0)", False),
        ('Symbol("s0")', False),
        (None, False),
    ],
)
def test_size_expressions_are_arithmetic_only(text, plain):
    assert _archive.is_plain_expression(text) is plain
