"""ONNX Runtime on CPU: integer kernels for W8A8, and for grids below 8 bits, from one QDQ file.

In: a quantized graph, or a `model.onnx`. Out: the lowered model, an open runner, the kernels that
really run.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.backends._onnx_file import check_images, first_line, load_model, with_outputs
from dfqc.compiler import machine
from dfqc.compiler.errors import EnvironmentFault, LoadError
from dfqc.compiler.spec import TargetSpec

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

    from dfqc.compiler.contracts import Lowered, QuantState
    from dfqc.compiler.graph import Graph

TARGET = TargetSpec(
    name="ort",
    description="ONNX Runtime on CPU (x86-64, arm64): QLinearConv and QGemm integer kernels",
    weight_bits=(2, 3, 4, 5, 6, 7, 8),
    act_bits=(2, 3, 4, 5, 6, 7, 8, 16, 32),
    integer_ops=("Conv2d", "Linear"),
    act_signed=False,
    act_symmetric=False,
    placement="integer",
    clip="integer",
    bias="int32",
    packed_int4=True,
    kernel_note="values below 8 bits run on 8-bit integer kernels, on their own grid",
)

WEIGHT_ONLY_KEY = "dfqc.weight_only"  # metadata of a model whose activations stay in float
MAX_BATCH = 256

CPU = "cpu"
# What `--provider` chooses: each takes the nodes it can, and leaves the others to those behind it.
PROVIDERS = {
    CPU: ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
# Without it TensorRT refuses models with quantizers (microsoft/onnxruntime, issue 13381).
_PROVIDER_OPTIONS = {"TensorrtExecutionProvider": {"trt_int8_enable": "1"}}


def available() -> tuple[bool, str]:
    """Return (True, version) if ONNX Runtime can be imported here, else (False, the reason)."""
    try:
        import onnxruntime
    except ImportError as error:
        return False, f"onnxruntime cannot be imported ({error}); pip install onnxruntime"
    return True, str(onnxruntime.__version__)


def providers() -> tuple[str, ...]:
    """Return the execution providers that the installed ONNX Runtime is built with."""
    return tuple(_runtime().get_available_providers())


def lower(graph: Graph, state: QuantState, *, metadata: Mapping[str, str]) -> Lowered:
    """Return the QDQ model of a folded graph, written the way ONNX Runtime fuses it."""
    from dfqc.backends import _ort_float, _qdq

    finish = _ort_float.speed_up_float
    return _qdq.lower(graph, state, TARGET, metadata=metadata, finish=finish)


def lower_float(graph: Graph) -> bytes:
    """Return the unquantized model: the control that every benchmark runs beside."""
    from dfqc.backends import _qdq

    return _qdq.lower_float(graph, TARGET)


def open_runner(
    model: Path,
    *,
    threads: int | None = None,
    max_batch: int = MAX_BATCH,
    as_written: bool = False,
    provider: str = CPU,
) -> Runner:
    """Open `model.onnx`. `threads` None: one per core that this process may use.

    With `as_written` node by node, without rewriting the graph: slow, and what the file says. (In
    float16 files the rewriting rounds biases with a float16 product of scales, which underflows.)
    Batches above `max_batch` are run in pieces, which bounds memory. A file that is no model
    raises `LoadError`, a missing runtime or `provider` (of `PROVIDERS`) `EnvironmentFault`; no
    other provider takes its place, but single nodes that it does not have run on those behind it.
    """
    return Runner(model, threads or machine.cpu_count(), max_batch, as_written, provider)


def open_half(model: Path, *, threads: int | None = None) -> None:
    """Return None: ONNX Runtime computes convolutions in float32 on a CPU, or in integers."""


def executed(model: Path, layers: Mapping[str, str]) -> dict[str, str]:
    """Return, per module path, the kernel that the optimized graph has for that layer here."""
    import onnx

    from dfqc.backends import _ort_census

    return _ort_census.kernels(onnx.load(model), optimized(model), layers)


def census(model: Path) -> Counter[str]:
    """Count the operators of the optimized graph, the one that is executed on this machine."""
    from dfqc.backends import _ort_census

    return _ort_census.census(optimized(model))


def optimized(model: Path) -> ModelProto:
    """Return the graph as ONNX Runtime rewrites it on this machine before running it."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="dfqc-") as folder:
        path = Path(folder) / "optimized.onnx"
        _session(model, 1, _weight_only(model), optimized_path=path)
        return onnx.load(path)


