import dataclasses
import json

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import models
import quantized
from dfqc.backends import ort
from dfqc.compiler import parity
from dfqc.compiler.parity import LayerParity, ParityReport, check_parity
from dfqc.compiler.simulate import TorchRunner, simulated

IMAGES = models.images(40, seed=21)


@pytest.fixture(scope="module")
def case():
    return quantized.lowered("residual", "w4a4")


def check(case, runner=None, **options):
    return check_parity(
        case.graph, case.state, case.lowered, runner or case.runner, IMAGES, **options
    )


def altered(case, tmp_path, edit):
    """Open a copy of the model that `edit` has changed."""
    model = onnx.ModelProto.FromString(case.lowered.model)
    edit(model)
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "altered.onnx"
    path.write_bytes(model.SerializeToString())
    return ort.open_runner(path, threads=1)


def edit_tensor(name, change):
    """Replace one initializer by what `change` makes of its values."""

    def edit(model):
        tensor = next(t for t in model.graph.initializer if t.name == name)
        values = numpy_helper.to_array(tensor)
        if values.dtype == ml_dtypes.int4:
            values = change(values.astype(np.int8)).astype(ml_dtypes.int4)
        else:
            values = change(values.copy())
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return edit


def edit_quantizer(tap, factor):
    """Give the Q node of one tensor another scale than its DQ has."""

    def edit(model):
        node = next(n for n in model.graph.node if tap in n.output)
        if node.op_type == "Clip":
            node = next(n for n in model.graph.node if node.input[0] in n.output)
        scale = next(t for t in model.graph.initializer if t.name == node.input[1])
        wrong = numpy_helper.to_array(scale) * np.float32(factor)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(wrong), "wrong"))
        node.input[1] = "wrong"

    return edit


def blamed(report):
    return [row.quantizer for row in report.layers if not row.passed]


def unequal(report):
    return [row.quantizer for row in report.layers if row.share > 0]


def test_a_good_pair_passes(case):
    seen = []
    report = check(case, progress=lambda done, total, note: seen.append((done, total)))
    assert report.passed
    assert report.argmax_agreement == 100
    assert (report.images, report.layer_images) == (40, 16)
    assert seen == [(32, 40), (40, 40)]
    assert [row.quantizer for row in report.layers] == list(case.state.plan.quantizers)
    assert not blamed(report)
    for row in report.layers:
        assert row.scale == case.state.acts[row.quantizer].scale


def flip(values):
    values[0, 0, 1, 1] = -8 if values[0, 0, 1, 1] >= 0 else 7
    return values


@pytest.mark.parametrize(
    ("layer", "quantizer"),
    [
        ("conv1", "relu.a8"),
        ("layer1.conv1", "relu_1.a4"),
        ("layer1.conv2", "layer1_conv2.a8"),
        ("layer2.conv2", "layer2_conv2.a8"),
    ],
)
def test_one_wrong_weight_is_blamed_on_its_layer_alone(case, tmp_path, layer, quantizer):
    runner = altered(case, tmp_path, edit_tensor(f"{layer}.weight", flip))
    report = check(case, runner)
    assert not report.passed
    assert report.worst_layer == quantizer
    assert blamed(report) == [quantizer]
    assert set(unequal(report)) - {quantizer} <= set(unequal(check(case)))


def test_a_wrong_weight_of_the_last_layer_shows_in_the_output(case, tmp_path):
    def raise_row(values):
        values[3] += np.where(values[3] < 100, 20, 0).astype(values.dtype)
        return values

    report = check(case, altered(case, tmp_path, edit_tensor("head.fc.weight", raise_row)))
    assert not report.passed
    assert not blamed(report)
    assert report.output_error > parity.OUTPUT_TOLERANCE


@pytest.mark.parametrize("name", ["layer2.conv1.ws", "layer2.conv1.bias"])
def test_a_wrong_scale_or_bias_is_blamed_on_its_layer_alone(case, tmp_path, name):
    change = (lambda v: v * np.float32(1.2)) if name.endswith("ws") else (lambda v: v + 200)
    report = check(case, altered(case, tmp_path, edit_tensor(name, change)))
    assert not report.passed
    assert blamed(report) == [report.worst_layer] == ["relu_3.a4"]


@pytest.mark.parametrize("quantizer", ["relu.a8", "relu_1.a4", "layer2_downsample_0.a8"])
def test_a_wrong_activation_scale_is_blamed_on_its_tensor_alone(case, tmp_path, quantizer):
    edit = edit_quantizer(case.lowered.taps[quantizer], 1.1)
    report = check(case, altered(case, tmp_path, edit))
    assert not report.passed
    assert blamed(report) == [report.worst_layer] == [quantizer]


def test_a_lost_clip_is_found(case, tmp_path):
    tap = case.lowered.taps["relu_1.a4"]

    def widen(model):
        node = next(n for n in model.graph.node if tap in n.output)
        limit = numpy_helper.from_array(np.asarray(np.uint8(255)), "limit")
        model.graph.initializer.append(limit)
        node.input[2] = "limit"

    report = check(case, altered(case, tmp_path, widen))
    assert blamed(report) == ["relu_1.a4"]
    assert report.layers[list(case.state.plan.quantizers).index("relu_1.a4")].max_steps > 1


def test_figures_are_those_of_the_two_networks(case, tmp_path):
    runner = altered(case, tmp_path, edit_tensor("layer1.conv1.weight", np.negative))
    report = check(case, runner, batch=7)
    ours = TorchRunner(simulated(case.graph, case.state)).infer(IMAGES.numpy())
    theirs = runner.infer(IMAGES.numpy())
    assert report.max_abs == np.abs(ours - theirs).max()
    agreement = 100 * np.mean(ours.argmax(1) == theirs.argmax(1))
    assert report.argmax_agreement == pytest.approx(agreement)
    assert agreement < 100


def rows(**changes):
    good = LayerParity("a", 0.1, 0, 0.0)
    return (good, dataclasses.replace(LayerParity("b", 0.1, 1, 0.01), **changes))


@pytest.mark.parametrize(
    ("layers", "fields", "passed"),
    [
        (rows(), {}, True),
        (rows(max_steps=2, share=1e-6), {}, False),
        (rows(share=0.03), {}, False),
        (rows(), {"argmax_agreement": 98.9}, False),
        (rows(), {"argmax_agreement": 100 * 15 / 16, "images": 16}, True),
        (rows(), {"argmax_agreement": 100 * 14 / 16, "images": 16}, False),
        (rows(), {"output_error": 2e-4}, False),
        (rows(), {"output_error": float("nan")}, False),
        ((), {}, True),
    ],
)
def test_what_passes(layers, fields, passed):
    values = {"max_abs": 0.1, "argmax_agreement": 99.5, "images": 200, "output_error": 1e-5}
    report = ParityReport(**{**values, **fields}, layers=layers, layer_images=16)
    assert report.passed is passed
    assert report.worst_layer == ("b" if layers else "")
    data = json.loads(json.dumps(report.to_json()))
    assert data["passed"] is passed
    assert data["worst_layer"] == report.worst_layer
    assert [row["quantizer"] for row in data["layers"]] == [row.quantizer for row in layers]


def test_a_weight_only_model_has_its_output_compared():
    case = quantized.lowered("residual", "w4a16")
    report = check(case)
    assert report.passed
    assert report.layers == ()
    assert report.worst_layer == ""
    assert 0 < report.output_error < parity.OUTPUT_TOLERANCE
