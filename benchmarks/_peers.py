"""The peers' files of a float ONNX model, random networks to time, and engines that open both."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import torch

from dfqc.backends import openvino
from dfqc.compiler._vision import import_zoo
from dfqc.compiler.contracts import ImageSpec, Model
from dfqc.compiler.frontend import trace
from dfqc.compiler.graph import Graph
from dfqc.compiler.loading import LoadedModel

IMAGES = 16  # of noise, for everybody's ranges
SIZE = 224


def random_network(name: str) -> Graph:
    """Trace a torchvision network with random weights.

    The statistics of its batch norms are those of noise: without them the values of some of these
    networks die out or grow from layer to layer, and denormal numbers are slow.
    """
    torch.manual_seed(0)
    net = import_zoo("torchvision").models.get_model(name, weights=None)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average
    size = (3, SIZE, SIZE)
    with torch.no_grad():
        net.train()(torch.from_numpy(noise(size)))
    return trace(LoadedModel(net.eval(), ImageSpec(size), name, ""))


def noise(size: tuple[int, ...]) -> np.ndarray:
    """Return normal images (n, c, h, w), the same every time."""
    return np.random.default_rng(0).standard_normal((IMAGES, *size), np.float32)


def quantize_onnxruntime(control: Path, path: Path) -> None:
    """Write what ONNX Runtime's own quantizer makes of a float model: static QDQ, per channel."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = feeds(control)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as scratch:
        ready = Path(scratch) / "ready.onnx"
        quant_pre_process(str(control), str(ready))
        quantization.quantize_static(
            str(ready),
            str(path),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
        )


def quantize_nncf(control: Path, path: Path) -> None:
    """Write what NNCF makes of a float ONNX model, for ONNX Runtime."""
    import nncf

    data = nncf.Dataset(list(feeds(control)))
    onnx.save(nncf.quantize(onnx.load(control), data, subset_size=IMAGES), path)


def quantize_nncf_openvino(control: Path, path: Path) -> None:
    """Write what NNCF makes of a float model in OpenVINO's format: path.xml and path.bin."""
    import nncf
    import openvino as ov

    data = nncf.Dataset(list(feeds(control)))
    quantized = nncf.quantize(ov.convert_model(control), data, subset_size=IMAGES)
    ov.save_model(quantized, path, compress_to_fp16=False)


# Peer and engine -> its file and what makes it. The first one is for both engines.
FILES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "onnxruntime": ("onnxruntime.onnx", quantize_onnxruntime),
    "nncf": ("nncf.onnx", quantize_nncf),
    "nncf, openvino": ("nncf.xml", quantize_nncf_openvino),
}


def file_of(peer: str, engine: str) -> str:
    """Return the name of the file of a peer that an engine runs."""
    return FILES.get(f"{peer}, {engine}", FILES[peer])[0]


def size_of(path: Path) -> int:
    """Return the bytes of a model, its weights included."""
    beside = path.with_suffix(".bin")
    return path.stat().st_size + (beside.stat().st_size if path.suffix == ".xml" else 0)


def feeds(control: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yield images of noise, one at a time, by the name of the model's input."""
    entry = onnx.load(control).graph.input[0]
    shape = [dim.dim_value for dim in entry.type.tensor_type.shape.dim][1:]
    for image in noise(tuple(shape)):
        yield {entry.name: image[None]}


def open_file(engine: ModuleType, path: Path, threads: int) -> Model:
    """Open a file in an engine of dfqc's, in that engine's own format too."""
    if path.suffix == ".xml":
        return _OwnFormat(path, threads)
    runner: Model = engine.open_runner(path, threads=threads)
    return runner


class _OwnFormat:
    """A file in OpenVINO's format, compiled as its users do: with the engine's own snippets."""

    def __init__(self, path: Path, threads: int) -> None:
        import openvino as ov

        self.core = ov.Core()
        self.path = path
        self.options = openvino.options(threads, "f32", snippets=True)
        self.compiled: dict[int, Any] = {}

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Run a batch."""
        if len(images) not in self.compiled:
            model = self.core.read_model(self.path)
            model.reshape(images.shape)
            self.compiled[len(images)] = self.core.compile_model(model, "CPU", self.options)
        results = self.compiled[len(images)](images, share_inputs=True)  # as dfqc's runner calls
        return np.array(results[0])
