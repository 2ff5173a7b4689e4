"""Give the inputs of a concatenation the grid of its output: a QDQ model in, the same function out.

Q of a concatenation is the concatenation of Qs with one scale. Written on every input, each layer
in front writes codes, and the concatenation moves them instead of floats.
"""

from __future__ import annotations

import onnx_ir as ir


def share_concat_grids(model: ir.Model, saturating: dict[int, tuple[float, float]]) -> None:
    """Repeat the quantizer behind a concatenation on all of its inputs, with the same scale.

    The pair behind it stays: the layer there wants it directly in front, and on values of its own
    grid it changes nothing. A clip moves to the inputs, where it can replace their ReLUs.

    Args:
        model: changed in place.
        saturating: real interval of each quantizer by the id of its first node; repeated ones are
            added.
    """
    for node in list(model.graph):
        if node.op_type != "Concat" or any(_is_constant(value) for value in node.inputs):
            continue
        found = _quantizer_behind(node)
        if found is None:
            continue
        clip, quantize = found
        interval = saturating.get(id(clip or quantize))
        repeated: dict[ir.Value, ir.Value] = {}
        for index, value in enumerate(node.inputs):
            assert value is not None
            if value not in repeated:
                repeated[value] = _repeat(model, node, value, clip, quantize)
                first = repeated[value].producer()
                assert first is not None
                if interval is not None:
                    saturating[id(_first(first, clip is not None))] = interval
            node.replace_input_with(index, repeated[value])
        if clip is not None:
            quantize.replace_input_with(0, node.outputs[0])
            model.graph.remove(clip, safe=True)


def _quantizer_behind(node: ir.Node) -> tuple[ir.Node | None, ir.Node] | None:
    """Return (clip or None, Q) if one quantizer is all that reads a concatenation."""
    if node.outputs[0].is_graph_output():
        return None
    uses = list(node.outputs[0].uses())
    if len(uses) != 1:
        return None
    reader, clip = uses[0].node, None
    if reader.op_type == "Clip" and uses[0].idx == 0 and len(list(reader.outputs[0].uses())) == 1:
        clip, (use,) = reader, reader.outputs[0].uses()
        reader = use.node
    return (clip, reader) if reader.op_type == "QuantizeLinear" else None


def _repeat(
    model: ir.Model, node: ir.Node, value: ir.Value, clip: ir.Node | None, quantize: ir.Node
) -> ir.Value:
    """Insert clip, Q and DQ on `value` in front of `node`; return what DQ writes."""
    nodes = []
    if clip is not None:
        nodes.append(ir.node("Clip", [value, *clip.inputs[1:]]))
        value = nodes[-1].outputs[0]
    nodes.append(ir.node("QuantizeLinear", [value, *quantize.inputs[1:]]))
    nodes.append(ir.node("DequantizeLinear", [nodes[-1].outputs[0], *quantize.inputs[1:]]))
    model.graph.insert_before(node, nodes)
    return nodes[-1].outputs[0]


def _first(dequantize: ir.Node, clipped: bool) -> ir.Node:
    """Return the first node of a repeated quantizer: its clip, or its Q."""
    node = dequantize
    for _ in range(2 if clipped else 1):
        value = node.inputs[0]
        producer = value.producer() if value is not None else None
        assert producer is not None
        node = producer
    return node


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or value.is_initializer() or value.producer() is None
