"""TensorRT's documented rules for an explicit Q/DQ file: an ONNX model in, findings out.

It runs on any machine: neither TensorRT nor torch is imported. Each rule is one function over a
`View` with its evidence beside it; `RULES` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from dfqc.backends import _trt_rules_codes as codes
from dfqc.backends import _trt_rules_graph as graph
from dfqc.backends import _trt_rules_int4 as int4
from dfqc.backends import _trt_rules_placement as placement
from dfqc.backends._trt_view import Fault, View

_PARSER = "onnx-tensorrt parser source"
_HEADER = "NvInfer.h, IQuantizeLayer and IDequantizeLayer"
_GUIDE = "TensorRT developer guide, explicit quantization"


@dataclass(frozen=True)
class Rule:
    """A documented rule: `check` yields the nodes that break it.

    `error`: TensorRT refuses the file, computes something else, or leaves INT8 kernels. `warning`:
    some versions do.
    """

    name: str
    evidence: str
    check: Callable[[View], Iterator[Fault]]
    severity: str = "error"


@dataclass(frozen=True)
class Finding:
    """A broken rule: where, what was got and what was expected, and what mends it."""

    rule: str
    node: str
    message: str
    mend: str
    severity: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.node}: {self.message}; {self.mend} [{self.rule}]"


RULES: tuple[Rule, ...] = (
    Rule("opset", "INT4 from opset 21; newer opsets outrun the parsers of 10.x", graph.opset),
    Rule("domain", f"{_PARSER}: other domains are plug-ins", graph.domain),
    Rule("io-float32", "the file's contract: engines read and write float32", graph.io_types),
    Rule("uint8-codes", f"{_PARSER}: checkNotInvalidType(UINT8)", codes.uint8_codes),
    Rule("code-type", f"{_HEADER}: INT8, and INT4 for weights", codes.code_type),
    Rule("int32-bias", f"{_PARSER}: DequantizeLinear of int32 is refused", codes.int32_codes),
    Rule("zero-point-present", "ONNX: without one the codes are uint8", codes.missing_zero_point),
    Rule("zero-point-constant", f"{_HEADER}: a build-time constant", codes.computed_zero_point),
    Rule("zero-point-zero", f"{_PARSER}: only symmetric quantization", codes.nonzero_zero_point),
    Rule("zero-point-volume", f"{_HEADER}: as many as scales", codes.zero_point_volume),
    Rule("scale-constant", f"{_HEADER}: a build-time constant", codes.computed_scale),
    Rule("scale-positive", f"{_PARSER}: strictly positive scales", codes.scale_positive),
    Rule("scale-type", f"{_HEADER}: float32, float16 or bfloat16", codes.scale_type),
    Rule("scale-range", "float16 ends at 65504", codes.scale_range),
    Rule("activation-per-tensor", f"{_GUIDE}: per tensor only", codes.activation_per_tensor),
    Rule("weight-axis", f"{_GUIDE}: weights per output channel", codes.weight_axis),
    Rule("block-shape", f"{_HEADER}: one blocked dimension, of the last two", codes.block_shape),
    Rule("int4-even", f"{_PARSER}: two to a byte", int4.int4_even),
    Rule("int4-last-even", f"{_PARSER} of 10.1", int4.int4_last_even, "warning"),
    Rule("int4-reader", f"{_HEADER}: INT4 is read by dequantization alone", int4.int4_reader),
    Rule("int4-activation", f"{_GUIDE}: INT4 is weight-only", int4.int4_activation),
    Rule("int4-conv", "Model-Optimizer #178: no INT4 convolution", int4.int4_conv),
    Rule("int4-weight-only", f"{_GUIDE}: float math behind INT4", int4.int4_beside_codes),
    Rule("float-bias", "IConvolutionLayer: bias of the type of the math", placement.float_bias),
    Rule("one-float-type", "strongly typed networks do not cast", placement.one_float_type),
    Rule("codes-read-by-dq", f"{_GUIDE}: Q and DQ in pairs", placement.codes_read_by_dq),
    Rule("dq-reads-q", f"{_GUIDE}: Q and DQ in pairs", placement.dq_reads_q),
    Rule("pair-agrees", f"{_GUIDE}: a pair has one scale", placement.pair_agrees),
    Rule("requantized", f"{_GUIDE}: no Q behind DQ", placement.requantized),
    Rule("output-float", "Model-Optimizer #41: no Q/DQ on outputs", placement.output_float),
    Rule("integer-clip", "Clip takes floats: it stands before Q", placement.integer_clip),
    Rule("clip-replaces-relu", "one activation fuses into a layer", placement.clip_behind_relu),
    Rule("both-quantized", f"{_GUIDE}: all inputs of a weighted layer", placement.both_quantized),
    Rule("residual-add", "modelopt: conv branch bare", placement.residual_add),
    Rule("residual-skip", f"{_GUIDE}: quantize the skip", placement.residual_skip, "warning"),
    Rule("concat-scale", f"{_GUIDE}: one scale for all inputs", placement.concat_scale),
    Rule("pad-conv", "NVIDIA/TensorRT #2592", placement.pad_conv),
)


def check(model: ModelProto, rules: Sequence[Rule] = RULES) -> list[Finding]:
    """Return every place where a rule is broken, in the order of the rules."""
    view = View(model)
    return [
        Finding(rule.name, fault.node, fault.message, fault.mend, rule.severity)
        for rule in rules
        for fault in rule.check(view)
    ]
