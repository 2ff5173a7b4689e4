"""Preprocessing in the graph: the same bits enter the network as from outside."""

import numpy as np
import onnx
import pytest

from dfqc.backends import ort
from dfqc.compiler.baking import (
    BAKED,
    bake_preprocessing,
    compare_baked,
    describe_preprocessing,
    normalize,
    to_pixels,
)
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.triton import triton_repository
from qdq_models import tiny_net
from triton_schema import parse_config

IMAGE = ImageSpec((3, 8, 8), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def models(tmp_path):
    model = tiny_net().model
    plain, baked = tmp_path / "model.onnx", tmp_path / BAKED
    plain.write_bytes(model.SerializeToString())
    baked.write_bytes(bake_preprocessing(model, IMAGE).SerializeToString())
    return plain, baked


def pixels(count=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_outputs_are_those_of_images_normalized_outside(models):
    plain, baked = (ort.open_runner(path, threads=1) for path in models)
    images = pixels()
    # By hand, in float64, rounded once: what the float32 steps may be off by is far below a code.
    mean, std = np.array(IMAGE.mean), np.array(IMAGE.std)
    outside = ((images / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_allclose(normalize(images, IMAGE), outside, rtol=0, atol=5e-7)
    expected = plain.infer(normalize(images, IMAGE))
    assert np.array_equal(baked.infer(images), expected)
    assert np.ptp(expected) > 0


def test_other_preprocessing_is_found(models, tmp_path):
    other = ImageSpec(IMAGE.size, (0.5,) * 3, (0.25,) * 3)
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(bake_preprocessing(tiny_net().model, other).SerializeToString())
    inputs = normalize(pixels(), IMAGE)
    assert compare_baked(ort.open_runner, *models, inputs, IMAGE)["passed"]
    found = compare_baked(ort.open_runner, models[0], wrong, inputs, IMAGE)
    assert not found["passed"]
    assert found["max_abs"] > found["tolerance"]


def test_the_model_itself_is_left_alone(models):
    model = tiny_net().model
    before = model.SerializeToString()
    baked = bake_preprocessing(model, IMAGE)
    assert model.SerializeToString() == before
    (entry,) = baked.graph.input
    dims = entry.type.tensor_type.shape.dim
    assert entry.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", 8, 8, 3]
    assert [node.op_type for node in baked.graph.node][:5] == [
        *("Cast", "Div", "Sub", "Div", "Transpose")
    ]


def test_the_same_integer_kernels_run(models):
    plain, baked = (ort.census(path) for path in models)
    name = "com.microsoft.QLinearConv"
    assert plain[name] == baked[name] == 3


def test_pixels_and_back():
    images = pixels()
    assert np.array_equal(to_pixels(normalize(images, IMAGE), IMAGE), images)
    assert to_pixels(np.full((1, 3, 8, 8), 99, np.float32), IMAGE).max() == 255


def test_triton_is_told_about_pixels(models):
    files = triton_repository("net", models[1].read_bytes(), cpu=True)
    config = parse_config(files["triton/net/config.pbtxt"].decode())
    assert config.input[0].name == "pixels"
    assert config.input[0].data_type == 2  # TYPE_UINT8
    assert list(config.input[0].dims) == [8, 8, 3]


def test_the_manifest_says_every_step():
    image = {"size": [3, 8, 8], "resize": 10, "mean": [0.5], "std": [0.2], "assumed": True}
    about = describe_preprocessing(image, None)
    assert about["resize"] == "shorter side to 10, bilinear"
    assert about["assumed"]
    assert about["baked"] is None
