"""Preprocessing as part of the model: a model of normalized images in, one of uint8 pixels out.

It is a second file beside `model.onnx`, which stays what parity, golden values and accuracy are
measured on: all of them feed normalized float32, also images that no camera could have taken.
What comes out takes RGB pixels as decoders give them, n x h x w x c, already resized and cropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dfqc.compiler.inspection import output_step

if TYPE_CHECKING:
    from dfqc.compiler.contracts import ImageSpec
    from dfqc.compiler.providers import Opener

BAKED = "model.uint8.onnx"
INPUT = "pixels"
KEY = "dfqc.pixels"  # metadata of a model that takes pixels

_PREFIX = "dfqc.preprocessing"
_STEPS = 4  # of the grid in front of the last layer, as for the golden outputs
_FLOAT_TOLERANCE = 1e-4  # of the largest output


def bake_preprocessing(model: onnx.ModelProto, image: ImageSpec) -> onnx.ModelProto:
    """Return a copy whose input is uint8 (n, h, w, c): x / 255, minus mean, over std, to NCHW.

    The operations are those of the evaluation, one by one and in float32, so that the same bits
    enter the network. The cast comes first: TensorRT wants it right behind a uint8 input.
    """
    baked = onnx.ModelProto()
    baked.CopyFrom(model)
    graph = baked.graph
    constants = {tensor.name for tensor in graph.initializer}
    (entry,) = [value for value in graph.input if value.name not in constants]
    channels, height, width = image.size
    batch = entry.type.tensor_type.shape.dim[0]
    shape = [batch.dim_param or batch.dim_value, height, width, channels]
    numbers = {"scale": [255.0], "mean": image.mean, "std": image.std}
    for name, values in numbers.items():
        array = np.array(values, np.float32)
        graph.initializer.append(numpy_helper.from_array(array, f"{_PREFIX}.{name}"))
    steps = [
        helper.make_node("Cast", [INPUT], [f"{_PREFIX}.float"], to=TensorProto.FLOAT),
        _step("Div", "float", "scale", "unit"),
        _step("Sub", "unit", "mean", "centered"),
        _step("Div", "centered", "std", "normalized"),
        helper.make_node("Transpose", [f"{_PREFIX}.normalized"], [entry.name], perm=[0, 3, 1, 2]),
    ]
    nodes = [*steps, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    entry.CopyFrom(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, shape))
    baked.metadata_props.add(key=KEY, value="uint8 NHWC RGB, resized and cropped")
    onnx.checker.check_model(baked, full_check=True)
    return baked


def compare_baked(
    open_runner: Opener, plain: Path, baked: Path, inputs: np.ndarray, image: ImageSpec
) -> dict[str, Any]:
    """Run both models on the same pixels and return how far apart their outputs are.

    `inputs` are normalized images (n, c, h, w); the pixels nearest to them are used.
    """
    pixels = to_pixels(inputs, image)
    runners = [open_runner(path, threads=1) for path in (plain, baked)]
    try:
        expected = runners[0].infer(normalize(pixels, image))
        found = runners[1].infer(pixels)
    finally:
        for runner in runners:
            runner.close()
    tolerance = _STEPS * output_step(onnx.load(plain))
    tolerance += _FLOAT_TOLERANCE * float(np.abs(expected).max())
    max_abs = float(np.abs(found - expected).max())
    return {
        "max_abs": max_abs,
        "tolerance": tolerance,
        "images": len(pixels),
        "passed": max_abs <= tolerance,
    }


def to_pixels(images: np.ndarray, image: ImageSpec) -> np.ndarray:
    """Return the uint8 pixels (n, h, w, c) that are nearest to normalized images (n, c, h, w)."""
    mean, std = (np.array(values, np.float32) for values in (image.mean, image.std))
    real = (images.transpose(0, 2, 3, 1) * std + mean) * np.float32(255)
    pixels: np.ndarray = np.clip(np.rint(real), 0, 255).astype(np.uint8)
    return pixels


def normalize(pixels: np.ndarray, image: ImageSpec) -> np.ndarray:
    """Return pixels (n, h, w, c) as the model's input, float32 (n, c, h, w)."""
    mean, std = (np.array(values, np.float32) for values in (image.mean, image.std))
    images = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def describe_preprocessing(
    image: Mapping[str, Any], baked: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the manifest's section: every step from a decoded picture to the model's input."""
    channels, height, width = image["size"]
    resize = image.get("resize")
    side = f"shorter side to {resize}" if resize else f"until it covers {width}x{height}"
    return {
        "color": "RGB" if channels == 3 else f"{channels} channel(s)",
        "resize": f"{side}, bilinear",
        "crop": f"center {width}x{height}",
        "scale": "divided by 255",
        "mean": list(image["mean"]),
        "std": list(image["std"]),
        "layout": "float32 n x c x h x w",
        "assumed": bool(image.get("assumed", False)),
        "baked": dict(baked) if baked else None,
    }


def _step(operator: str, value: str, constant: str, output: str) -> onnx.NodeProto:
    names = [f"{_PREFIX}.{value}", f"{_PREFIX}.{constant}"]
    return helper.make_node(operator, names, [f"{_PREFIX}.{output}"])
