"""Run an engine on the GPU: a plan in, outputs, latencies and per-layer times out.

Only calls that TensorRT 10 and 11 share: tensors by name, `execute_async_v3`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfqc.backends import _trt_api
from dfqc.backends._onnx_file import load_model
from dfqc.backends._trt_cuda import Device
from dfqc.backends._trt_engine import build_plan
from dfqc.compiler.artifact import default_root
from dfqc.compiler.errors import EnvironmentFault, LoadError
from dfqc.compiler.finish import EngineOptions
from dfqc.compiler.package import MANIFEST

BATCHES = (1, 8, 32, 256)  # profiles of an engine that is built in memory
_PLAN = ".plan"


def open_runner(model: Path) -> Runner:
    """Open an engine file, or build an engine in memory from an ONNX model."""
    _trt_api.tensorrt()
    _trt_api.require_driver()  # before anything is deserialized: without one that crashes
    try:
        data = model.read_bytes()
    except OSError as error:
        raise LoadError(f"{model}: cannot be read ({error}); expected a model or a plan") from error
    if model.suffix == _PLAN:
        trusted = _is_version_compatible(model)
        return Runner(data, model, model.with_name("model.onnx"), trusted=trusted)
    options = EngineOptions(batches=BATCHES, cache_dir=default_root())
    return Runner(build_plan(data, options), model, model)


def open_half(model: Path, options: EngineOptions | None = None) -> Runner:
    """Build an engine in memory from a float32 ONNX model turned into float16."""
    _trt_api.tensorrt()
    _trt_api.require_driver()
    options = options or EngineOptions(batches=BATCHES, cache_dir=default_root())
    return Runner(build_plan(half_model(model), options), model, model)


def half_model(model: Path) -> bytes:
    """Return a float32 ONNX file in float16."""
    try:
        from dfqc.backends import _qdq_half
    except ImportError as error:
        raise EnvironmentFault(
            f"{model}: the float16 control needs onnx-ir, which cannot be imported here ({error}); "
            "pip install 'dfqc[trt]'"
        ) from error
    return _qdq_half.halved(load_model(model))


@contextlib.contextmanager
def opened(model: Path) -> Iterator[Runner]:
    """Open and close."""
    runner = open_runner(model)
    try:
        yield runner
    finally:
        runner.close()


class Runner:
    """A deserialized engine with one context: float32 images in, the first output back."""

    def __init__(self, plan: bytes, path: Path, model: Path, *, trusted: bool = False) -> None:
        self.path, self.model = path, model
        self._trt = _trt_api.tensorrt()
        self._device = Device()
        self._logger = _trt_api.make_logger(self._trt)
        runtime = self._trt.Runtime(self._logger)
        # A version-compatible plan carries code that runs on the host: allowed only where asked.
        runtime.engine_host_code_allowed = trusted
        self._runtime = runtime
        self._engine: Any = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            self._device.close()
            reason = "; ".join(self._logger.errors[-2:]) or "it gives no reason"
            raise LoadError(
                f"{path}: TensorRT {self._trt.__version__} does not take this plan ({reason}); "
                "plans belong to one version and GPU: run dfqc engine PACKAGE here"
            )
        self._context: Any = self._engine.create_execution_context()
        self._tapped: tuple[tuple[str, ...], Runner] | None = None
        self._profile = -1
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        reads = [n for n in names if self._mode(n) == self._trt.TensorIOMode.INPUT]
        self.input, self.outputs = reads[0], [n for n in names if n not in reads]
        self.profiles = [
            tuple(int(shape[0]) for shape in self._engine.get_tensor_profile_shape(self.input, i))
            for i in range(self._engine.num_optimization_profiles)
        ]

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Run a batch of any size and return the first output; large ones go in pieces."""
        return self._run(images)[self._first()]

    def codes(self, images: np.ndarray, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return inner values, from a second engine that has them as outputs, and `output`."""
        wanted = tuple(dict.fromkeys(names))
        if self._tapped is None or self._tapped[0] != wanted:
            batches = tuple(sorted({high for _, _, high in self.profiles}))
            options = EngineOptions(batches=batches, cache_dir=default_root())
            plan = build_plan(self.model.read_bytes(), options, outputs=wanted)
            self._tapped = wanted, Runner(plan, self.path, self.model)
        values = self._tapped[1]._run(images)
        return {"output": values[self._first()], **{name: values[name] for name in wanted}}

    def latencies(self, batch: int, *, warmup: int = 10, runs: int = 100) -> np.ndarray:
        """Return milliseconds of calls on images that are on the GPU already."""
        shape = tuple(int(d) for d in self._engine.get_tensor_shape(self.input))[1:]
        self._prepare(np.zeros((batch, *shape), np.float32))
        for _ in range(warmup):
            self._execute()
        spent = []
        for _ in range(runs):
            start = time.perf_counter()
            self._execute()
            spent.append(1000 * (time.perf_counter() - start))
        return np.array(spent)

    def layer_times(self, batch: int, *, runs: int = 20) -> dict[str, float]:
        """Return milliseconds per engine layer, the mean of some calls."""
        profiler = _make_profiler(self._trt)
        self._context.profiler = profiler
        shape = tuple(int(d) for d in self._engine.get_tensor_shape(self.input))[1:]
        self._prepare(np.zeros((batch, *shape), np.float32))
        for _ in range(runs):
            self._execute()  # emits the times of its layers: `enqueue_emits_profile` is on
        totals: dict[str, float] = profiler.totals
        return {name: ms / runs for name, ms in totals.items()}

    def inspect(self) -> str:
        """Return the inspector's JSON."""
        text = self._engine.create_engine_inspector().get_engine_information(
            self._trt.LayerInformationFormat.JSON
        )
        return str(text)

    def close(self) -> None:
        """Free contexts before engines, engines before the runtime, buffers last."""
        if self._tapped is not None:
            self._tapped[1].close()
        self._tapped = self._context = self._engine = self._runtime = None
        self._device.close()

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        largest = max(high for _, _, high in self.profiles)
        pieces = [self._call(images[i : i + largest]) for i in range(0, len(images), largest)]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in self.outputs}

    def _call(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self._prepare(np.ascontiguousarray(images, np.float32))
        self._execute()
        return {
            name: self._device.download(name, self._shape(name), self._kind(name))
            for name in self.outputs
        }

    def _prepare(self, images: np.ndarray) -> None:
        """Choose the profile, upload, and give every output a buffer."""
        profile = self._profile_of(len(images))
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, self._device.stream):
                raise EnvironmentFault(f"{self.path}: profile {profile} cannot be used")
            self._device.synchronize()
            self._profile = profile
        if not self._context.set_input_shape(self.input, images.shape):
            raise LoadError(f"{self.path}: got images of shape {images.shape}; the plan has others")
        address = self._device.upload(self.input, images)
        self._context.set_tensor_address(self.input, address)
        missing = self._context.infer_shapes()
        if missing:
            raise LoadError(f"{self.path}: the shapes of {', '.join(missing)} are not known")
        for name in self.outputs:
            size = int(np.prod(self._shape(name))) * np.dtype(self._kind(name)).itemsize
            self._context.set_tensor_address(name, self._device.buffer(name, size))

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._device.stream):
            reason = "; ".join(self._logger.errors[-2:]) or "it gives no reason"
            raise EnvironmentFault(f"{self.path}: the engine cannot be run: {reason}")
        self._device.synchronize()

    def _profile_of(self, batch: int) -> int:
        for index, (low, _, high) in enumerate(self.profiles):
            if low <= batch <= high:
                return index
        spans = ", ".join(f"{low} to {high}" for low, _, high in self.profiles)
        raise LoadError(
            f"{self.path}: got {batch} images, its profiles take {spans}; "
            f"run dfqc engine PACKAGE --batch {batch}"
        )

    def _first(self) -> str:
        return "output" if "output" in self.outputs else self.outputs[0]

    def _mode(self, name: str) -> Any:
        return self._engine.get_tensor_mode(name)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(d) for d in self._context.get_tensor_shape(name))

    def _kind(self, name: str) -> Any:
        trt = self._trt
        kinds = {trt.DataType.FLOAT: np.float32, trt.DataType.HALF: np.float16,
                 trt.DataType.INT8: np.int8, trt.DataType.INT32: np.int32}  # fmt: skip
        return kinds[self._engine.get_tensor_dtype(name)]


def _is_version_compatible(plan: Path) -> bool:
    """Report whether the package around a plan says that it was built to carry host code."""
    path = plan.with_name(MANIFEST)
    if not path.is_file():
        return False
    built = json.loads(path.read_text(encoding="utf-8")).get("build") or {}
    return bool(built.get("version_compatible"))


def _make_profiler(trt: Any) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.totals: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.totals[layer_name] = self.totals.get(layer_name, 0.0) + ms

    return Profiler()
