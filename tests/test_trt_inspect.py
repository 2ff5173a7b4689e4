"""Inspector JSON as TensorRT 10 and 11 write it (hand-made after the documented fields)."""

import json

import pytest

from dfqc.backends import _trt_inspect
from dfqc.compiler.errors import LoadError

MODULES = {"layer1.0.conv1": "a", "layer1.0.conv2": "b", "fc": "c", "gone": "d"}

TEN = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to layer1.0.conv1",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "input", "Format/Datatype": "Row major linear FP32"}],
            "Outputs": [{"Name": "r", "Format/Datatype": "Row major linear Int8 format"}],
            "TacticName": "",
            "Metadata": "[ONNX Layer: layer1.0.conv1]",
        },
        {
            "Name": "layer1.0.conv1.weight + layer1.0.conv1 + Relu_1 [profile 0]",
            "LayerType": "CaskConvolution",
            "Inputs": [
                {
                    "Name": "r",
                    "Location": "Device",
                    "Dimensions": [1, 16, 32, 32],
                    "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format",
                }
            ],
            "Outputs": [{"Name": "s", "Format/Datatype": "Row major Int8 format"}],
            "ParameterType": "Convolution",
            "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32",
            "Metadata": "[ONNX Layer: layer1.0.conv1]\u001e[ONNX Layer: Relu_1]",
        },
        {
            "Name": "layer1.0.conv2",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "s", "Format/Datatype": "Channel major FP16 format"}],
            "Outputs": [{"Name": "t", "Format/Datatype": "Channel major FP16 format"}],
        },
        "fc [profile 1]",
    ],
    "Bindings": ["input", "output"],
}
ELEVEN = {
    "Layers": [
        {
            "Name": "layer1.0.conv1 + Relu_1",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "r", "Format": "NC/32HW32", "DataType": "Int8"}],
            "Outputs": [{"Name": "s", "Format": "NC/32HW32", "DataType": "Int8"}],
            "TacticName": "i8i8",
            "Metadata": "",
        },
        {
            "Name": "{ForeignNode[layer1.0.conv2...fc]}",
            "LayerType": "Myelin",
            "Inputs": [{"Name": "s", "Format": "Linear", "DataType": "Half"}],
            "Outputs": [{"Name": "output", "Format": "Linear", "DataType": "Float"}],
            "Metadata": "[ONNX Layer: layer1.0.conv2]\u001f[ONNX Layer: fc]",
        },
    ],
    "I/O Tensors": [{"Name": "input", "DataType": "Float"}, {"Name": "output"}],
}


def test_the_form_of_ten():
    found = _trt_inspect.parse(json.dumps(TEN))
    assert _trt_inspect.kernels(found, MODULES) == {
        "layer1.0.conv1": "CaskConvolution int8 -> int8, "
        "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32",
        "layer1.0.conv2": "CaskConvolution fp16 -> fp16",
        "fc": "layer ? -> ?",
        "gone": "not found in the engine",
    }
    assert _trt_inspect.tensor_names(json.dumps(TEN)) == ["input", "output"]


def test_the_form_of_eleven():
    found = _trt_inspect.parse(json.dumps(ELEVEN))
    assert _trt_inspect.kernels(found, MODULES) == {
        "layer1.0.conv1": "CaskConvolution int8 -> int8, i8i8",
        "layer1.0.conv2": "Myelin fp16 -> fp32",
        "fc": "Myelin fp16 -> fp32",
        "gone": "not found in the engine",
    }
    assert _trt_inspect.tensor_names(json.dumps(ELEVEN)) == ["input", "output"]


def test_times_belong_to_the_modules_of_an_engine_layer():
    found = _trt_inspect.parse(json.dumps(ELEVEN))
    profile = {
        "layer1.0.conv1 + Relu_1 [profile 1]": 0.5,
        "{ForeignNode[layer1.0.conv2...fc]}": 2.0,
        "Reformat": 0.1,
    }
    assert _trt_inspect.times(found, MODULES, profile) == {
        "layer1.0.conv1": 0.5,
        "layer1.0.conv2": 2.0,
        "fc": 2.0,
    }


@pytest.mark.parametrize("text", ["", "[]", '{"layers": []}', "null"])
def test_what_is_no_layer_information_is_refused(text):
    with pytest.raises(LoadError, match="expected JSON with `Layers`"):
        _trt_inspect.parse(text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("BFloat16", "bf16"), ("FP8", "fp8"), ("INT4 packed", "int4"), ("Float16", "fp16"),
     ("Float", "fp32"), ("Complex", "unknown")],
)  # fmt: skip
def test_types_are_read(text, kind):
    row = {"Name": "x", "LayerType": "k", "Inputs": [{"DataType": text}], "Outputs": []}
    (layer,) = _trt_inspect.parse(json.dumps({"Layers": [row]}))
    assert layer.reads == (kind,)
