"""A package that `dfqc build` wrote, taken to a device: nothing of the compile extra there."""

import json
import os
import subprocess
import sys

import pytest

from command import FEW, QUICK, Workspace, run
from test_without_torch import BLOCKER


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("built"))


@pytest.fixture
def package(workspace, capsys):
    folder = workspace.root / "package"
    done = run(
        capsys, workspace, "build", *workspace.weights("residual"), *QUICK, *FEW, "--bits", "w4a4",
        "-o", folder, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder


def test_it_is_verified_evaluated_timed_and_shown_without_torch(workspace, package, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    results = {}
    for verb, *extra in (
        ("verify",),
        ("eval", "--data", workspace.images()),
        ("bench", "--threads", "1"),
        ("inspect",),
    ):
        command = [sys.executable, "-m", "dfqc.compiler", verb, package, *extra, "--json"]
        done = subprocess.run(
            [*map(str, command)], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        results[verb] = json.loads(done.stdout)
    assert results["verify"]["failures"] == []
    assert results["verify"]["parity"]["argmax_agreement"] == 100
    assert results["eval"]["top1"]["engine"]["images"] == 24
