import dataclasses
import json

import numpy as np
import onnx
import pytest

from dfqc.backends import ort
from dfqc.compiler import verify_package
from dfqc.compiler.errors import LoadError
from dfqc.compiler.inspection import output_step
from dfqc.compiler.verify_package import describe_verify, run_verify
from qdq_models import golden_of, sample_images, tiny_net, write_tiny_package


@pytest.fixture(scope="module")
def net():
    return tiny_net(weight=4, act=4)


@pytest.fixture
def check(net, tmp_path):
    """Compare the engine of `net` with an altered golden file."""
    path = tmp_path / "model.onnx"
    path.write_bytes(net.data)
    runner = ort.open_runner(path, threads=1)

    def run(manifest=None, **changes):
        golden = dataclasses.replace(golden_of(net), **changes)
        return verify_package.check_golden(golden, runner, net.model, manifest or {})

    return run


@pytest.mark.parametrize(
    "options", [{}, {"weight": 4, "act": 4}, {"weight": 4, "act": 16}, {"float32": True}], ids=str
)
def test_a_sound_package_passes(options, tmp_path):
    write_tiny_package(tmp_path / "net", **options)
    result = run_verify(tmp_path / "net", threads=1)
    assert result["failures"] == []
    assert result["parity"]["argmax_agreement"] == 100
    assert result["parity"]["max_abs"] < 1e-6
    assert result["parity"]["first_divergence"] is None
    assert result["files"] == 4
    assert not [line for line in describe_verify(result) if line.startswith(("FAILED", "note"))]


def test_the_kernels_that_run_here_are_compared_with_the_ledger(tmp_path):
    layers = [
        {"name": "stem", "executed": "QLinearConv"},
        {"name": "block.pointwise", "executed": "Conv (float)"},
    ]
    write_tiny_package(tmp_path / "net", manifest={"layers": layers})
    result = run_verify(tmp_path / "net")
    assert result["other_kernels"] == {"block.pointwise": ("Conv (float)", "QLinearConv")}
    assert any("ran as Conv (float)" in line for line in describe_verify(result))
    assert result["failures"] == []


def test_gates_that_failed_at_build_time_are_told(tmp_path):
    gates = [
        {"name": "max-drop", "value": 3.0, "limit": 1.0, "passed": False},
        {"name": "min-speedup", "value": 3.0, "limit": 1.0, "passed": True},
    ]
    write_tiny_package(tmp_path / "net", manifest={"gates": gates})
    notes = [line for line in describe_verify(run_verify(tmp_path / "net")) if "gate" in line]
    assert len(notes) == 1
    assert "max-drop failed at build time" in notes[0]


@pytest.mark.parametrize("file", ["model.onnx", "float.onnx", "golden.npz", "manifest.json"])
def test_one_flipped_bit_is_tampering(file, tmp_path):
    write_tiny_package(tmp_path / "net")
    path = tmp_path / "net" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(LoadError, match=file.replace(".", r"\.")):
        run_verify(tmp_path / "net")


def test_a_model_of_another_build_is_refused(tmp_path):
    metadata = {"dfqc.target": "ort", "dfqc.source_sha256": "a" * 64}
    write_tiny_package(
        tmp_path / "same", manifest={"model": {"sha256": "a" * 64}}, metadata=metadata
    )
    assert run_verify(tmp_path / "same")["failures"] == []
    write_tiny_package(
        tmp_path / "other", manifest={"model": {"sha256": "b" * 64}}, metadata=metadata
    )
    with pytest.raises(LoadError, match=r"dfqc\.source_sha256 is 'aaa.*the manifest says 'bbb"):
        run_verify(tmp_path / "other")


def test_a_model_that_the_checker_refuses(tmp_path):
    broken = onnx.ModelProto.FromString(tiny_net().data)
    broken.graph.node[0].op_type = "QuantiseLinear"
    path = tmp_path / "model.onnx"
    path.write_bytes(broken.SerializeToString())
    with pytest.raises(LoadError, match="checker refuses"):
        verify_package._check_model(path)


def test_golden_files_are_read_back_and_equal_contents_give_equal_bytes(net, tmp_path):
    golden = golden_of(net)
    for name in ("a.npz", "b.npz"):
        verify_package.write_golden(tmp_path / name, golden)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    read = verify_package.read_golden(tmp_path / "a.npz")
    np.testing.assert_array_equal(read.inputs, net.images)
    np.testing.assert_array_equal(read.outputs, net.outputs)
    assert (read.taps, read.layers) == (net.taps, net.layers)
    assert list(read.taps) == list(net.taps)  # the order is that of the graph
    for name, codes in golden.codes.items():
        np.testing.assert_array_equal(read.codes[name], codes)
        assert read.codes[name].dtype == np.uint8


@pytest.mark.parametrize("data", [b"", b"no archive", b"PK\x03\x04broken"])
def test_an_unreadable_golden_file_is_refused(data, tmp_path):
    (tmp_path / "golden.npz").write_bytes(data)
    with pytest.raises(LoadError, match="build the package again"):
        verify_package.read_golden(tmp_path / "golden.npz")


