"""How small a plan can be on disk: graph and decisions in, bytes out."""

from __future__ import annotations

from torch import nn

from dfqc.compiler.contracts import QuantState
from dfqc.compiler.graph import Graph

_FLOAT = 4  # bytes of a float32 or an int32


def ideal_bytes(graph: Graph, state: QuantState) -> int:
    """Return the bytes of the planned values alone, without any container.

    Every weight at its planned bits, packed across its channels; biases as int32; one float scale
    per weight channel and per activation quantizer. What is not planned stays float32.
    """
    bits = 0
    counted: set[int] = set()
    for layer in state.plan.layers.values():
        module = graph.module.get_submodule(layer.name)
        if layer.weight is None:
            continue
        weight = state.weights[layer.name]
        bits += weight.codes.numel() * layer.weight.bits
        bits += 8 * _FLOAT * weight.scale.numel()
        counted |= {id(p) for p in module.parameters(recurse=False)}
        bias = state.biases.get(layer.name)
        bits += 8 * _FLOAT * (bias.numel() if bias is not None else 0)
    # A tied quantizer repeats the grid of another.
    scales = sum(quantizer.tied is None for quantizer in state.plan.quantizers.values())
    bits += 8 * _FLOAT * scales
    return -(-bits // 8) + _rest_bytes(graph.module, counted)


def _rest_bytes(module: nn.Module, counted: set[int]) -> int:
    """Return the bytes no plan speaks about: unfolded norms, embeddings, constants."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in counted)
