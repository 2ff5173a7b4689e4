import pytest
import torch

from dfqc.compiler import storage
from dfqc.compiler.contracts import CalibSet, Lowered, QParams, QTensor, QuantState
from dfqc.compiler.spec import Bits, LayerPlan, Plan, QScheme, Quantizer


@pytest.fixture
def plan():
    grid = QScheme(4, signed=False, symmetric=False)
    layers = {
        "b.conv": LayerPlan("b.conv", "b_conv", "Conv2d", Bits(4, 4), Bits(4, 4),
                            QScheme(4, signed=True, symmetric=True, axis=0), "x.a4", "why"),
        "a.fc": LayerPlan("a.fc", "a_fc", "Linear", Bits(32, 32), Bits(32, 32), None, None),
    }  # fmt: skip
    quantizers = {
        "x.a4": Quantizer("x.a4", "x", grid, ("b_conv",)),
        "y.a4": Quantizer("y.a4", "y", grid, ("a_fc",), after="x.a4", tied="x.a4"),
    }
    return Plan("ort", Bits(4, 4), layers, quantizers)


def round_trip(save, load, value, folder):
    """Save twice: what was read back must be written to the same bytes."""
    for name in ("first", "second"):
        (folder / name).mkdir()
        save(value, folder / name)
        value = load(folder / name)
    for path in (folder / "first").iterdir():
        assert path.read_bytes() == (folder / "second" / path.name).read_bytes()
    return value


def test_a_plan_comes_back(plan, tmp_path):
    back = round_trip(storage.save_plan, storage.load_plan, plan, tmp_path)
    assert back == plan
    assert list(back.layers) == ["b.conv", "a.fc"]  # in the order they run


@pytest.mark.parametrize("labels", [None, torch.arange(3)])
def test_a_calibration_set_comes_back(labels, tmp_path):
    images = torch.randn(3, 2, 4, 5).to(memory_format=torch.channels_last)
    calib = CalibSet(images, labels, "zeroq", {"loss": 0.25, "steps": [1, 2]})
    back = round_trip(storage.save_calib, storage.load_calib, calib, tmp_path)
    assert torch.equal(back.images, images)
    assert back.labels is None if labels is None else torch.equal(back.labels, labels)
    assert (back.source, back.info) == (calib.source, calib.info)


def test_a_state_comes_back(plan, tmp_path):
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 2, 2, 2)
    state = QuantState(
        plan,
        {"b.conv": QTensor(codes, torch.tensor([0.1, 0.2]))},
        {"b.conv": torch.tensor([1.0, -1e-30])},
        {"x.a4": QParams(1 / 3, 7), "y.a4": QParams(1 / 3, 7)},
        {"quantizer": "rtn"},
    )
    back = round_trip(storage.save_state, storage.load_state, state, tmp_path)
    assert back.plan == plan
    assert torch.equal(back.weights["b.conv"].codes, codes)
    assert back.weights["b.conv"].codes.dtype == torch.int8
    assert torch.equal(back.weights["b.conv"].scale, state.weights["b.conv"].scale)
    assert torch.equal(back.biases["b.conv"], state.biases["b.conv"])
    assert back.acts == state.acts  # floats to the last bit
    assert back.info == state.info


def test_a_lowered_model_comes_back(tmp_path):
    lowered = Lowered(b"\x00model", {"x.a4": "v1"}, {"b.conv": "v2"})
    storage.save_lowered((lowered, {"model_bytes": 6}), tmp_path)
    assert storage.load_lowered(tmp_path) == lowered
    assert storage.load_json(tmp_path / storage.NAMES)["sizes"] == {"model_bytes": 6}
    storage.save_float(b"float", tmp_path)
    assert storage.load_float(tmp_path) == b"float"
