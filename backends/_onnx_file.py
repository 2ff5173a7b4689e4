"""What every engine that reads ONNX files does with them: files and images in, checked ones out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dfqc.compiler.errors import LoadError

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto


def load_model(model: Path) -> ModelProto:
    """Read a model; a file that is missing or no model raises `LoadError`."""
    import onnx

    if not model.is_file():
        raise LoadError(f"{model}: no such file; expected a model.onnx")
    try:
        return onnx.load(model)
    except Exception as error:  # protobuf's DecodeError is not importable by a stable name
        raise LoadError(f"{model}: this is no ONNX model: {first_line(error)}") from error


def with_outputs(model: Path, names: Sequence[str]) -> bytes:
    """Return the model with inner values as further outputs, types left to the runtime."""
    from onnx import helper

    proto = load_model(model)
    known = {name for node in proto.graph.node for name in node.output}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise LoadError(f"{model}: no node computes {', '.join(unknown)}; is it another build's?")
    present = {output.name for output in proto.graph.output}
    for name in names:
        if name not in present:
            proto.graph.output.append(helper.make_empty_tensor_value_info(name))
    return bytes(proto.SerializeToString())


def check_images(images: np.ndarray, expected: Sequence[int | str | None], model: Path) -> None:
    """Raise `LoadError` unless images have the shape (n, c, h, w) that a model's input has."""
    fits = images.ndim == len(expected) and all(
        not isinstance(want, int) or got == want
        for got, want in zip(images.shape, expected, strict=True)
    )
    if not fits or len(images) == 0:
        wanted = "×".join(str(d) if isinstance(d, int) else "n" for d in expected)
        got = "×".join(map(str, images.shape))
        raise LoadError(f"{model}: got images of shape {got}, expected {wanted}")


def first_line(error: Exception) -> str:
    """Return what an error of a runtime says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
