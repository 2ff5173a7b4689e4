"""Float operations between integer kernels of ONNX Runtime: the same numbers, fewer passes."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import quantized
from dfqc.backends import ort
from dfqc.backends._ort_float import speed_up_float
from dfqc.compiler.parity import check_parity


class Attention(torch.nn.Module):
    """A convolution, a SiLU, and squeeze-excite on it: as in EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, 2, 1)
        self.gate = torch.nn.Conv2d(16, 16, 1)
        self.head = torch.nn.Conv2d(16, 8, 1)
        self.fc = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.silu(self.stem(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.fc(self.head(x).mean((2, 3)))


def lower(bits):
    torch.manual_seed(0)
    graph = quantized.fold_module(Attention())
    state = quantized.quantize(graph, quantized.plan(graph, bits))
    return graph, state, ort.lower(graph, state, metadata={})


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_silu_is_one_operator_and_every_code_the_simulated_one(bits, tmp_path):
    graph, state, result = lower(bits)
    path = tmp_path / "model.onnx"
    path.write_bytes(result.model)
    counts = ort.census(path)
    assert counts["com.microsoft.QuickGelu"] == 1
    assert counts["Sigmoid"] == 1  # squeeze-excite's, which is no SiLU
    images = torch.randn(16, *graph.image.size, generator=torch.Generator().manual_seed(1))
    report = check_parity(graph, state, result, ort.open_runner(path, threads=1), images)
    assert report.passed
    assert report.argmax_agreement == 100
    assert report.max_abs < 1e-5


def test_what_ends_in_float_still_has_its_mean_and_its_name():
    _, _, result = lower("w8a8")
    model = onnx.load_from_string(result.model)
    assert [value.name for value in model.graph.output] == ["output"]
    assert {entry.domain: entry.version for entry in model.opset_import} == {
        "": 21,
        "com.microsoft": 1,
    }
    means = [node for node in model.graph.node if node.op_type == "ReduceMean"]
    assert len(means) == 2  # of one mean of floats; the other is a pool on codes
    assert sum(node.op_type == "GlobalAveragePool" for node in model.graph.node) == 1


def chain(nodes, outputs=("y",)):
    constants = [
        numpy_helper.from_array(np.float32(0.1), "s"),
        numpy_helper.from_array(np.uint8(100), "z"),
        numpy_helper.from_array(np.array([2, 3]), "axes"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 5, 6])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None) for y in outputs],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(proto, store):
    model = ir.serde.deserialize_model(proto)
    speed_up_float(model)
    for domain in {node.domain for node in model.graph if node.domain}:
        model.opset_imports[domain] = 1
    images = np.random.default_rng(1).normal(0, 5, (3, 4, 5, 6)).astype(np.float32)
    found = []
    for name, data in (("a", proto), ("b", ir.serde.serialize_model(model))):
        path = store / f"{name}.onnx"
        path.write_bytes(data.SerializeToString())
        found.append(ort.open_runner(path, threads=1).infer(images))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-6)
    return [node.op_type for node in model.graph]


QDQ = (
    helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
    helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
)
SIGMOID = helper.make_node("Sigmoid", ["d"], ["g"])


def test_a_silu_can_be_what_the_model_gives(tmp_path):
    nodes = [*QDQ, SIGMOID, helper.make_node("Mul", ["g", "d"], ["y"])]
    assert run(chain(nodes), tmp_path) == ["QuantizeLinear", "DequantizeLinear", "QuickGelu"]


@pytest.mark.parametrize(
    "nodes",
    [
        [*QDQ, SIGMOID, helper.make_node("Mul", ["g", "x"], ["y"])],  # another factor
        [*QDQ, SIGMOID, helper.make_node("Add", ["g", "d"], ["y"])],
        [
            helper.make_node("Sigmoid", ["x"], ["g"]),  # in float: the runtime's own business
            helper.make_node("Mul", ["g", "x"], ["y"]),
        ],
    ],
)
def test_what_is_no_silu_on_codes_stays(nodes, tmp_path):
    proto = chain(nodes)
    assert run(proto, tmp_path) == [node.op_type for node in proto.graph.node]


@pytest.mark.parametrize("keep", [0, 1])
def test_a_mean_of_floats_is_taken_in_two_steps(keep, tmp_path):
    activation = helper.make_node("Tanh", ["x"], ["t"])
    mean = helper.make_node("ReduceMean", ["t", "axes"], ["y"], keepdims=keep)
    assert run(chain([activation, mean]), tmp_path) == ["Tanh", "ReduceMean", "ReduceMean"]


def test_a_mean_of_codes_is_left_as_it_is(tmp_path):
    mean = helper.make_node("ReduceMean", ["d", "axes"], ["y"])
    nodes = ["QuantizeLinear", "DequantizeLinear", "ReduceMean"]
    assert run(chain([*QDQ, mean]), tmp_path) == nodes