def test_outputs_within_a_few_codes_of_the_last_layer_pass_and_beyond_fail(net, check):
    step = output_step(net.model)
    within = check(outputs=net.outputs + np.float32(3.9 * step))
    assert within["failures"] == []
    assert within["max_abs"] == pytest.approx(3.9 * step, rel=1e-4)
    beyond = check(outputs=net.outputs + np.float32(4.2 * step))
    assert len(beyond["failures"]) == 1
    assert "outputs differ by" in beyond["failures"][0]


def test_the_accepted_difference_of_the_build_adds_to_the_tolerance(net, check):
    shifted = net.outputs + np.float32(10 * output_step(net.model))
    manifest = {"parity": {"max_abs": 8 * output_step(net.model)}}
    assert check(outputs=shifted)["failures"] != []
    assert check(manifest, outputs=shifted)["failures"] == []
    failed = manifest | {"gates": [{"name": "parity", "passed": False}]}
    assert check(failed, outputs=shifted)["failures"] != []


def test_another_class_on_a_clear_image_fails_even_within_an_accepted_difference(net, check):
    manifest = {"parity": {"max_abs": 100.0}}
    rolled = np.roll(net.outputs, 1, axis=1)
    result = check(manifest, outputs=rolled)
    assert result["argmax_agreement"] < 100
    assert any("arg-max equal on" in failure for failure in result["failures"])


def test_another_class_on_a_tied_image_is_no_failure(net, check):
    step = output_step(net.model)
    tied = net.outputs.copy()
    ordered = np.argsort(tied[0])
    best, second = ordered[-1], ordered[-2]
    tied[0, [best, second]] = (tied[0, best] + tied[0, second]) / 2
    tied[0, second] += np.float32(0.5 * step)
    distance = np.abs(tied - net.outputs).max()
    result = check({"parity": {"max_abs": float(distance)}}, outputs=tied)
    assert result["argmax_agreement"] < 100
    assert result["untied_agreement"] == 100
    assert result["failures"] == []


def test_nan_outputs_fail(net, check):
    outputs = net.outputs.copy()
    outputs[0, 0] = np.nan
    assert any("outputs differ" in failure for failure in check(outputs=outputs)["failures"])


def test_rounding_on_a_boundary_passes(net, check):
    codes = {name: values[:2].copy() for name, values in net.codes.items()}
    codes["block.a8"].flat[0] += 1
    result = check(codes=codes)
    assert result["failures"] == []
    first = result["first_divergence"]
    assert first["quantizer"] == "block.a8"
    assert (first["max_steps"], first["share"]) == (1, 1 / codes["block.a8"].size)


@pytest.mark.parametrize(("steps", "share"), [(2, 0.001), (1, 0.1)])
def test_the_first_diverging_quantizer_is_named(net, check, steps, share):
    codes = {name: values[:2].astype(np.int32) for name, values in net.codes.items()}
    for name in ("block.out", "sum.a8"):  # what comes behind it diverges too and is not blamed
        count = max(1, round(share * codes[name].size))
        codes[name].flat[:count] += np.where(codes[name].flat[:count] < 100, steps, -steps)
    result = check(codes=codes)
    assert result["first_divergence"]["quantizer"] == "block.out"
    assert len(result["failures"]) == 1
    assert "quantizer block.out is the first to diverge" in result["failures"][0]


def test_a_package_that_computes_something_else_has_failures(tmp_path):
    # The codes of other images: everything differs behind the first quantizer.
    other = tiny_net(sample_images(16, seed=5))
    net = tiny_net()
    golden = dataclasses.replace(golden_of(net), outputs=other.outputs)
    write_tiny_package(tmp_path / "net", golden=golden)
    result = run_verify(tmp_path / "net")
    assert result["failures"]
    assert any(line.startswith("FAILED") for line in describe_verify(result))
    json.dumps(result, allow_nan=False)


def test_one_moved_code_changes_the_output_by_at_most_the_output_step(net):
    """`output_step` against its meaning: move every input code of the head by one."""
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in net.model.graph.initializer}
    weight = constants["head.weight"].astype(np.float64)
    scale = np.float64(constants["flat.a8.s"]) * constants["head.weight.s"].astype(np.float64)
    codes = net.codes["flat.a8"].astype(np.int64)
    base = codes @ weight.T * scale
    changes = []
    for feature in range(codes.shape[1]):
        moved = codes.copy()
        moved[:, feature] += 1
        changes.append(np.abs(moved @ weight.T * scale - base).max())
    assert output_step(net.model) == pytest.approx(max(changes))


def test_behind_a_quantizer_the_output_step_is_its_scale():
    model = onnx.ModelProto.FromString(tiny_net().data)
    (head,) = [node for node in model.graph.node if node.op_type == "Gemm"]
    head.output[0] = "logits"
    constants = {"s": np.float32(0.125), "z": np.uint8(3), "axes": np.array([1])}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()
    )
    node = onnx.helper.make_node
    model.graph.node.extend(
        [
            node("QuantizeLinear", ["logits", "s", "z"], ["codes"]),
            node("DequantizeLinear", ["codes", "s", "z"], ["real"]),
            node("ReduceMean", ["real", "axes"], ["output"], keepdims=1),
        ]
    )
    assert output_step(model) == 0.125


def test_a_float_head_has_no_output_step():
    assert output_step(tiny_net(float32=True).model) == 0
    assert output_step(tiny_net(weight=4, act=16).model) == 0
