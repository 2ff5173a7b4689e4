import math

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import numerics
from dfqc.compiler import affine
from dfqc.compiler.contracts import WeightGrid
from dfqc.compiler.spec import QScheme

ONNX_TYPES = {
    (8, False): TensorProto.UINT8,
    (8, True): TensorProto.INT8,
    (4, False): TensorProto.UINT4,
    (4, True): TensorProto.INT4,
}
SCHEMES = [QScheme(b, s, False) for b in (2, 3, 4, 5, 6, 7, 8) for s in (False, True)]


def onnx_quantize(x, scale, zero_point, kind, axis=None):
    """Run QuantizeLinear and DequantizeLinear of opset 21 in ONNX's own evaluator."""
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    scale = np.asarray(scale, np.float32)
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, scale.shape, scale.reshape(-1)),
        helper.make_tensor("z", kind, scale.shape, np.full(scale.size, zero_point)),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor_value_info("q", kind, x.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    codes, real = ReferenceEvaluator(model).run(None, {"x": x})
    return np.asarray(codes).astype(np.int64), real


@pytest.mark.parametrize(("bits", "signed"), ONNX_TYPES)
@pytest.mark.parametrize("scale", [0.5, 0.0123, 7.25])
def test_rounding_is_that_of_onnx(bits, signed, scale):
    scheme = QScheme(bits, signed, False)
    middle = (scheme.quant_min + scheme.quant_max) // 2
    ties = (np.arange(-40, 40) + 0.5) * scale
    x = np.concatenate([ties, np.random.default_rng(0).normal(size=2000) * scale * 2**bits, [0]])
    x = x.astype(np.float32)
    for zero_point in {scheme.quant_min, middle, scheme.quant_max, 0}:
        expected, real = onnx_quantize(x, scale, zero_point, ONNX_TYPES[bits, signed])
        t, s = torch.from_numpy(x), torch.tensor(scale)
        codes = affine.quantize(t, s, zero_point, scheme)
        np.testing.assert_array_equal(codes.numpy(), expected)
        np.testing.assert_array_equal(affine.dequantize(codes, s, zero_point).numpy(), real)
        np.testing.assert_array_equal(affine.fake_quantize(t, s, zero_point, scheme).numpy(), real)


def test_ties_go_to_the_even_code():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    codes = affine.quantize(x, torch.tensor(1.0), 0, QScheme(8, True, True))
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2, 4]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_saturate_at_the_ends_of_the_grid(scheme):
    x = torch.tensor([-1e30, -300.0, 300.0, 1e30])
    codes = affine.quantize(x, torch.tensor(1.0), 0, scheme)
    low, high = numerics.grid(scheme.bits, scheme.signed)
    assert codes.tolist() == [low, low, high, high]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_quantizing_twice_changes_nothing_and_the_input_stays(scheme):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    qparams = affine.affine_qparams(-2.0, 3.0, scheme)
    scale = torch.tensor(qparams.scale)
    once = affine.fake_quantize(x, scale, qparams.zero_point, scheme)
    twice = affine.fake_quantize(once, scale, qparams.zero_point, scheme)
    assert torch.equal(once, twice)
    assert torch.equal(x, kept)
    assert len(once.unique()) <= 2**scheme.bits


