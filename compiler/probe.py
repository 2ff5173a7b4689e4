"""What an engine costs to have: a model in, load time and memory of a fresh process out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dfqc.compiler import machine, plugins
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import EnvironmentFault
from dfqc.compiler.providers import opener

_PROBE = "import sys; from dfqc.compiler import probe; print(probe.probe(*sys.argv[1:]))"
_FAULT = f"{EnvironmentFault.__module__}.{EnvironmentFault.__qualname__}: "


@dataclass(frozen=True)
class Entry:
    """One engine of a benchmark."""

    name: str
    target: str
    model: Path
    half: bool = False  # the float model in the half precision that the engine has
    provider: str | None = None  # of `dfqc.backends.ort.PROVIDERS`; None: the target's own


def static_row(entry: Entry, image: ImageSpec, batch: int, threads: int) -> dict[str, Any]:
    """Measure what needs a process of its own."""
    shape = "x".join(map(str, (batch, *image.size)))
    command = [sys.executable, "-c", _PROBE, entry.target, str(entry.model), str(threads), shape]
    command += ["half" if entry.half else "", entry.provider or ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        reason = reason.removeprefix(_FAULT)
        raise EnvironmentFault(f"{entry.model}: cannot be run with {shape} images: {reason}")
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    row = {"name": entry.name, "target": entry.target, "model": str(entry.model)}
    return row | {"model_bytes": entry.model.stat().st_size} | measured


def probe(
    target: str, model: str, threads: str, shape: str, half: str = "", provider: str = ""
) -> str:
    """Open an engine in this (fresh) process and return JSON: load time and memory.

    Arguments are those of a command line: `shape` is `1x3x224x224`, an empty `provider` is the
    target's own. Memory is the process's; that of a GPU is not in it.
    """
    backend = plugins.load("target", target)
    backend.available()  # imports the runtime: its memory is not the model's
    images = np.zeros([int(d) for d in shape.split("x")], np.float32)
    before = machine.current_rss()
    with machine.measured() as usage:
        start = time.perf_counter()
        if half:
            opened = backend.open_half(Path(model), threads=int(threads))
            runner = opened[1]
        else:
            runner = opener(target, provider or None)(Path(model), threads=int(threads))
        load = time.perf_counter() - start
        for _ in range(3):
            runner.infer(images)
    peak = usage.peak_rss_bytes
    row = {"load_ms": 1000 * load, "peak_rss_bytes": peak, "engine_bytes": max(peak - before, 0)}
    return json.dumps(row)
