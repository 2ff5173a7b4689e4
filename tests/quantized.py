"""Tiny networks on their way through the quantization core, each step made once per test run."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import math
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

import models
from dfqc.backends import _qdq, ort
from dfqc.compiler.contracts import CalibSet, Lowered, QuantizerSupplies, QuantState, Runner
from dfqc.compiler.graph import Graph
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.plan import make_plan
from dfqc.compiler.quantize import rtn
from dfqc.compiler.quantize._choice import judging_parts
from dfqc.compiler.simulate import simulated
from dfqc.compiler.spec import LayerPlan, Plan, TargetSpec, default_ends, parse_bits, parse_rule

CPU = torch.device("cpu")
torch.set_num_threads(1)  # on networks this small, threads cost more than they give

_FOLDER = tempfile.TemporaryDirectory(prefix="dfqc-tests-")
atexit.register(_FOLDER.cleanup)

# Every property differs from the `ort` target's.
INPUTS = TargetSpec(
    name="inputs",
    description="layer inputs only, symmetric and signed",
    weight_bits=(2, 3, 4, 5, 6, 7, 8),
    act_bits=(2, 3, 4, 5, 6, 7, 8, 16, 32),
    integer_ops=("Conv2d", "Linear"),
    act_signed=True,
    act_symmetric=True,
    placement="inputs",
    clip="float",
    bias="float32",
    packed_int4=False,
)


@functools.cache
def traced(name: str) -> Graph:
    """Trace a net of `models.TINY`, batch norms and all."""
    return models.trace_tiny(name)


@functools.cache
def folded(name: str) -> Graph:
    """Trace and fold a net of `models.TINY`; shared, so not to be modified."""
    return fold(traced(name))


def fold_module(module: torch.nn.Module) -> Graph:
    """Trace and fold any module on `models.IMAGE`."""
    models.randomize_norms(module)
    return fold(models.trace_module(module))


def calib(count: int = 32, seed: int = 1) -> CalibSet:
    """Return normal images as a calibration set."""
    return CalibSet(models.images(count, seed=seed), None, "test")


def plan(
    graph: Graph,
    bits: str = "w4a4",
    *rules: str,
    ends: str | None = "default",
    target: TargetSpec = ort.TARGET,
) -> Plan:
    """Plan a folded graph from the texts a user gives."""
    parsed = [parse_rule(rule) for rule in rules]
    rest = parse_bits(bits)
    chosen = parse_bits(ends) if ends not in (None, "default") else None
    if ends == "default":
        chosen = default_ends(rest)
    return make_plan(graph, target, rest, parsed, ends=chosen)


def quantize(graph: Graph, decided: Plan, **options: object) -> QuantState:
    """Round to nearest on `calib()`."""
    chosen = rtn.Options(**options)
    return rtn.quantize(graph, calib(), decided, chosen, rng=torch.Generator(), device=CPU)


def judged(graph: Graph, state: QuantState, images: Tensor, held_out: Tensor) -> float:
    """Mean KL of the softmax in float64, geometric mean over own (every fourth) and its copies."""
    logs = []
    for part in judging_parts(images[3::4], QuantizerSupplies(held_out=held_out)):
        with torch.no_grad():
            wanted = graph.module(part).double().log_softmax(1)
            found = simulated(graph, state, integer=False).module(part).double().log_softmax(1)
        logs.append(math.log(float((wanted.exp() * (wanted - found)).sum(1).mean())))
    return math.exp(sum(logs) / 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A quantized graph with its file, and the engine that has opened it."""

    graph: Graph
    state: QuantState
    lowered: Lowered
    path: Path
    runner: Runner

    @functools.cached_property
    def model(self) -> onnx.ModelProto:
        return onnx.ModelProto.FromString(self.lowered.model)

    @functools.cached_property
    def constants(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    def nodes(self, *kinds: str) -> list[onnx.NodeProto]:
        return [node for node in self.model.graph.node if node.op_type in kinds]

    def planned(self) -> list[LayerPlan]:
        return [layer for layer in self.state.plan.layers.values() if layer.weight is not None]

    def layer_node(self, layer: LayerPlan) -> onnx.NodeProto:
        return next(n for n in self.nodes("Conv", "Gemm", "MatMul") if n.name == layer.name)

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name])

    def producer(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.model.graph.node if name in node.output)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.model.graph.node if name in node.input]


@functools.cache
def lowered(net: str, bits: str, *rules: str) -> Case:
    """Lower a net of `models.TINY`; shared, so not to be modified."""
    graph = folded(net)
    state = quantize(graph, plan(graph, bits, *rules))
    folder = Path(_FOLDER.name) / "-".join((net, bits, *rules)).replace("*", "_")
    folder.mkdir()
    return lower(graph, state, folder)


def lower(
    graph: Graph, state: QuantState, folder: Path, *, target: TargetSpec = ort.TARGET
) -> Case:
    """Lower, write and open a quantized graph."""
    float_acts = {} if state.plan.quantizers else {ort.WEIGHT_ONLY_KEY: "true"}
    lowered = _qdq.lower(graph, state, target, metadata={"dfqc": "test", **float_acts})
    path = folder / "model.onnx"
    path.write_bytes(lowered.model)
    return Case(graph, state, lowered, path, ort.open_runner(path, threads=1))
