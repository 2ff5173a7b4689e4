import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from dfqc.compiler.errors import LoadError
from dfqc.compiler.inspection import describe_inspect, inspect_model, run_inspect
from qdq_models import tiny_net, write_tiny_package


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_net(weight=4, act=4, metadata={"dfqc.version": "1.2.3"}).data)
    return path


def test_bytes_add_up_to_the_file(model):
    result = inspect_model(model)
    assert sum(result["bytes"].values()) == result["file_bytes"] == model.stat().st_size
    # depthwise 8×1×3×3 and pointwise 8×8 at two codes a byte; stem 8×3×3×3 and head 5×8 at one.
    assert result["bytes"]["int4"] == (72 + 64) // 2
    assert result["bytes"]["int8"] == 216 + 40 + 5  # and the head's zero points
    assert result["bytes"]["int32"] == 4 * (8 + 8 + 8 + 5)


@pytest.mark.parametrize("packed", [True, False])
def test_bytes_do_not_depend_on_how_protobuf_stores_a_tensor(packed, tmp_path):
    values = np.arange(-3, 4, dtype=np.int8)
    tensor = (
        numpy_helper.from_array(values, "w")
        if packed
        else onnx.helper.make_tensor("w", onnx.TensorProto.INT8, [7], values)
    )
    node = onnx.helper.make_node("Cast", ["w"], ["y"], to=onnx.TensorProto.FLOAT)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [7])
    graph = onnx.helper.make_graph([node], "g", [], [output], [tensor])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    assert inspect_model(tmp_path / "m.onnx")["bytes"]["int8"] == 7


def test_weights_have_the_bits_they_are_stored_in(model):
    rows = {row["name"]: row for row in inspect_model(model)["weights"]}
    assert {name: row["bits"] for name, row in rows.items()} == {
        "stem.weight": 8,
        "block.depthwise.weight": 4,
        "block.pointwise.weight": 4,
        "head.weight": 8,
    }
    assert rows["block.depthwise.weight"]["shape"] == [8, 1, 3, 3]
    assert rows["block.depthwise.weight"]["bytes"] == 36


def test_activations_have_the_grid_that_their_clip_leaves(model):
    rows = {row["name"]: row for row in inspect_model(model)["activations"]}
    assert rows["input.a8.q"]["bits"] == 8
    assert rows["input.a8.q"]["zero_point"] == 128
    narrow = rows["stem.narrow.c"]
    assert (narrow["quant_min"], narrow["quant_max"], narrow["bits"]) == (0, 15, 4)
    net = onnx.load(model)
    scales = {t.name: numpy_helper.to_array(t) for t in net.graph.initializer}
    assert narrow["scale"] == pytest.approx(float(scales["stem.narrow.s"]))
    assert len(rows) == 9


def test_float_weights_are_32_bits(tmp_path):
    path = tmp_path / "float.onnx"
    path.write_bytes(tiny_net(float32=True).data)
    result = inspect_model(path)
    assert {row["bits"] for row in result["weights"]} == {32}
    assert result["activations"] == []


def test_operators_and_metadata_are_told(model):
    result = run_inspect(model)
    assert result["operators"]["Conv"] == 3
    assert result["operators"]["QuantizeLinear"] == 9
    assert result["metadata"] == {"dfqc.version": "1.2.3"}
    assert (result["opset"], result["ir_version"]) == ({"ai.onnx": 21}, 10)
    text = "\n".join(describe_inspect(result))
    assert "int4 68 B" in text
    assert "2 × 4 bits, 2 × 8 bits" in text
    assert "dfqc.version = 1.2.3" in text


def test_a_package_brings_what_its_manifest_says(tmp_path):
    gates = [{"name": "max-drop", "value": 3.0, "limit": 1.0, "passed": False}]
    layers = [{"name": "stem", "asked": "w4a4", "exported": "w8a8", "executed": "QLinearConv"}]
    write_tiny_package(tmp_path / "net", manifest={"gates": gates, "layers": layers})
    result = run_inspect(tmp_path / "net")
    assert result["gates"] == gates
    assert result["bits"] == "w8a8"
    lines = describe_inspect(result)
    assert any("stem: asked w4a4, exported w8a8, executed QLinearConv" in line for line in lines)
    assert any("max-drop 3.0 (limit 1.0) FAILED" in line for line in lines)


@pytest.mark.parametrize("data", [b"text, not a model", tiny_net().data[:1500]])
def test_a_file_that_is_no_model_is_refused(data, tmp_path):
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(LoadError, match="no ONNX model"):
        run_inspect(tmp_path / "model.onnx")


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(LoadError, match="no package"):
        run_inspect(tmp_path / "none")