RANGES = [(-1.0, 3.0), (-3.0, 1.0), (0.0, 5.0), (-5.0, 0.0), (-0.01, 6.0), (-1e-3, 1e3)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_an_asymmetric_grid_covers_the_range_and_holds_zero(scheme, low, high):
    found = affine.affine_qparams(low, high, scheme)
    scale, zero_point = numerics.qparams(low, high, scheme)
    assert (found.scale, found.zero_point) == (scale, zero_point)
    assert scheme.quant_min <= found.zero_point <= scheme.quant_max
    assert np.float32(found.scale) == found.scale
    ends = torch.tensor([low, 0.0, high])
    back = affine.fake_quantize(ends, torch.tensor(scale), zero_point, scheme)
    assert back[1] == 0
    # Rounding the zero point moves the grid by half a step, and the end itself rounds.
    assert (back - ends).abs().max() <= scale * (1 + 1e-5)


@pytest.mark.parametrize(
    ("low", "high", "bits", "signed", "scale"),
    [
        (-1.0, 0.5, 8, True, 1 / 128),
        (-0.5, 1.0, 8, True, 1 / 127),
        (0.0, 15.0, 4, False, 1.0),
        (-7.0, 7.0, 4, True, 1.0),
        (-16.0, 7.0, 4, True, 2.0),
        (0.0, 6.0, 8, True, 6 / 127),
        (-9.0, 6.0, 4, False, 6 / 15),  # nothing below zero on an unsigned grid
    ],
)
def test_a_symmetric_grid_has_zero_point_zero(low, high, bits, signed, scale):
    found = affine.affine_qparams(low, high, QScheme(bits, signed, True))
    assert found.zero_point == 0
    assert found.scale == np.float32(scale)


@pytest.mark.parametrize(("low", "high"), [(2.0, 5.0), (0.0, 5.0)])
def test_a_range_without_zero_is_widened_to_it(low, high):
    scheme = QScheme(8, False, False)
    assert affine.affine_qparams(low, high, scheme) == affine.affine_qparams(0.0, high, scheme)
    assert affine.affine_qparams(-high, -low, scheme) == affine.affine_qparams(-high, 0.0, scheme)


@pytest.mark.parametrize("scheme", [*SCHEMES, QScheme(8, True, True)], ids=str)
@pytest.mark.parametrize("end", [0.0, 1e-38])
def test_an_empty_range_holds_zero(scheme, end):
    found = affine.affine_qparams(0.0, end, scheme)
    assert found.scale == 1
    zero = torch.zeros(3)
    scale = torch.tensor(found.scale)
    assert torch.equal(affine.fake_quantize(zero, scale, found.zero_point, scheme), zero)


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (0.0, math.inf), (-math.inf, 0.0)])
def test_a_range_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        affine.affine_qparams(*bad, QScheme(8, False, False))


def symmetric(scale, bits):
    """The grids of channels that use all signed codes of `bits` bits."""
    steps = torch.from_numpy(scale).float()
    return WeightGrid(steps, torch.full_like(steps, -(2 ** (bits - 1))), 2**bits)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_rounded_per_channel(axis, bits):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 4, 3, 3)).astype(np.float32)
    scale = rng.uniform(0.01, 0.2, weight.shape[axis]).astype(np.float32)
    expected, real = onnx_quantize(weight, scale, 0, ONNX_TYPES[bits, True], axis)
    found = affine.round_to_grid(torch.from_numpy(weight), symmetric(scale, bits), axis)
    assert found.codes.dtype == torch.int8
    np.testing.assert_array_equal(found.codes.numpy(), expected)
    np.testing.assert_array_equal(affine.dequantize_weight(found, axis).numpy(), real)


def test_four_bit_codes_fit_the_packed_type():
    weight = torch.linspace(-3, 3, 64).view(2, 32)
    codes = affine.round_to_grid(weight, symmetric(np.array([0.1, 0.4]), 4), 0).codes.numpy()
    assert (codes.min(), codes.max()) == (-8, 7)
    np.testing.assert_array_equal(codes.astype(ml_dtypes.int4).astype(np.int8), codes)


def test_bias_codes_are_the_nearest_integers():
    rng = np.random.default_rng(0)
    bias = rng.normal(size=50).astype(np.float32)
    scales = rng.uniform(1e-4, 1e-2, 50).astype(np.float32)
    step = (np.float32(0.05) * scales).astype(np.float32)
    codes = affine.bias_codes(torch.from_numpy(bias), 0.05, torch.from_numpy(scales))
    assert codes.dtype == torch.int32
    np.testing.assert_array_equal(codes, np.rint(bias.astype(np.float64) / step))
    found = affine.bias_scale(0.05, torch.from_numpy(scales))
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found, step)
    assert (np.abs(codes.numpy() * step.astype(np.float64) - bias) <= step / 2).all()


def test_bias_ties_go_to_even():
    codes = affine.bias_codes(torch.tensor([0.5, 1.5, -0.5, -1.5]), 1.0, torch.ones(4))
    assert codes.tolist() == [0, 2, 0, -2]


def test_a_bias_beyond_int32_is_refused():
    scale = torch.tensor([1.0])
    largest = 2.0**31 - 128  # the float32 below 2^31
    assert affine.bias_codes(torch.tensor([largest]), 1.0, scale).item() == 2**31 - 128
    for bias in (2.0**31, -(2.0**31) - 256, 1e20):
        with pytest.raises(ValueError, match="int32"):
            affine.bias_codes(torch.tensor([bias]), 1.0, scale)


def test_sqnr_in_decibels():
    reference = torch.tensor([10.0, 0.0])
    assert affine.sqnr_db(reference, torch.tensor([9.0, 0.0])) == pytest.approx(20)
    assert affine.sqnr_db(reference, torch.tensor([10.0, 0.1])) == pytest.approx(40)
    assert affine.sqnr_db(reference, reference) == math.inf
    assert affine.sqnr_db(torch.zeros(2), torch.ones(2)) < -1000
