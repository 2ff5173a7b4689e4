"""Every documented rule: the file as written holds it, a file with one thing broken does not."""

import numpy as np
import pytest
from onnx import TensorProto, helper

import quantized
import trt_files as files
from dfqc.backends import _trt_rules, trt
from dfqc.backends._trt_rules import RULES

BROKEN = {}


def breaks(rule, node, mend, *, bits="w8a8"):
    """Register a way to break `rule`; `node` and `mend` must be in the message."""

    def register(function):
        BROKEN[rule] = (function, node, mend, bits)
        return function

    return register


@pytest.mark.parametrize(
    ("bits", "base"),
    [("w8a8", "fp32"), ("w8a8", "fp16"), ("w4a4", "fp32"), ("w4a16", "fp16"), ("w32a32", "fp32")],
)
def test_what_is_written_breaks_no_rule(bits, base):
    assert [str(f) for f in _trt_rules.check(files.good(bits, base=base))] == []


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_broken_rule_is_found(rule):
    function, node, mend, bits = BROKEN[rule.name]
    model = files.good(bits)
    assert _trt_rules.check(model, [rule]) == []
    function(model)
    found = _trt_rules.check(model)
    mine = [f for f in found if f.rule == rule.name]
    assert mine, [str(f) for f in found]
    assert node in mine[0].node
    assert mend in mine[0].mend
    assert mine[0].severity == rule.severity
    assert all(part in str(mine[0]) for part in (mine[0].node, mine[0].message, rule.name))


def test_rules_have_names_evidence_and_a_test():
    assert len({rule.name for rule in RULES}) == len(RULES) > 30
    assert all(rule.evidence for rule in RULES)
    assert set(BROKEN) == {rule.name for rule in RULES}


@pytest.mark.parametrize("net", ["depthwise", "concat", "transposed", "attention"])
def test_structures_hold_the_rules(net):
    graph = quantized.folded(net)
    state = quantized.quantize(graph, quantized.plan(graph, "w4a4", target=trt.TARGET))
    model = files.onnx.ModelProto.FromString(trt.lower(graph, state, metadata={}).model)
    assert [str(f) for f in _trt_rules.check(model)] == []


def test_an_onnx_runtime_file_is_refused(tmp_path):
    """The other target's file breaks what it must: unsigned codes, zero points, int32 biases."""
    path = tmp_path / "model.onnx"
    path.write_bytes(quantized.lowered("residual", "w4a4").lowered.model)
    rules = {row["rule"] for row in trt.check(path) if row["severity"] == "error"}
    assert {"uint8-codes", "int32-bias", "int4-reader", "integer-clip"} <= rules


# --- the file as a whole


@breaks("opset", "model", "opset_version=21")
def newer_opset(model):
    model.opset_import[0].version = 25


@breaks("domain", "joined", "ONNX operators")
def other_domain(model):
    files.named(model, "joined").domain = "com.microsoft"


