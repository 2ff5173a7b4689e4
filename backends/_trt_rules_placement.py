"""Rules on where Q and DQ stand: pairs, layers, residual adds, concats, pads and clips."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from dfqc.backends._trt_view import (
    CONVOLUTIONS,
    LAYERS,
    Fault,
    View,
    has_input,
    type_name,
)

_DQ = "DequantizeLinear"
_CLIP_MEND = "clip in float in front of Q"


def float_bias(view: View) -> Iterator[Fault]:
    """A bias is a float constant, not dequantized."""
    for layer in view.of("Conv", "ConvTranspose", "Gemm"):
        if has_input(layer, 2) and view.dequantize(layer.input[2]) is not None:
            yield Fault(
                view.label(layer),
                "its bias comes from DequantizeLinear, expected a float constant",
                "store the bias as float, on the grid of input scale times weight scale",
            )


def one_float_type(view: View) -> Iterator[Fault]:
    """Everything that a layer reads has one floating-point type."""
    for layer in view.of(*LAYERS):
        kinds = [view.type_of(name) for name in layer.input if name]
        if len(set(kinds) - {0}) > 1:
            got = ", ".join(type_name(kind) for kind in kinds)
            yield Fault(
                view.label(layer),
                f"its inputs have types {got}, expected one: strongly typed networks do not cast",
                "give activation scales, weight scales and bias the same type",
            )


def codes_read_by_dq(view: View) -> Iterator[Fault]:
    """Codes go nowhere but into DQ."""
    for node in view.of("QuantizeLinear"):
        others = [n for n in view.readers.get(node.output[0], ()) if n.op_type != _DQ]
        others = [n for n in others if n.op_type != "Clip"]  # has a rule of its own
        if others or node.output[0] in view.outputs or node.output[0] not in view.readers:
            got = ", ".join(view.label(n) for n in others) or "an output of the model or nobody"
            yield Fault(
                view.label(node),
                f"its codes are read by {got}, expected {_DQ}",
                "put the DequantizeLinear directly behind the QuantizeLinear",
            )


def dq_reads_q(view: View) -> Iterator[Fault]:
    """A DQ reads a constant or a Q."""
    for node in view.of(_DQ):
        made = view.producer.get(node.input[0])
        if view.is_weight(node) or (made is not None and made.op_type == "QuantizeLinear"):
            continue
        if made is not None and made.op_type == "Clip":
            continue  # has a rule of its own
        got = "an input of the model" if made is None else view.label(made)
        yield Fault(
            view.label(node),
            f"it dequantizes {got}, expected a QuantizeLinear or a constant",
            "put the DequantizeLinear directly behind its QuantizeLinear",
        )


def pair_agrees(view: View) -> Iterator[Fault]:
    """Q and DQ of a pair have one scale."""
    for node in view.of(_DQ):
        made = view.quantize(node.output[0])
        if made is None:
            continue
        ours, theirs = view.array(node.input[1]), view.array(made.input[1])
        if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
            yield Fault(
                view.label(node),
                f"its scale {float(ours.max()):g} is not that of {view.label(made)}, "
                f"{float(theirs.max()):g}",
                "give both the same scale: no kernel rescales between them",
            )


def requantized(view: View) -> Iterator[Fault]:
    """A Q does not read a DQ: that is a kernel of its own, between two layers."""
    for node in view.of("QuantizeLinear"):
        before = view.dequantize(view.unclipped(node.input[0]))
        if before is not None and not view.is_weight(node):
            yield Fault(
                view.label(node),
                f"it quantizes again what {view.label(before)} has dequantized",
                "let it read the float tensor that the first QuantizeLinear reads",
            )


def output_float(view: View) -> Iterator[Fault]:
    """Outputs are not quantized."""
    for name in view.outputs:
        node = view.dequantize(name)
        if node is not None:
            yield Fault(
                view.label(node),
                f"the output {name!r} of the model is quantized",
                "leave outputs in float: drop this Q/DQ pair",
            )


def integer_clip(view: View) -> Iterator[Fault]:
    """A grid below 8 bits is kept by a float Clip before Q."""
    for node in view.of("Clip"):
        kind = view.type_of(node.input[0])
        if kind in (TensorProto.INT8, TensorProto.UINT8):
            yield Fault(view.label(node), f"it clips {type_name(kind)} codes", _CLIP_MEND)


def clip_behind_relu(view: View) -> Iterator[Fault]:
    """The Clip of a quantizer that starts at zero replaces the ReLU."""
    for node in view.of("Clip"):
        before = view.producer.get(node.input[0])
        low = view.array(node.input[1]) if has_input(node, 1) else None
        if before is None or before.op_type != "Relu" or low is None or float(low.max()) < 0:
            continue
        quantizes = [n.op_type for n in view.readers.get(node.output[0], ())] == ["QuantizeLinear"]
        if quantizes and len(view.readers[node.input[0]]) == 1:
            yield Fault(
                view.label(node),
                f"it repeats {view.label(before)}: two activations behind one layer do not fuse",
                "drop the Relu: the Clip starts at zero",
            )


def both_quantized(view: View) -> Iterator[Fault]:
    """Input and weight of a convolution are both quantized or both float; GEMM likewise.

    A GEMM may have quantized weights alone (weight-only).
    """
    for layer in view.of(*LAYERS):
        data = view.dequantize(layer.input[0])
        weight = view.dequantize(layer.input[1])
        if data is not None and weight is None and view.array(layer.input[1]) is not None:
            yield Fault(
                view.label(layer),
                "its input is quantized and its weight is float: it computes in float",
                "quantize the weight, or drop the Q/DQ pair in front",
            )
        if weight is not None and data is None and layer.op_type in CONVOLUTIONS:
            yield Fault(
                view.label(layer),
                "its weight is quantized and its input is float: there is no such convolution",
                "quantize the input too, or leave the weight in float",
            )


def residual_add(view: View) -> Iterator[Fault]:
    """The branch that a convolution writes is bare, so that the add fuses into it."""
    for node, pairs, behind in _adds(view):
        bare = [i for i in (0, 1) if pairs[i] is None]
        if len(bare) == 0 and any(behind):
            yield Fault(
                view.label(node),
                "both branches are quantized, expected the convolution's bare",
                "drop the Q/DQ pair between convolution and add",
            )
        if len(bare) == 1 and behind[1 - bare[0]] and not behind[bare[0]]:
            yield Fault(
                view.label(node),
                "the Q/DQ pair is on the convolution's branch, expected on the skip",
                "move it to the other input of the add",
            )


def residual_skip(view: View) -> Iterator[Fault]:
    """Beside a bare INT8 convolution the skip is quantized: else it is read in float."""
    for node, pairs, behind in _adds(view):
        if pairs != [None, None] or not any(behind):
            continue
        layers = [view.producer[node.input[i]] for i in (0, 1) if behind[i]]
        if any(view.dequantize(layer.input[0]) is not None for layer in layers):
            yield Fault(
                view.label(node),
                "the skip branch is float beside an INT8 convolution",
                "quantize the branch that no convolution writes, with 8 bits",
            )


def concat_scale(view: View) -> Iterator[Fault]:
    """All inputs of a concatenation have one scale, or none is quantized."""
    for node in view.of("Concat"):
        pairs = [view.dequantize(name) for name in node.input]
        if all(pair is None for pair in pairs):
            continue
        scales = [None if pair is None else view.array(pair.input[1]) for pair in pairs]
        texts = ["float" if scale is None else f"{float(scale.max()):.9g}" for scale in scales]
        if len(set(texts)) > 1:
            yield Fault(
                view.label(node),
                f"its inputs have scales {', '.join(texts)}, expected one for all",
                "quantize every input with the scale of the concatenation's output",
            )


def pad_conv(view: View) -> Iterator[Fault]:
    """A zero pad belongs into the convolution: no pair between them, no pad between pair and it."""
    for node in view.of("Pad"):
        if not _zero_pad(view, node):
            continue
        readers = view.readers.get(node.output[0], [])
        mend = "add the pads to the convolution's own"
        if readers and all(n.op_type == "Conv" for n in readers):
            if view.dequantize(node.input[0]) is not None:
                text = f"it stands between DequantizeLinear and {view.label(readers[0])}"
                yield Fault(view.label(node), text, mend)
            continue
        if [n.op_type for n in readers] != ["QuantizeLinear"]:
            continue
        pairs = view.readers.get(readers[0].output[0], [])
        behind = [n for pair in pairs for n in view.readers.get(pair.output[0], ())]
        if behind and all(n.op_type == "Conv" for n in behind):
            text = f"a Q/DQ pair stands between it and {view.label(behind[0])}"
            yield Fault(view.label(node), text, f"{mend}, and quantize what the pad reads")


def _adds(view: View) -> Iterator[tuple[NodeProto, list[NodeProto | None], list[bool]]]:
    """Yield adds of two computed tensors: the pairs on their inputs, and who a convolution wrote.

    A pair on an input is looked through: what counts is what it quantizes.
    """
    for node in view.of("Add"):
        if len(node.input) != 2 or any(view.array(name) is not None for name in node.input):
            continue
        pairs = [view.dequantize(name) for name in node.input]
        made = []
        for name in node.input:
            quantize = view.quantize(name)
            source = name if quantize is None else view.unclipped(quantize.input[0])
            made.append(view.producer.get(source))
        yield node, pairs, [m is not None and m.op_type in CONVOLUTIONS for m in made]


def _zero_pad(view: View, node: NodeProto) -> bool:
    """Report whether a pad adds zeros to height and width: what a convolution can do itself."""
    modes = [a.s for a in node.attribute if a.name == "mode"]
    pads = view.array(node.input[1])
    value = view.array(node.input[2]) if has_input(node, 2) else None
    if modes not in ([], [b"constant"]) or pads is None or pads.size != 8 or has_input(node, 3):
        return False
    if value is not None and float(value.reshape(-1)[0]) != 0:
        return False
    return bool((pads >= 0).all() and not pads[[0, 1, 4, 5]].any())
