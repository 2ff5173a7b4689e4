import re

import onnx
import pytest

from dfqc.compiler.triton import repository_name, triton_repository
from qdq_models import tiny_net


def parse(text):
    """Read the few forms of protobuf text that a configuration uses."""
    tokens = re.findall(r'"[^"]*"|[\w.-]+:?|[{}\[\],]', text)

    def message(until):
        fields = {}
        while tokens and tokens[0] != until:
            name = tokens.pop(0).rstrip(":")
            fields[name] = value()
        if tokens:
            tokens.pop(0)
        return fields

    def value():
        token = tokens.pop(0)
        if token == "{":
            return message("}")
        if token != "[":
            return token.strip('"') if not token.lstrip("-").isdigit() else int(token)
        items = []
        while tokens[0] != "]":
            items.append(value())
            if tokens[0] == ",":
                tokens.pop(0)
        tokens.pop(0)
        return items

    return message(None)


def config_of(model, **options):
    files = triton_repository("net", model, **{"cpu": True} | options)
    return parse(files["triton/net/config.pbtxt"].decode())


def test_the_repository_has_a_configuration_and_version_one():
    data = tiny_net().data
    files = triton_repository("net", data, cpu=True)
    assert set(files) == {"triton/net/config.pbtxt", "triton/net/1/model.onnx"}
    assert files["triton/net/1/model.onnx"] == data


def test_dimensions_are_given_without_the_batch():
    config = config_of(tiny_net().data)
    assert config == {
        "name": "net",
        "platform": "onnxruntime_onnx",
        "max_batch_size": 64,
        "input": [{"name": "input", "data_type": "TYPE_FP32", "dims": [3, 8, 8]}],
        "output": [{"name": "output", "data_type": "TYPE_FP32", "dims": [5]}],
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "dynamic_batching": {},
    }


def test_a_model_with_a_fixed_batch_is_not_batched():
    model = tiny_net().model
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    config = config_of(model.SerializeToString())
    assert config["max_batch_size"] == 0
    assert config["input"][0]["dims"] == [1, 3, 8, 8]
    assert config["output"][0]["dims"] == [1, 5]
    assert "dynamic_batching" not in config


def test_an_open_dimension_stays_open():
    model = tiny_net().model
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    assert config_of(model.SerializeToString())["input"][0]["dims"] == [3, -1, 8]


def test_an_engine_is_served_by_tensorrt_on_the_gpu():
    files = triton_repository("net", tiny_net().data, cpu=False, engine=b"plan")
    assert files["triton/net/1/model.plan"] == b"plan"
    config = parse(files["triton/net/config.pbtxt"].decode())
    assert config["platform"] == "tensorrt_plan"
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]


def test_constants_listed_as_inputs_are_no_inputs():
    model = onnx.ModelProto.FromString(tiny_net().data)
    tensor = model.graph.initializer[0]
    shape = list(tensor.dims)
    value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape)
    model.graph.input.append(value)
    assert [entry["name"] for entry in config_of(model.SerializeToString())["input"]] == ["input"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", "resnet20"),
        ("timm:resnet18.a1_in1k", "timm_resnet18.a1_in1k"),
        ("../../etc/passwd", "etc_passwd"),
        ("mein modell", "mein_modell"),
        ("...", "model"),
    ],
)
def test_names_become_folder_names(name, expected):
    assert repository_name(name) == expected
