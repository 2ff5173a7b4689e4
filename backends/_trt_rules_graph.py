"""Rules on the file as a whole: opset, domains, types at its ends."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from dfqc.backends._trt_view import Fault, View, type_name

OPSETS = range(19, 22)
MAX_IR = 10
_DOMAINS = ("", "ai.onnx")


def opset(view: View) -> Iterator[Fault]:
    """Opset 19 to 21 (float16 scales from 19, INT4 from 21), IR version up to 10."""
    for entry in view.model.opset_import:
        if entry.domain in _DOMAINS and entry.version not in OPSETS:
            yield Fault(
                "model",
                f"got opset {entry.version}, expected {OPSETS[0]} to {OPSETS[-1]}",
                "export with opset_version=21",
            )
    if view.model.ir_version > MAX_IR:
        yield Fault(
            "model",
            f"got IR version {view.model.ir_version}, expected at most {MAX_IR}",
            f"set model.ir_version = {MAX_IR}",
        )


def domain(view: View) -> Iterator[Fault]:
    """Operators of ONNX only."""
    for node in view.nodes:
        if node.domain not in _DOMAINS:
            yield Fault(
                view.label(node),
                f"got operator {node.domain}::{node.op_type}, expected one of ONNX's own",
                "write it with ONNX operators, or bring the plug-in and build with trtexec",
            )


def io_types(view: View) -> Iterator[Fault]:
    """Float32 at the ends, whatever the middle computes in."""
    for value in (*view.model.graph.input, *view.model.graph.output):
        kind = int(value.type.tensor_type.elem_type)
        if kind != TensorProto.FLOAT:
            yield Fault(
                value.name,
                f"got {type_name(kind)} at an end of the model, expected float",
                "put a Cast behind the input or in front of the output",
            )
