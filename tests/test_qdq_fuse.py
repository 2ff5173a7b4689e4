import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from dfqc.backends._qdq_fuse import absorb_pads, drop_subsumed_activations, pool_on_integers

Q, DQ = "QuantizeLinear", "DequantizeLinear"
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 4, 7, 6)).astype(np.float32) * 4


def parse(text, **constants):
    """Build a model from ONNX's own text form; constants are added as initializers."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[n,4,7,6] x) => (float y) {{ {text} }}'
    )
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].CopyFrom(helper.make_empty_tensor_value_info("y"))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return ir.from_proto(model)


def ops(model):
    return [node.op_type for node in model.graph]


def run(model):
    return ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": IMAGES})[0]


def check(model, rewrite, expected):
    """Apply a rewrite; the ops left must be `expected`, and the function the same."""
    before = run(model)
    rewrite(model)
    assert ops(model) == expected
    np.testing.assert_allclose(run(model), before, rtol=0, atol=1e-5)


WEIGHT = RNG.normal(size=(3, 4, 3, 3)).astype(np.float32)
SPATIAL = np.array([0, 0, 1, 0, 0, 0, 2, 3])  # top 1, bottom 2, right 3


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("", [1, 0, 2, 3]),
        ("pads = [1, 1, 1, 1]", [2, 1, 3, 4]),
        ("pads = [0, 2, 1, 0]", [1, 2, 3, 3]),
    ],
)
def test_zero_pads_add_up_in_the_convolution(attributes, expected):
    text = (
        f"p = Pad(x, pads)  y = Conv<{attributes}>(p, w)"
        if attributes
        else ("p = Pad(x, pads)  y = Conv(p, w)")
    )
    model = parse(text, pads=SPATIAL, w=WEIGHT)
    check(model, absorb_pads, ["Conv"])
    assert list(model.graph[0].attributes["pads"].as_ints()) == expected


@pytest.mark.parametrize(
    ("text", "constants"),
    [
        ("p = Pad(x, pads, v)  y = Conv(p, w)", {"v": np.float32(0)}),
        ('p = Pad<mode = "constant">(x, pads)  y = Conv(p, w)', {}),
        ("p = Pad(x, pads)  a = Conv(p, w)  b = Conv(p, w)  y = Add(a, b)", {}),
    ],
)
def test_other_spellings_of_a_zero_pad_are_absorbed(text, constants):
    model = parse(text, pads=SPATIAL, w=WEIGHT, **constants)
    check(model, absorb_pads, [op for op in ops(model) if op != "Pad"])


@pytest.mark.parametrize(
    ("text", "constants"),
    [
        ('p = Pad<mode = "reflect">(x, pads)  y = Conv(p, w)', {}),
        ('p = Pad<mode = "edge">(x, pads)  y = Conv(p, w)', {}),
        ("p = Pad(x, pads, v)  y = Conv(p, w)", {"v": np.float32(0.5)}),
        ("p = Pad(x, pads)  y = Conv(p, w)", {"pads": np.array([0, 1, 0, 0, 0, 1, 0, 0])}),
        ("p = Pad(x, pads)  y = MaxPool<kernel_shape = [2, 2]>(p)", {}),
        ("p = Pad(x, pads)  a = Conv(p, w)  b = Relu(p)  c = ReduceSum(b)  y = Add(a, c)", {}),
        ("p = Pad(x, pads)  y = Identity(p)", {}),
        ("y = Pad(x, pads)  z = Conv(y, w)", {}),
        ("p = Pad(w, pads)  y = Conv(x, p)", {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
    ],
    ids=["reflect", "edge", "halves", "channels", "pool", "two", "nobody", "output", "weight"],
)
def test_other_pads_stay(text, constants):
    values = {"pads": SPATIAL, "w": WEIGHT, **constants}
    if "[0, 1" in str(values["pads"]) or values["pads"][1]:
        values["w"] = RNG.normal(size=(3, 6, 3, 3)).astype(np.float32)
    model = parse(text, **values)
    check(model, absorb_pads, ops(model))


def test_a_crop_stays():  # the evaluator cannot run it
    model = parse("p = Pad(x, pads)  y = Conv(p, w)", pads=-SPATIAL, w=WEIGHT)
    absorb_pads(model)
    assert ops(model) == ["Pad", "Conv"]


def quantizer(text, *, scale=0.05, zero_point=0, clip=None):
    """Put a quantizer on `a`; return the model and the interval its Q node covers."""
    code = np.uint8
    model = parse(
        f"{text} q = QuantizeLinear(a, s, z)  y = DequantizeLinear(q, s, z)",
        s=np.float32(scale),
        z=code(zero_point),
        zero=np.float32(0),
        six=np.float32(6),
        one=np.float32(1),
    )
    q = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    span = ((0 - zero_point) * scale, (255 - zero_point) * scale)
    return model, {id(q): clip or span}


def drop(model, saturating):
    check(
        model,
        lambda m: drop_subsumed_activations(m, saturating),
        [Q, DQ],
    )


def keep(model, saturating):
    check(model, lambda m: drop_subsumed_activations(m, saturating), ops(model))


def test_relu_before_an_unsigned_quantizer_is_dropped():
    drop(*quantizer("a = Relu(x)"))


@pytest.mark.parametrize("scale", [6 / 255, 0.01])
def test_relu6_before_a_quantizer_that_ends_at_six_or_below_is_dropped(scale):
    drop(*quantizer("a = Clip(x, zero, six)", scale=float(np.float32(scale))))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("a = Relu(x)", {"zero_point": 3}),  # reaches below zero
        ("a = Clip(x, zero, six)", {"scale": 0.03}),  # reaches above six
        ("a = Clip(x, one, six)", {"scale": 6 / 255}),  # reaches below one
        ("a = Clip(x, zero)", {}),
        ("a = Sigmoid(x)", {}),
        ("b = Relu(x)  a = Neg(b)", {}),
    ],
)
def test_an_activation_that_a_quantizer_does_not_repeat_stays(text, options):
    keep(*quantizer(text, **options))


def test_an_activation_with_a_second_reader_stays():
    model = parse(
        "a = Relu(x)  q = QuantizeLinear(a, s, z)  d = DequantizeLinear(q, s, z)  y = Add(a, d)",
        s=np.float32(0.05),
        z=np.uint8(0),
    )
    q = model.graph[1]
    keep(model, {id(q): (0.0, 12.75)})


def test_an_activation_that_is_the_output_stays():
    model = parse(
        "y = Relu(x)  q = QuantizeLinear(y, s, z)  d = DequantizeLinear(q, s, z)",
        s=np.float32(0.05),
        z=np.uint8(0),
    )
    keep(model, {id(model.graph[1]): (0.0, 12.75)})


POOL = "d = DequantizeLinear(c, s, z)  m = ReduceMean<keepdims = {keep}>(d, axes)"
TAIL = "e = QuantizeLinear(m, t, z)  y = DequantizeLinear(e, t, z)"


def pooled(text, **constants):
    values = {"s": np.float32(0.1), "t": np.float32(0.02), "z": np.uint8(100)}
    values |= {"axes": np.array([2, 3]), "low": np.uint8(90), "high": np.uint8(110)}
    return parse(f"c = QuantizeLinear(x, s, z)  {text}", **values | constants)


def test_a_mean_becomes_a_pool_and_flattens_codes():
    model = pooled(POOL.format(keep=0) + TAIL)
    shape = run(model).shape
    check(
        model,
        pool_on_integers,
        [Q, DQ, "GlobalAveragePool", Q, "Flatten", DQ],
    )
    assert run(model).shape == shape == (2, 4)


def test_a_narrow_mean_is_flattened_behind_its_clip():
    tail = "e = QuantizeLinear(m, t, z)  f = Clip(e, low, high)  y = DequantizeLinear(f, t, z)"
    model = pooled(POOL.format(keep=0) + tail, axes=np.array([-1, -2]))
    check(
        model,
        pool_on_integers,
        [Q, DQ, "GlobalAveragePool", Q, "Clip", "Flatten", DQ],
    )


def test_a_mean_that_keeps_its_dimensions_needs_no_flatten():
    model = pooled(POOL.format(keep=1) + TAIL)
    check(
        model,
        pool_on_integers,
        [Q, DQ, "GlobalAveragePool", Q, DQ],
    )
    assert run(model).shape == (2, 4, 1, 1)


@pytest.mark.parametrize(
    ("text", "constants"),
    [
        (POOL.format(keep=0) + TAIL, {"axes": np.array([3])}),
        (POOL.format(keep=0) + TAIL, {"axes": np.array([1, 2, 3])}),
        (POOL.format(keep=0) + "y = Relu(m)", {}),  # read as float
        ("m = ReduceMean<keepdims = 0>(x, axes)" + TAIL, {}),  # reads float
        (POOL.format(keep=0).replace("m =", "y =") + "e = QuantizeLinear(y, t, z)", {}),
        (
            POOL.format(keep=0) + "e = QuantizeLinear(m, t, z)  f = DequantizeLinear(e, t, z)"
            "  y = Add(f, m)",
            {},
        ),
    ],
    ids=["width", "channels", "float reader", "float source", "output", "two readers"],
)
def test_other_means_stay(text, constants):
    model = pooled(text, **constants)
    check(model, pool_on_integers, ops(model))