class Runner:
    """An open session: float32 (n, c, h, w) in normalized space in, the first output back."""

    def __init__(
        self,
        model: Path,
        threads: int,
        max_batch: int,
        as_written: bool = False,
        provider: str = CPU,
    ) -> None:
        self.model = model
        self.threads = threads
        self.max_batch = max_batch
        self.as_written = as_written
        self.provider = provider
        self._weight_only = _weight_only(model)
        self._session: Any = self._open(model)
        self._tapped: tuple[tuple[str, ...], Any] | None = None

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Run a batch of any size and return the first output, batch first."""
        return self._run(self._session, None, images)[0]

    def codes(self, images: np.ndarray, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return the named inner values, and the model's output as `output`.

        The values become outputs of a second session, opened on first use. Integer codes do not
        disturb the fusion: the same kernels run.
        """
        wanted = tuple(dict.fromkeys(names))
        if self._tapped is None or self._tapped[0] != wanted:
            self._tapped = wanted, self._open(with_outputs(self.model, wanted))
        output = self._session.get_outputs()[0].name
        values = self._run(self._tapped[1], [output, *wanted], images)
        return dict(zip(("output", *wanted), values, strict=True))

    def close(self) -> None:
        """Free the sessions and their threads."""
        self._session = self._tapped = None

    def _open(self, model: Path | bytes) -> Any:
        return _session(
            *(model, self.threads, self._weight_only),
            as_written=self.as_written,
            provider=self.provider,
        )

    def _run(self, session: Any, names: list[str] | None, images: np.ndarray) -> list[np.ndarray]:
        import numpy as np

        entry = session.get_inputs()[0]
        check_images(images, entry.shape, self.model)
        # Pixels, where the preprocessing is in the graph.
        kind = np.uint8 if entry.type == "tensor(uint8)" else np.float32
        images = np.ascontiguousarray(images, dtype=kind)
        try:
            pieces = [
                session.run(names, {entry.name: images[start : start + self.max_batch]})
                for start in range(0, len(images), self.max_batch)
            ]
        except Exception as error:  # the runtime's faults have no common base
            if self.provider == CPU:
                raise
            raise _provider_fault(self.model, self.provider, first_line(error)) from error
        if len(pieces) == 1:
            return list(pieces[0])
        return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]


def _session(
    model: Path | bytes,
    threads: int,
    weight_only: bool,
    *,
    optimized_path: Path | None = None,
    as_written: bool = False,
    provider: str = CPU,
) -> Any:
    ort = _runtime()
    chain = _chain(provider)
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    level = levels.ORT_DISABLE_ALL if as_written else levels.ORT_ENABLE_ALL
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised, and told once
    # Threads that spin on between two calls would steal cores from the engine timed beside this
    # one, and from the neighbors on a shared machine.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Weight-only linear layers compute in float32, as simulated; the default rounds their
    # activations to 8 bits unasked.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if weight_only:
        # Without it the weights are dequantized in every call instead of once, at load.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    source = model if isinstance(model, bytes) else str(model)
    place = "the model" if isinstance(model, bytes) else model
    try:
        # Of itself the runtime would go on with the CPU where the provider fails.
        session = ort.InferenceSession(source, options, providers=chain, enable_fallback=0)
    except Exception as error:  # the runtime has one class per kind of fault, without a base
        if provider != CPU:
            raise _provider_fault(place, provider, first_line(error)) from error
        raise LoadError(
            f"{place}: ONNX Runtime {ort.__version__} cannot load it: {first_line(error)}; "
            f"expected an ONNX model of opset {TARGET.opset} such as `dfqc build` writes"
        ) from error
    # A provider whose libraries are missing is left out of the session without a word.
    if session.get_providers()[0] != PROVIDERS[provider][0]:
        got = ", ".join(session.get_providers())
        raise _provider_fault(place, provider, f"it did not start, the session has {got}")
    return session


def _chain(provider: str) -> list[tuple[str, dict[str, str]]]:
    """Return the asked execution provider and those behind it, with their options."""
    found = providers()
    if PROVIDERS[provider][0] not in found:
        raise EnvironmentFault(
            f"--provider {provider}: ONNX Runtime {_runtime().__version__} has no "
            f"{PROVIDERS[provider][0]} here, only {', '.join(found)}; "
            "pip install onnxruntime-gpu instead of onnxruntime"
        )
    names = [name for name in PROVIDERS[provider] if name in found]
    return [(name, _PROVIDER_OPTIONS.get(name, {})) for name in names]


def _provider_fault(place: Path | str, provider: str, reason: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"{place}: cannot be run on --provider {provider}: {reason}; expected a GPU, its driver "
        "and the CUDA, cuDNN (and TensorRT) libraries that this onnxruntime-gpu is built for; "
        "`--provider cpu` runs without"
    )


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentFault(
            f"target 'ort' needs onnxruntime, which cannot be imported here ({error}); "
            "pip install onnxruntime"
        ) from error
    return onnxruntime


def _weight_only(model: Path) -> bool:
    properties = {p.key: p.value for p in load_model(model).metadata_props}
    return properties.get(WEIGHT_ONLY_KEY) == "true"
