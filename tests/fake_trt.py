"""A TensorRT without NVIDIA's files: classes with the names of a real version, ONNX Runtime inside.

Names and argument counts come from `fixtures/trt_api.json`; anything else is an AttributeError or
a TypeError, as it would be there. Device memory is host memory, so that whole runs give numbers.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.machinery
import json
import sys
import types
from pathlib import Path

from dfqc.backends import _trt_api
from fake_trt_parts import IMPLEMENTATIONS

API = json.loads((Path(__file__).parent / "fixtures" / "trt_api.json").read_text())["versions"]
VERSIONS = tuple(API)
DRIVER = _trt_api.Driver("NVIDIA Fake 4090", "8.9", "12.8")


class World:
    """What a test sets up, and what was called."""

    def __init__(self, version):
        self.version = version
        self.calls = []
        self.parse_errors = []
        self.build_fails = False
        self.stale_cache = False

    def called(self, name):
        return [arguments for called, arguments in self.calls if called == name]


def install(monkeypatch, version):
    """Let `import tensorrt` and cuda-python give fakes, with a driver to talk to."""
    world = World(version)
    modules = {"tensorrt": make_module(world), **cuda_modules()}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_trt_api, "probe", lambda: (DRIVER, ""))
    return world


def make_module(world):
    """Return the module `tensorrt` of a version."""
    api = API[world.version]
    module = types.ModuleType("tensorrt")
    module.__version__ = world.version
    for name, members in api["enums"].items():
        made = enum.IntEnum(name.replace(".", "_"), {m: i for i, m in enumerate(members)})
        if "." not in name:
            setattr(module, name, made)
    for name, implementation in IMPLEMENTATIONS.items():
        allowed = api["classes"][name]
        setattr(module, name, _guard(name, implementation, allowed, world, module))
    severity = {m: i for i, m in enumerate(api["enums"]["ILogger.Severity"])}
    module.ILogger.Severity = enum.IntEnum("Severity", severity)
    return module


def _guard(name, implementation, allowed, world, module):
    """Return a class that has the public names of the real one, and no others."""

    class Guarded(implementation):
        def __init__(self, *arguments):
            world.calls.append((name, arguments))
            self._world, self._trt = world, module
            self._start(*arguments)

        def __getattribute__(self, attribute):
            if attribute.startswith("_"):
                return super().__getattribute__(attribute)
            _check(type(self), attribute, allowed, name)
            value = super().__getattribute__(attribute)
            return _record(world, name, attribute, value, allowed) if callable(value) else value

        def __setattr__(self, attribute, value):
            if not attribute.startswith("_"):
                _check(type(self), attribute, allowed, name)
                world.calls.append((f"{name}.{attribute}", (value,)))
            super().__setattr__(attribute, value)

    Guarded.__name__ = name
    return Guarded


def _check(kind, attribute, allowed, name):
    own = vars(kind) if kind.__name__ != name else {}  # what a subclass of ours adds is ours
    if attribute not in allowed and attribute not in own and attribute not in OURS:
        raise AttributeError(f"tensorrt.{name} has no attribute {attribute!r}")


OURS = ("errors", "totals")  # attributes of dfqc's own subclasses


def _record(world, name, attribute, function, allowed):
    counts = allowed.get(attribute)

    def call(*arguments):
        if isinstance(counts, list) and len(arguments) > max(counts):
            raise TypeError(f"{name}.{attribute} takes {counts} arguments, got {len(arguments)}")
        world.calls.append((f"{name}.{attribute}", arguments))
        return function(*arguments)

    return call


def cuda_modules():
    """Return cuda-python's runtime over host memory."""
    runtime, held = types.ModuleType("cuda.bindings.runtime"), {}

    def allocate(size):
        block = ctypes.create_string_buffer(size)
        held[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def copy(target, source, size, way):
        ctypes.memmove(target, source, size)
        return (0,)

    runtime.cudaMemcpyKind = enum.IntEnum(
        "cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2}
    )
    runtime.cudaStreamCreate = lambda: (0, 7)
    runtime.cudaStreamSynchronize = lambda stream: (0,)
    runtime.cudaStreamDestroy = lambda stream: (0,)
    runtime.cudaMalloc, runtime.cudaMemcpy = allocate, copy
    runtime.cudaFree = lambda address: (0 if held.pop(address, None) else 1,)
    runtime.held = held
    cuda, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    cuda.bindings, bindings.runtime = bindings, runtime
    return {"cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.runtime": runtime}