@breaks("io-float32", "input", "Cast")
def half_input(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


# --- codes


@breaks("uint8-codes", "QuantizeLinear", "int8")
def unsigned_codes(model):
    files.reread(files.input_q(model, "inner"), 2, files.constant(model, np.uint8(0)))


@breaks("code-type", "QuantizeLinear", "int8")
def wide_codes(model):
    files.reread(files.input_q(model, "inner"), 2, files.constant(model, np.int16(0)))


@breaks("int32-bias", "DequantizeLinear 'b'", "store the bias as float")
def integer_bias(model):
    layer = files.named(model, "inner")
    codes = files.constant(model, np.zeros(8, np.int32), "b.codes")
    scale = files.constant(model, np.ones(8, np.float32), "b.scale")
    node = helper.make_node("DequantizeLinear", [codes, scale], ["b"], axis=0)
    files.insert(model, layer, node)
    files.reread(layer, 2, "b")


@breaks("float-bias", "inner", "store the bias as float")
def integer_bias_again(model):
    integer_bias(model)


@breaks("zero-point-present", "QuantizeLinear", "int8 zero point of 0")
def no_zero_point(model):
    del files.input_q(model, "inner").input[2]


@breaks("zero-point-constant", "QuantizeLinear", "initializer of zeros")
def computed_zero_point(model):
    node = files.input_q(model, "inner")
    source = files.constant(model, np.float32(0))
    files.insert(model, node, helper.make_node("Cast", [source], ["zp"], to=TensorProto.INT8))
    files.reread(node, 2, "zp")


@breaks("zero-point-zero", "QuantizeLinear", "symmetrically")
def shifted_grid(model):
    files.reread(files.input_q(model, "inner"), 2, files.constant(model, np.int8(-3)))


@breaks("zero-point-volume", "DequantizeLinear", "shape of the scale")
def one_zero_point_for_many_scales(model):
    node = files.weight_dq(model, "inner")
    zero = files.constant(model, np.int8(0))
    node.input.append(zero) if len(node.input) == 2 else files.reread(node, 2, zero)


@breaks("scale-constant", "QuantizeLinear", "fix the grid")
def dynamic_scale(model):
    node = files.input_q(model, "inner")
    files.insert(model, node, helper.make_node("Identity", [node.input[1]], ["dynamic"]))
    files.reread(node, 1, "dynamic")


@breaks("scale-positive", "DequantizeLinear", "smallest positive scale")
def dead_channel(model):
    name = files.weight_dq(model, "inner").input[1]
    scale = files.array(model, name).copy()
    scale[3] = 0
    files.replace(model, name, scale)


@breaks("scale-type", "QuantizeLinear", "computes in")
def double_scale(model):
    files.reread(files.input_q(model, "inner"), 1, files.constant(model, np.float64(0.1)))


@breaks("scale-range", "QuantizeLinear", "--trt-base fp32")
def huge_half_scale(model):
    files.reread(files.input_q(model, "inner"), 1, files.constant(model, np.float16(1000)))


@breaks("activation-per-tensor", "QuantizeLinear", "per tensor")
def scale_per_channel(model):
    name = files.constant(model, np.full(8, 0.1, np.float32))
    files.reread(files.input_q(model, "inner"), 1, name)


@breaks("weight-axis", "inner", "per output channel")
def scale_per_input_channel(model):
    node = files.weight_dq(model, "inner")
    next(a for a in node.attribute if a.name == "axis").i = 1


@breaks("block-shape", "DequantizeLinear", "input dimension", bits="w4a16")
def scale_of_another_block(model):
    node = files.weight_dq(model, "head")
    next(a for a in node.attribute if a.name == "block_size").i = 16


@breaks("int4-even", "odd", "int8 codes", bits="w4a16")
def odd_int4(model):
    files.constant(model, files.packed(TensorProto.INT4, [3, 3]), "odd")


@breaks("int4-last-even", "odd", "newer TensorRT", bits="w4a16")
def odd_rows(model):
    files.constant(model, files.packed(TensorProto.INT4, [4, 3]), "odd")


@breaks("int4-reader", "Cast 'wide'", "int8")
def cast_int4(model):
    node = files.weight_dq(model, "inner")
    shape = list(files.array(model, node.input[0]).shape)
    packed = files.constant(model, files.packed(TensorProto.INT4, shape))
    files.insert(model, node, helper.make_node("Cast", [packed], ["wide"], to=TensorProto.INT8))
    files.reread(node, 0, "wide")


@breaks("int4-activation", "QuantizeLinear", "float Clip")
def narrow_codes(model):
    zero = files.constant(model, files.packed(TensorProto.INT4, []))
    files.reread(files.input_q(model, "inner"), 2, zero)


@breaks("int4-conv", "inner", "int8")
def narrow_convolution(model):
    name = files.weight_dq(model, "inner").input[0]
    files.replace(model, name, files.packed(TensorProto.INT4, list(files.array(model, name).shape)))


@breaks("int4-weight-only", "head", "w4a16")
def narrow_product(model):
    name = files.weight_dq(model, "head").input[0]
    files.replace(model, name, files.packed(TensorProto.INT4, list(files.array(model, name).shape)))


# --- placement


@breaks("one-float-type", "inner", "same type")
def half_weight_scale(model):
    name = files.weight_dq(model, "inner").input[1]
    files.replace(model, name, files.array(model, name).astype(np.float16))


@breaks("codes-read-by-dq", "QuantizeLinear", "directly behind")
def codes_through_another_node(model):
    node = files.input_dq(model, "inner")
    files.insert(model, node, helper.make_node("Identity", [node.input[0]], ["moved"]))
    files.reread(node, 0, "moved")


@breaks("dq-reads-q", "DequantizeLinear", "directly behind")
def codes_from_outside(model):
    node = files.input_dq(model, "stem")
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    files.reread(node, 0, "input")


@breaks("pair-agrees", "DequantizeLinear", "same scale")
def two_scales(model):
    files.reread(files.input_dq(model, "inner"), 1, files.constant(model, np.float32(7)))


@breaks("requantized", "QuantizeLinear 'extra.q'", "float tensor")
def quantize_twice(model):
    layer = files.named(model, "inner")
    files.insert(model, layer, *files.pair(model, layer.input[0]))
    files.reread(layer, 0, "extra")


@breaks("output-float", "DequantizeLinear 'output'", "drop this Q/DQ pair")
def quantized_output(model):
    files.named(model, "head").output[0] = "logits"
    model.graph.node.extend(files.pair(model, "logits", name="output"))


@breaks("integer-clip", "Clip 'clipped'", "float in front of Q")
def clip_codes(model):
    node = files.input_dq(model, "inner")
    ends = [files.constant(model, np.int8(v), f"end{v}") for v in (0, 15)]
    files.insert(model, node, helper.make_node("Clip", [node.input[0], *ends], ["clipped"]))
    files.reread(node, 0, "clipped")


@breaks("clip-replaces-relu", "Clip", "drop the Relu", bits="w4a4")
def relu_and_clip(model):
    clip = files.producer(model, files.input_q(model, "outer").input[0])
    files.insert(model, clip, helper.make_node("Relu", [clip.input[0]], ["again"]))
    files.reread(clip, 0, "again")


@breaks("both-quantized", "inner", "quantize the weight")
def float_weight(model):
    weight = files.constant(model, np.ones((8, 8, 3, 3), np.float32))
    files.reread(files.named(model, "inner"), 1, weight)


@breaks("residual-add", "Add", "between convolution and add")
def quantize_the_convolution_too(model):
    (node,) = (n for n in model.graph.node if n.op_type == "Add")
    index = list(node.input).index(files.named(model, "outer").output[0])
    files.insert(model, node, *files.pair(model, node.input[index]))
    files.reread(node, index, "extra")


@breaks("residual-skip", "Add", "8 bits")
def bare_skip(model):
    (node,) = (n for n in model.graph.node if n.op_type == "Add")
    index = 1 - list(node.input).index(files.named(model, "outer").output[0])
    pair = files.producer(model, node.input[index])
    files.reread(node, index, files.producer(model, pair.input[0]).input[0])


@breaks("concat-scale", "Concat", "every input")
def one_scale_of_its_own(model):
    (node,) = (n for n in model.graph.node if n.op_type == "Concat")
    dequantize = files.producer(model, node.input[0])
    scale = files.constant(model, np.float32(0.5))
    for part in (dequantize, files.producer(model, dequantize.input[0])):
        files.reread(part, 1, scale)


@breaks("pad-conv", "Pad 'padded'", "convolution's own")
def pad_in_front_of_q(model):
    node = files.input_q(model, "joined")
    pads = files.constant(model, np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    files.insert(model, node, helper.make_node("Pad", [node.input[0], pads], ["padded"]))
    files.reread(node, 0, "padded")


def test_a_pad_between_dq_and_convolution_is_found():
    model = files.good()
    layer = files.named(model, "joined")
    pads = files.constant(model, np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    files.insert(model, layer, helper.make_node("Pad", [layer.input[0], pads], ["padded"]))
    files.reread(layer, 0, "padded")
    assert "pad-conv" in {f.rule for f in _trt_rules.check(model)}


def test_a_pair_on_the_convolution_instead_of_the_skip_is_found():
    model = files.good()
    quantize_the_convolution_too(model)
    bare_skip_again = next(n for n in model.graph.node if n.op_type == "Add")
    index = 1 - list(bare_skip_again.input).index("extra")
    pair = files.producer(model, bare_skip_again.input[index])
    files.reread(bare_skip_again, index, files.producer(model, pair.input[0]).input[0])
    (found,) = (f for f in _trt_rules.check(model) if f.rule == "residual-add")
    assert "move it to the other input" in found.mend


def test_a_convolution_with_quantized_weights_alone_is_found():
    model = files.good()
    layer = files.named(model, "inner")
    files.reread(layer, 0, files.input_q(model, "inner").input[0])
    (found,) = (f for f in _trt_rules.check(model) if f.rule == "both-quantized")
    assert (found.node, "leave the weight in float" in found.mend) == ("inner", True)
