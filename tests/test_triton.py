import onnx
import pytest
from google.protobuf import json_format, text_format

from dfqc.compiler.triton import repository_name, triton_repository
from qdq_models import tiny_net
from triton_schema import parse_config


def parse(text):
    """Read a configuration by Triton's schema."""

    def plain(value):
        if isinstance(value, dict):
            return {k: [int(d) for d in v] if k == "dims" else plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list) else value

    return plain(json_format.MessageToDict(parse_config(text), preserving_proto_field_name=True))


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
        "model_warmup": [warm_up(1), warm_up(8)],
    }


def test_a_model_for_openvino_is_served_by_openvino():
    config = config_of(tiny_net().data, target="openvino")
    assert config["backend"] == "openvino"
    assert config["default_model_filename"] == "model.onnx"
    assert "platform" not in config


def warm_up(batch):
    zeros = {"data_type": "TYPE_FP32", "dims": [3, 8, 8], "zero_data": True}
    return {
        "name": f"batch_{batch}",
        "batch_size": batch,
        "inputs": [{"key": "input", "value": zeros}],
    }


@pytest.mark.parametrize("line", ['batch_limit: 3', 'max_batch_size: "3"', "platform: KIND_CPU",
                                  "input [ { name: 'a' dims: [ 1.5 ] } ]"])  # fmt: skip
def test_what_the_schema_does_not_have_is_refused(line):
    with pytest.raises(text_format.ParseError):
        parse_config(line)


def test_an_engine_for_some_batches_prefers_and_warms_them():
    files = triton_repository("n", tiny_net().data, cpu=False, engine=b"plan", batches=(8, 1, 32))
    config = parse(files["triton/n/config.pbtxt"].decode())
    assert config["max_batch_size"] == 32
    assert config["dynamic_batching"] == {"preferred_batch_size": [1, 8, 32]}
    assert [request["batch_size"] for request in config["model_warmup"]] == [1, 8, 32]


def test_a_model_with_a_fixed_batch_is_not_batched():
    model = tiny_net().model
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    config = config_of(model.SerializeToString())
    assert config.get("max_batch_size", 0) == 0
    (request,) = config["model_warmup"]
    assert request["batch_size"] == 1
    assert request["inputs"][0]["value"]["dims"] == [1, 3, 8, 8]
    assert config["input"][0]["dims"] == [1, 3, 8, 8]
    assert config["output"][0]["dims"] == [1, 5]
    assert "dynamic_batching" not in config


def test_an_open_dimension_stays_open():
    model = tiny_net().model
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    config = config_of(model.SerializeToString())
    assert config["input"][0]["dims"] == [3, -1, 8]
    assert "model_warmup" not in config  # zeros of what size?


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
