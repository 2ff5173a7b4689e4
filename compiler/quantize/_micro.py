"""How many rows go through at once in training: a network and a limit in, a number out.

What a backward pass needs is kept from the forward one, for a whole network about twice its
activations. A batch that does not fit goes through in parts whose gradients add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dfqc.compiler.graph import TENSOR_BYTES, Graph, node_shapes

_MEMORY, _SHARE = 8 << 30, 0.25  # without a limit; what of it may hold activations
_KEPT = 2.4  # of every activation; ResNet-20 and MobileNetV1: 2.3, 1.7


def training_bytes(memory_bytes: int | None) -> int:
    """Return what the activations of a batch may take; the same on every machine."""
    return int(_SHARE * (memory_bytes or _MEMORY))


def estimate_bytes(graph: Graph, batch: int, memory_bytes: int | None = None) -> int:
    """Return about what training a whole network keeps of a batch, never more than the limit."""
    row = 4 * _KEPT * sum(math.prod(shape) for shape in node_shapes(graph).values())
    return min(training_bytes(memory_bytes), int(row * batch))


def rows_at_once(forward: Callable[[Tensor], Tensor], row: Tensor, limit: int) -> int:
    """Return how many rows fit into `limit` bytes, one at least.

    On a CPU none of their tensors is larger than `TENSOR_BYTES`.

    Args:
        forward: what is differentiated; parameters count for nothing, as they do not grow.
        row: an input, (1, ...); counted once and twice, to tell what grows with rows.
        limit: bytes for all that is kept for the backward pass.
    """
    one, two = (_kept_bytes(forward, part) for part in (row, torch.cat([row, row])))
    rows = limit // max(1, sum(two) - sum(one))
    if row.device.type == "cpu" and len(one) == len(two):
        largest = max((b - a for a, b in zip(one, two, strict=True)), default=0)
        rows = min(rows, TENSOR_BYTES // max(1, largest))
    return max(1, rows)


def _kept_bytes(forward: Callable[[Tensor], Tensor], x: Tensor) -> list[int]:
    """Return the bytes of each tensor that autograd keeps, in the order of the operators."""
    kept: dict[int, Tensor] = {}

    def count(value: Tensor) -> None:
        # Returning the tensor would let an operator's saved output hold the operator that holds it.
        if not isinstance(value, nn.Parameter):
            kept[value.untyped_storage().data_ptr()] = value.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, _read):
        output = forward(x)
    del output
    return [value.untyped_storage().nbytes() for value in kept.values()]


def _read(nothing: None) -> Tensor:
    raise AssertionError("counted only, never differentiated")
