import subprocess
import sys

import pytest

from dfqc.compiler import _identity
from model_files import FACTORY


def test_digest_follows_bytes_and_not_names(tmp_path, factory):
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    a.write_bytes(b"same")
    b.write_bytes(b"same")
    arch = f"{factory}:build"
    digest = _identity.model_digest(str(a), arch, True, 0)
    assert digest == _identity.model_digest(str(b), arch, True, 5)
    assert digest != _identity.model_digest(str(a), f"{factory}:broken", True, 0)
    factory.write_text(FACTORY + "\n# changed\n")
    assert digest != _identity.model_digest(str(a), arch, True, 0)


def test_digest_of_a_zoo_name_counts_the_seed_only_without_pretrained_weights():
    def digest(pretrained, seed):
        return _identity.model_digest("timm:resnet18", None, pretrained, seed)

    assert digest(True, 0) == digest(True, 1) != digest(False, 0) != digest(False, 1)


def test_identity_needs_no_torch():
    code = "import sys, dfqc.compiler._identity; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def split_factory_folder(tmp_path):
    """A factory whose layers lie in a module and in a package beside it."""
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "__init__.py").write_text("from .inner import width\n")
    (tmp_path / "blocks" / "inner.py").write_text("width = 4\n")
    (tmp_path / "near.py").write_text("import blocks\n")
    (tmp_path / "other.py").write_text("")
    (tmp_path / "net.py").write_text("def build():\n    from near import blocks\n")
    (tmp_path / "weights.pt").write_bytes(b"weights")
    return tmp_path


def factory_digest(folder):
    arch = f"{folder / 'net.py'}:build"
    return _identity.model_digest(str(folder / "weights.pt"), arch, True, 0)


@pytest.mark.parametrize("name", ["near.py", "blocks/__init__.py", "blocks/inner.py", "net.py"])
def test_a_change_of_what_a_factory_imports_is_another_model(split_factory_folder, name):
    before = factory_digest(split_factory_folder)
    assert factory_digest(split_factory_folder) == before
    path = split_factory_folder / name
    path.write_text(path.read_text() + "\nwidth = 5\n")
    assert factory_digest(split_factory_folder) != before


def test_what_a_factory_does_not_import_is_no_part_of_the_model(split_factory_folder):
    before = factory_digest(split_factory_folder)
    (split_factory_folder / "other.py").write_text("width = 5\n")
    assert factory_digest(split_factory_folder) == before


@pytest.mark.parametrize("package", ["torch", "torchvision", "timm"])
def test_versions_of_what_a_factory_imports_count(split_factory_folder, monkeypatch, package):
    (split_factory_folder / "near.py").write_text(f"import {package}.nn\n")
    before = factory_digest(split_factory_folder)
    version = _identity.importlib.metadata.version
    monkeypatch.setattr(
        _identity.importlib.metadata,
        "version",
        lambda name: "99" if name == package else version(name),
    )
    assert factory_digest(split_factory_folder) != before
