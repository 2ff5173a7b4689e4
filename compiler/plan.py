"""Decide, before any work, what each layer and each tensor gets: folded graph in, `Plan` out.

Layers get bits (default, ends, rules). Tensors get quantizers where the target's placement wants
them: one quantizer per tensor and bit width, never one per consumer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from torch import fx

from dfqc.compiler.graph import Graph, layer_nodes
from dfqc.compiler.operators import is_spatial_zero_pad
from dfqc.compiler.placement import place
from dfqc.compiler.spec import (
    MAX_BITS,
    OFFSET_BITS,
    Bits,
    LayerPlan,
    Plan,
    QScheme,
    Quantizer,
    Rule,
    TargetSpec,
    check_bits,
    resolve_bits,
)

FLOAT = Bits(32, 32)
IMAGE_KEPT = "reads the image, which has 8 bits by itself: not narrowed (--layer does)"
WEIGHT_ONLY = "weight-only: weights dequantized at load"
# An engine dequantizes at load for a whole file or not at all.
WEIGHT_ONLY_MIXED = "weight-only beside integer layers: weights dequantized in every call, slow"


class Choice(NamedTuple):
    """Weight bits that a budget gave a layer, and why."""

    weight: int
    reason: str


def make_plan(
    graph: Graph,
    target: TargetSpec,
    bits: Bits,
    rules: Sequence[Rule],
    *,
    ends: Bits | None,
    chosen: Mapping[str, Choice] = MappingProxyType({}),
) -> Plan:
    """Return the plan of a folded graph.

    Args:
        graph: the folded graph.
        target: what the engine accepts.
        bits: default bits of every layer.
        rules: per-layer overrides, last match wins.
        ends: bits of the first and the last layer, or None for the same bits everywhere.
        chosen: weight bits that replace those of some layers; activations keep theirs.

    Raises:
        UnsupportedError: bits that the target cannot hold.
        UsageError: a rule that matches no layer.
    """
    nodes = layer_nodes(graph)
    calls: dict[str, list[fx.Node]] = {}
    for name, node in nodes:
        calls.setdefault(name, []).append(node)
    asked = resolve_bits(calls, bits, rules, ends=ends)
    asked |= {name: Bits(pick.weight, asked[name].act) for name, pick in chosen.items()}
    for name, layer_bits in asked.items():
        check_bits(layer_bits, target, where=name)
    layers = {name: _plan_layer(graph, target, name, asked[name], calls[name]) for name in calls}
    if ends is None:
        layers |= _keep_image(layers, nodes, rules)
    for name, pick in chosen.items():
        reason = "; ".join(part for part in (pick.reason, layers[name].reason) if part)
        layers[name] = dataclasses.replace(layers[name], reason=reason)
    quantizers, inputs = place(graph, target, layers)
    return Plan(
        target.name,
        bits,
        {
            name: _finish(layer, inputs.get(layer.node), quantizers)
            for name, layer in layers.items()
        },
        quantizers,
        target.requantize,
    )


def leave_float(
    graph: Graph, target: TargetSpec, plan: Plan, names: Collection[str], reason: str
) -> Plan:
    """Return a plan in which some layers compute in float, quantizers placed anew.

    Args:
        graph: the folded graph.
        target: what the engine accepts.
        plan: of this graph and target.
        names: module paths of layers.
        reason: why, for the ledger.
    """
    layers = {
        name: dataclasses.replace(layer, exported=FLOAT, weight=None, input=None, reason=reason)
        if name in names
        else layer
        for name, layer in plan.layers.items()
    }
    quantizers, inputs = place(graph, target, layers)
    finished = {
        name: _finish(layer, inputs.get(layer.node), quantizers) for name, layer in layers.items()
    }
    return dataclasses.replace(plan, layers=finished, quantizers=quantizers)


def _keep_image(
    layers: Mapping[str, LayerPlan], nodes: Sequence[tuple[str, fx.Node]], rules: Sequence[Rule]
) -> dict[str, LayerPlan]:
    """Leave the image at 8 bits where it would be narrowed without anybody asking for it.

    The literature's k bits everywhere are those of weights and of activations; the image has 8
    bits by itself.
    """
    kept = {}
    for name, node in nodes:
        layer = layers[name]
        source = node.args[0]
        while isinstance(source, fx.Node) and is_spatial_zero_pad(source):
            source = source.args[0]
        reads_image = isinstance(source, fx.Node) and source.op == "placeholder"
        if not reads_image or layer.exported.act >= MAX_BITS:
            continue
        if any(rule.matches(name) for rule in rules):
            continue
        exported = Bits(layer.exported.weight, MAX_BITS)
        reason = "; ".join(part for part in (IMAGE_KEPT, layer.reason) if part)
        kept[name] = dataclasses.replace(layer, exported=exported, reason=reason)
    return kept


def _plan_layer(
    graph: Graph, target: TargetSpec, name: str, asked: Bits, calls: list[fx.Node]
) -> LayerPlan:
    op = type(graph.module.get_submodule(name)).__name__
    exported, reason = _export_bits(target, op, asked, len(calls))
    scheme = None
    if not exported.is_float:
        even = exported.weight > OFFSET_BITS
        scheme = QScheme(exported.weight, signed=True, symmetric=even, axis=0)
    return LayerPlan(name, calls[0].name, op, asked, exported, scheme, None, reason)


def _export_bits(target: TargetSpec, op: str, asked: Bits, calls: int) -> tuple[Bits, str]:
    """Return what the file will hold, and why it is not what was asked (or how it runs)."""
    if asked.is_float:
        return FLOAT, "left in float32 as asked"
    if op not in target.integer_ops:
        return FLOAT, f"target '{target.name}' has no integer kernel for {op}: left in float32"
    if calls > 1:
        return FLOAT, f"the module is called {calls} times with different inputs: left in float32"
    if asked.weight_only and op not in (target.weight_only_ops or target.integer_ops):
        return FLOAT, f"target '{target.name}' has no weight-only {op}: left in float"
    if asked.weight_only and target.weight_only_note:
        return Bits(asked.weight, 32), target.weight_only_note
    if asked.weight_only:
        note = "" if asked.act == FLOAT.act else "; this engine computes in float32"
        return Bits(asked.weight, 32), f"{WEIGHT_ONLY}{note}"
    if asked.weight < 8 or asked.act < 8:
        return asked, target.kernel_note
    return asked, ""


def _finish(
    layer: LayerPlan, quantizer: str | None, quantizers: Mapping[str, Quantizer]
) -> LayerPlan:
    """Add what only placement knows: the layer's input, and whether the network is mixed."""
    reason = layer.reason
    if quantizers and layer.exported.weight_only:
        reason = reason.replace(WEIGHT_ONLY, WEIGHT_ONLY_MIXED)
    return dataclasses.replace(layer, input=quantizer, reason=reason)
