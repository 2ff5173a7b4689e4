"""What this machine can do: versions and targets in, one line per ability and how to get it out."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqc.compiler import machine, plugins
from dfqc.compiler.energy import find_meter
from dfqc.compiler.providers import HOME

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_RUNTIMES = {
    "ort": "pip install onnxruntime",
    "openvino": "pip install 'dfqc[openvino]'",
    "trt": "an NVIDIA driver, and pip install 'dfqc[trt]'; packages can be built without, and "
    "finished on the machine that has them",
}
_COMPILE = "pip install 'dfqc[compile]'"
_VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")
_BUSY = 0.5  # load per core from which timings are doubtful


@dataclass(frozen=True)
class Ability:
    """One thing that can be wanted of a machine; `get` says how to have it where it is missing."""

    name: str
    available: bool
    detail: str
    get: str = ""


def list_abilities(
    compiling: Mapping[str, str | None], targets: Mapping[str, Mapping[str, Any]]
) -> list[Ability]:
    """Return what can be built, run and measured here."""
    missing = [name for name, version in compiling.items() if version is None]
    detail = f"missing: {', '.join(missing)}" if missing else "from models, without data"
    abilities = [
        Ability("build packages", not missing, detail, _COMPILE if missing else ""),
        _cuda(compiling.get("torch")),
    ]
    for name, target in targets.items():
        usable = bool(target["available"])
        get = "" if usable else _RUNTIMES.get(name, f"see `dfqc targets` for {name}")
        label = f"run and time packages of target {name}"
        abilities.append(Ability(label, usable, str(target["runtime"]), get))
    if targets.get("ort", {}).get("available"):
        abilities.append(_gpu_providers())
    return [*abilities, _integer_speed(), _pictures(), _timings(), _energy()]


def _cuda(torch: str | None) -> Ability:
    name = "synthesize and quantize on a GPU (--device cuda)"
    if torch is None:
        return Ability(name, False, "torch is missing", _COMPILE)
    if not NVIDIA_DRIVER.is_file():
        return Ability(name, False, "no NVIDIA driver; the CPU does it, slower", "an NVIDIA driver")
    if torch.endswith("+cpu"):
        get = "a CUDA build of torch, see pytorch.org"
        return Ability(name, False, f"torch {torch} is a build for CPUs", get)
    return Ability(name, True, f"NVIDIA driver present, torch {torch}; not tried here")


def _gpu_providers() -> Ability:
    """Say what `--provider` can choose: what ONNX Runtime is built with, started or not."""
    ort = plugins.load("target", HOME)
    found = ort.providers()
    name, detail = "ONNX Runtime on a GPU (--provider)", ", ".join(found)
    if any(chain[0] in found for key, chain in ort.PROVIDERS.items() if key != ort.CPU):
        return Ability(name, True, f"ONNX Runtime has {detail}; not tried here")
    get = "an NVIDIA driver, and pip install onnxruntime-gpu instead of onnxruntime"
    return Ability(name, False, f"ONNX Runtime has {detail}", get)


def _integer_speed() -> Ability:
    """Say whether INT8 can be faster than float on this processor."""
    name, flags = "INT8 faster than float on this CPU", machine.integer_flags()
    if platform.machine().lower() in ("aarch64", "arm64"):
        fast = "asimddp" in flags or "i8mm" in flags
        wanted = "dot products (asimddp) or i8mm"
    else:
        fast, wanted = any(flag in flags for flag in _VNNI), "VNNI or AMX"
    if fast:
        return Ability(name, True, f"has {', '.join(flags)}")
    found = ", ".join(flags) or "none of the instructions known here"
    get = f"a processor with {wanted}; the size gain does not depend on it"
    return Ability(name, False, f"has {found}: gains are small, or none", get)


def _pictures() -> Ability:
    name, version = "read image files (--eval-data, --calib-data)", machine.version("pillow")
    if version is None:
        return Ability(name, False, "only .npz arrays of the right size", "pip install pillow")
    return Ability(name, True, f"pillow {version}; .npz needs nothing")


def _timings() -> Ability:
    name, cores = "trustworthy timings", machine.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    said = f"load {load:.1f} on {cores} cores"
    if load <= _BUSY * cores:
        return Ability(name, True, said)
    get = "wait, or compare ratios only (`dfqc bench` interleaves)"
    return Ability(name, False, f"{said}: other work is running", get)


def _energy() -> Ability:
    meter, said = find_meter()
    get = "" if meter else "Linux on bare metal with RAPL, as root"
    return Ability("energy per image in `dfqc bench`", meter is not None, said, get)
