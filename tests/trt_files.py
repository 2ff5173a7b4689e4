"""Files as the `trt` target writes them, and how to break one thing in them."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

import quantized
from dfqc.backends import trt
from dfqc.backends._trt_engine import SPARSITY_KEY
from dfqc.compiler.affine import half_scales


class Everything(nn.Module):
    """A stem, a residual block, a concatenation that a convolution reads, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.outer = nn.Conv2d(8, 8, 1)
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Conv2d(8, 8, 3, padding=1)
        self.joined = nn.Conv2d(16, 32, 3)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.outer(F.relu(self.inner(x))))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        x = F.relu(self.joined(F.pad(x, (1, 1, 1, 1))))
        return self.head(x.mean((2, 3)))


@functools.cache
def state(bits: str = "w8a8"):
    """Return the folded graph and what round-to-nearest decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = quantized.fold_module(Everything())
    ends = None if bits == "w4a16" else "default"  # the classifier is all that it quantizes
    plan = quantized.plan(graph, bits, ends=ends, target=trt.TARGET)
    return graph, quantized.quantize(graph, plan)


@functools.cache
def written(bits: str = "w8a8", base: str = "fp32", sparsity: str | None = None) -> bytes:
    """Return a file; `sparsity` is what it says of its zeros."""
    graph, decided = state(bits)
    decided = half_scales(decided) if base == "fp16" else decided
    metadata = {} if base == "fp32" else {trt.BASE_KEY: base}
    metadata |= {SPARSITY_KEY: sparsity} if sparsity else {}
    return trt.lower(graph, decided, metadata=metadata).model


def good(bits: str = "w8a8", base: str = "fp32") -> onnx.ModelProto:
    """Return a file as a model of its own, to be broken."""
    return onnx.ModelProto.FromString(written(bits, base))


def named(model, name):
    """Return the layer of a module path."""
    return next(n for n in model.graph.node if n.name == name)


def producer(model, value):
    return next(n for n in model.graph.node if value in n.output)


def readers(model, value):
    return [n for n in model.graph.node if value in n.input]


def weight_dq(model, layer):
    return producer(model, named(model, layer).input[1])


def input_dq(model, layer):
    return producer(model, named(model, layer).input[0])


def input_q(model, layer):
    return producer(model, input_dq(model, layer).input[0])


def constant(model, array, name="broken"):
    """Add a constant and return its name."""
    if not isinstance(array, TensorProto):
        array = numpy_helper.from_array(np.asarray(array))
    array.name = name
    model.graph.initializer.append(array)
    return name


def replace(model, name, array):
    """Give a constant another value."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(array if isinstance(array, TensorProto) else numpy_helper.from_array(array))
    tensor.name = name


def array(model, name):
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def packed(kind, shape, values=None):
    """Return a tensor of a type that numpy does not have."""
    values = np.zeros(shape, np.int64) if values is None else values
    return helper.make_tensor("packed", kind, shape, np.asarray(values).reshape(-1).tolist())


def insert(model, before, *nodes):
    """Insert nodes in front of another."""
    place = list(model.graph.node).index(before)
    for offset, node in enumerate(nodes):
        model.graph.node.insert(place + offset, node)


def pair(model, source, *, scale=0.25, name="extra"):
    """Return Q and DQ on a value; the DQ writes `name`."""
    step = constant(model, np.float32(scale), f"{name}.s")
    zero = constant(model, np.int8(0), f"{name}.z")
    return (
        helper.make_node("QuantizeLinear", [source, step, zero], [f"{name}.q"]),
        helper.make_node("DequantizeLinear", [f"{name}.q", step, zero], [name]),
    )


def reread(node, index, value):
    node.input[index] = value
