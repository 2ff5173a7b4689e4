"""Runs of the command line on tiny nets: arguments in, exit code and both streams out."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models

ARCHITECTURES = Path(models.__file__)
SIZE = (3, 16, 16)
CLASSES = 10
# Seconds rather than minutes, and enough to give every stage something to do.
QUICK = ("--samples", "8", "--effort", "quick", "--threads", "1")
# Of the default quantizer, whose learning has tests of its own: here it only has to take place.
FEW = ("--quantizer-option", "iterations=10", "--quantizer-option", "tune_iterations=5")


@dataclass(frozen=True)
class Run:
    """What a process left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout; anything else there is a fault."""
        return json.loads(self.out)

    @property
    def user_fault(self) -> str:
        """The message of a fault that the user made; it bears no traceback."""
        assert "Traceback" not in self.err
        assert "internal error" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("dfqc: ")]
        assert lines, self.err
        return "\n".join(lines)


@dataclass(frozen=True)
class Workspace:
    """A folder with models, data, packages and a cache of its own."""

    root: Path

    @property
    def cache(self) -> Path:
        """The cache of every run here."""
        return self.root / "cache"

    def weights(self, name: str = "residual", seed: int = 0) -> tuple[str, ...]:
        """Save a tiny net's weights; returns the arguments that name them."""
        path = self.root / f"{name}-{seed}.pt"
        if not path.exists():
            torch.save(models.build(name, seed).state_dict(), path)
        arch = f"{ARCHITECTURES}:{models.TINY[name].__name__}"
        size = "x".join(map(str, SIZE))
        return (str(path), "--arch", arch, "--input-size", size, "--mean", "0.5,0.4,0.3",
                "--std", "0.2,0.25,0.3")  # fmt: skip

    def images(self, count: int = 24, classes: int = CLASSES, seed: int = 0) -> Path:
        """Write labelled random images."""
        path = self.root / f"images-{count}-{classes}-{seed}.npz"
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 256, (count, *SIZE[1:], 3), dtype=np.uint8)
        np.savez(path, images=pixels, labels=rng.integers(0, classes, count))
        return path

    def command(self, *arguments: object) -> list[str]:
        """Return the command line of a run in a process of its own."""
        words = [str(a) for a in arguments]
        if words[0] in ("build", "plan", "synth"):
            words += ["--cache-dir", str(self.cache)]
        return [sys.executable, "-m", "dfqc.compiler", *words]

    def dfqc(self, *arguments: object) -> Run:
        """Run in a process of its own."""
        done = subprocess.run(
            self.command(*arguments), cwd=self.root, capture_output=True, text=True
        )
        return Run(done.returncode, done.stdout, done.stderr)


def run(capsys: Any, workspace: Workspace, *arguments: object) -> Run:
    """Run in this process, which has torch already; the folder stays where it is."""
    from dfqc.compiler.cli import main

    capsys.readouterr()
    code = main(workspace.command(*arguments)[3:])
    streams = capsys.readouterr()
    return Run(code, streams.out, streams.err)


def build(capsys, workspace, *arguments, net="residual", output="package", code=0):
    """Build in this process and return the manifest that was printed."""
    folder = workspace.root / output
    few = () if "--quantizer" in arguments else FEW
    done = run(
        capsys, workspace, "build", *workspace.weights(net), *QUICK, *few, *arguments,
        "-o", folder, "--json",
    )  # fmt: skip
    assert done.code == code, done.err
    return done.json


def stored_stages(manifest):
    return {stage["name"] for stage in manifest["stages"] if stage["cached"]}


def labelled_by_float(workspace):
    import torch

    import models

    path = workspace.root / "float-labels.npz"
    pixels = np.random.default_rng(5).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.25, 0.3])
    images = ((pixels / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.no_grad():
        labels = models.build("residual")(torch.from_numpy(images)).argmax(1)
    assert len(labels.unique()) > 1
    np.savez(path, images=pixels, labels=labels.numpy())
    return path


SLOW = ("--samples", "12", "--synth-option", "batch_size=2", "--synth-option", "iterations=150",
        "--effort", "quick", "--threads", "1", "--quantizer", "rtn")  # fmt: skip


def asset_flags(assets: Path, name: str) -> tuple[Any, ...]:
    """Return the arguments that name a network of the test assets."""
    home = assets / "models" / name
    info = json.loads((home / "info.json").read_text())
    (code,) = home.glob("*.py")
    size = info["input_size"]
    return (
        home / "weights.pt", "--arch", f"{code}:build", "--input-size", f"3x{size}x{size}",
        "--mean", ",".join(map(str, info["mean"])), "--std", ",".join(map(str, info["std"])),
    )  # fmt: skip
