"""OpenVINO on CPU: a quantized graph in, its QDQ model, a runner and the kernels that run out.

Always in float32 where not in integers: left alone, OpenVINO computes float layers in bfloat16
where the processor has it, and neither parity nor a comparison with float would mean anything.

Residual adds: OpenVINO 2026.4 adds within the kernel of the convolution in front, and skips the
rounding of a quantizer between the two. With one there (the placement `integer`), networks with
residual adds were up to 3e-3 away from what their file says; without it (the placement `fused`)
1e-7, and as fast (see `options`). Weights of 4 bits are INT4 in the file, unpacked to int8 once, at
load, and multiplied as integers; a DequantizeLinear of INT4 itself would leave a convolution in
float.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.backends._onnx_file import check_images, load_model, with_outputs
from dfqc.compiler import machine
from dfqc.compiler.errors import EnvironmentFault, LoadError
from dfqc.compiler.spec import TargetSpec

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

    from dfqc.compiler.contracts import Lowered, QuantState
    from dfqc.compiler.graph import Graph

TARGET = TargetSpec(
    name="openvino",
    description="OpenVINO on CPU (x86-64, arm64): int8 convolutions with adds fused into them",
    weight_bits=(2, 3, 4, 5, 6, 7, 8),
    act_bits=(2, 3, 4, 5, 6, 7, 8, 16, 32),
    integer_ops=("Conv2d", "Linear"),
    act_signed=False,
    act_symmetric=False,
    placement="fused",
    clip="float",
    bias="int32",
    packed_int4=True,
    requantize="stepwise",
    kernel_note="values below 8 bits run on 8-bit integer kernels, on their own grid",
    weight_only_note="weight-only: computed in float32",
)

MAX_BATCH = 256
_KEPT = 4  # batch sizes whose compiled models are kept
_DEVICE = "CPU"


def available() -> tuple[bool, str]:
    """Return (True, version) if OpenVINO can be used here, else (False, the reason)."""
    try:
        import openvino
    except ImportError as error:
        return False, f"openvino cannot be imported ({error}); pip install 'dfqc[openvino]'"
    return True, str(openvino.__version__)


def lower(graph: Graph, state: QuantState, *, metadata: Mapping[str, str]) -> Lowered:
    """Return the QDQ model of a folded graph, written the way OpenVINO fuses it."""
    from dfqc.backends import _qdq

    return _qdq.lower(graph, state, TARGET, metadata=metadata)


def lower_float(graph: Graph) -> bytes:
    """Return the unquantized model: the control that every benchmark runs beside."""
    from dfqc.backends import _qdq

    return _qdq.lower_float(graph, TARGET)


def open_runner(
    model: Path, *, threads: int | None = None, max_batch: int = MAX_BATCH, precision: str = "f32"
) -> Runner:
    """Open `model.onnx`. `threads` None: one per core that this process may use.

    Batches above `max_batch` are run in pieces, which bounds memory. `precision` is that of float
    layers; "bf16" is what OpenVINO takes by itself where the processor has it. A file that is no
    model raises `LoadError`, a missing runtime `EnvironmentFault`.
    """
    return Runner(model, threads or machine.cpu_count(), max_batch, precision)


def open_half(model: Path, *, threads: int | None = None) -> tuple[str, Runner] | None:
    """Open the float model in bfloat16 or float16, which OpenVINO takes by itself if it can."""
    able = _core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")
    for name, precision in (("BF16", "bf16"), ("FP16", "f16")):
        if name in able:
            return name.lower(), open_runner(model, threads=threads, precision=precision)
    return None


def executed(model: Path, layers: Mapping[str, str]) -> dict[str, str]:
    """Return, per module path, the kernel and precision that the compiled model has for it here."""
    from dfqc.backends import _ov_census

    return _ov_census.kernels(load_model(model), compiled_nodes(model), layers)


def census(model: Path) -> Counter[str]:
    """Count the kernels of the compiled model, constants aside, by type and primitive."""
    from dfqc.backends import _ov_census

    return _ov_census.census(compiled_nodes(model))


def compiled_nodes(model: Path) -> list[dict[str, str]]:
    """Return the nodes of the model as it is executed on this machine, in order, as plain data."""
    runner = open_runner(model, threads=1)
    try:
        return [
            {"name": op.get_friendly_name()}
            | {key: value.astype(str) for key, value in op.get_rt_info().items()}
            for op in runner.compiled(1).get_runtime_model().get_ordered_ops()
        ]
    finally:
        runner.close()


def options(threads: int, precision: str, *, snippets: bool = False) -> dict[str, Any]:
    """Return the properties that every model is compiled with.

    OpenVINO gathers elementwise operations in kernels of their own ("snippets") before it looks
    what a convolution can compute, and takes the add of an identity skip away from it: a pass
    over memory more (ResNet-50 W8A8, batch 8: 7 % of the time; a CIFAR ResNet-20: 12 %). See
    `wants_snippets`. Codes are the same, but for pixels halfway between two.
    """
    return {
        "SNIPPETS_MODE": "ENABLE" if snippets else "DISABLE",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,  # all threads work on one batch
        "INFERENCE_PRECISION_HINT": precision,
        # Float layers with integer weights would round their activations to 8 bits unasked.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        # Threads that are bound to cores get into the way of the engine timed beside this one.
        "ENABLE_CPU_PINNING": False,
    }


def wants_snippets(model: ModelProto) -> bool:
    """Report whether a model is faster with snippets: if it has attention, or adds no residuals.

    Attention is a snippet, and so is the quantizer of the image (MobileNetV1-0.25, batch 8: 3 %).
    That one puts pixels halfway between two codes elsewhere; grids of images are kept off those.
    """
    graph = model.graph
    fixed = {tensor.name for tensor in graph.initializer}
    sums = False
    for node in graph.node:
        if node.op_type == "Softmax":
            return True
        if all(name in fixed for name in node.input):
            fixed.update(node.output)
        elif node.op_type == "Add" and not fixed.intersection(node.input):
            sums = True
    return not sums


class Runner:
    """An open model: float32 (n, c, h, w) in normalized space in, the first output back.

    Kernels are chosen for one shape: each batch size is compiled on its first use. (Left open, the
    batch cost 15 % on MobileNetV2.)
    """

    def __init__(self, model: Path, threads: int, max_batch: int, precision: str) -> None:
        self.model = model
        self.threads = threads
        self.max_batch = max_batch
        self.precision = precision
        _runtime()
        # Says what is wrong with a file that is no model, too.
        self.snippets = wants_snippets(load_model(model))
        self._compiled: dict[tuple[int, tuple[str, ...]], Any] = {}
        entry = self.compiled(1).input(0)
        # Asked once: in every call the answers would cost more than a small layer.
        self._shape = [None, *(dim.get_length() for dim in list(entry.get_partial_shape())[1:])]
        # Pixels, where the preprocessing is in the graph.
        self._pixels = entry.get_element_type().get_type_name() == "u8"

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Run a batch of any size and return the first output, batch first."""
        return self._run(images, ())[0]

    def codes(self, images: np.ndarray, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return the named inner values, and the model's output as `output`.

        The values become outputs of another compiled model. Codes are written by the kernels that
        run without them too.
        """
        wanted = tuple(dict.fromkeys(names))
        return dict(zip(("output", *wanted), self._run(images, wanted), strict=True))

    def close(self) -> None:
        """Free the compiled models."""
        self._compiled.clear()

    def compiled(self, batch: int, names: tuple[str, ...] = ()) -> Any:
        """Return the model compiled for `batch` images, with the named values as outputs."""
        key = batch, names
        if key not in self._compiled:
            while len(self._compiled) >= _KEPT:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[key] = self._compile(batch, names)
        return self._compiled[key]

    def _compile(self, batch: int, names: tuple[str, ...]) -> Any:
        source = with_outputs(self.model, names) if names else self.model.read_bytes()
        try:
            model = _core().read_model(source)
            shape = model.input(0).get_partial_shape()
            if shape[0].is_dynamic:
                shape[0] = batch
                model.reshape(shape)
            properties = options(self.threads, self.precision, snippets=self.snippets)
            return _core().compile_model(model, _DEVICE, properties)
        except Exception as error:  # the runtime raises RuntimeError for every kind of fault
            raise LoadError(
                f"{self.model}: OpenVINO {_runtime().__version__} cannot load it: {_cause(error)}; "
                f"expected an ONNX model of opset {TARGET.opset} such as `dfqc build` writes"
            ) from error

    def _run(self, images: np.ndarray, names: tuple[str, ...]) -> list[np.ndarray]:
        import numpy as np

        check_images(images, self._shape, self.model)
        images = np.ascontiguousarray(images, dtype=np.uint8 if self._pixels else np.float32)
        parts = []
        for start in range(0, len(images), self.max_batch):
            piece = images[start : start + self.max_batch]
            # By position, and copies come back: by name, a call took 35 µs longer.
            # The images are read where they lie: nobody changes them during the call.
            results = self.compiled(len(piece), names)(piece, share_inputs=True)
            parts.append([results[key] for key in (0, *names)])
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate(values) for values in zip(*parts, strict=True)]


@functools.cache
def _core() -> Any:
    return _runtime().Core()


def _runtime() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise EnvironmentFault(
            f"target 'openvino' needs openvino, which cannot be imported here ({error}); "
            "pip install 'dfqc[openvino]'"
        ) from error
    return openvino


def _cause(error: Exception) -> str:
    """Return the line of an error that says why: OpenVINO begins with where it was noticed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("Exception from ")]
    return (said or lines or [type(error).__name__])[0]
