"""What is set before any test file is imported, and the fixtures that several of them use."""

import functools
import os
from pathlib import Path

# Threads that spin while they wait make tests many times slower wherever something else runs too:
# other tests, the runtimes' own threads. The command line sets the same. Before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import models
from command import Workspace
from model_files import FACTORY


@pytest.fixture(scope="session", autouse=True)
def exporter_table():
    """Make the exporter's table of operators once: anew for each export it is half of the time."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # elsewhere in another version, where it is slow again
        return
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))


@pytest.fixture(autouse=True)
def _seed():
    """Draw the same numbers whatever ran before in this process."""
    torch.manual_seed(0)


@pytest.fixture
def workspace(tmp_path):
    """A folder with a cache of its own."""
    return Workspace(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A workspace whose cache the tests of one file share: each builds what it needs once."""
    return Workspace(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def factory(tmp_path):
    """The file of an architecture."""
    path = tmp_path / "net.py"
    path.write_text(FACTORY)
    return path


@pytest.fixture
def net(factory):
    """A trained-looking instance of the factory's network."""
    scope = {}
    exec(FACTORY, scope)
    module = scope["build"]()
    models.randomize_norms(module)
    return module.eval()


@pytest.fixture
def exported(tmp_path):
    """An archive with a free batch."""
    path = tmp_path / "model.pt2"
    shapes = ({0: torch.export.Dim("n", min=1)},)
    program = torch.export.export(models.build("plain"), (models.images(),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="session")
def assets():
    """The folder of real networks, which is no part of the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("DFQC_ASSETS", default))
    if not (folder / "models").is_dir():
        pytest.skip(f"no real networks at {folder}; set DFQC_ASSETS")
    return folder


@pytest.fixture
def store(tmp_path):
    """Write a network's file and return where it is."""

    def write(net, name="model.onnx"):
        path = tmp_path / name
        path.write_bytes(net if isinstance(net, bytes) else net.data)
        return path

    return write
