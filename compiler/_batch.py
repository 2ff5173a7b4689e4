"""A program exported with a fixed batch in, one that takes any batch out, checked by running both.

An archive is often exported with one example image, which freezes batch 1 into its reshapes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from dfqc.compiler._aten import op_name
from dfqc.compiler._blame import first_line
from dfqc.compiler._lift import Lifted
from dfqc.compiler.errors import LoadError
from dfqc.compiler.graph import Graph

aten = torch.ops.aten

_RESHAPES = ("view", "reshape", "_unsafe_view", "expand")
_TOLERANCE = 1e-4  # of the largest output: another batch size may take another kernel


def free_batch(lifted: Lifted) -> int | None:
    """Replace the frozen batch in reshapes by the real one; return it, None if it was free.

    The leading axis is taken to hold the batch, alone or times a constant (windows, heads);
    `check_batches` finds out where that is wrong.
    """
    image = next(n for n in lifted.graph.nodes if n.op == "placeholder")
    batch = image.meta["val"].shape[0]
    if not isinstance(batch, int):
        return None
    with lifted.graph.inserting_after(image):
        size = lifted.graph.call_function(aten.sym_size.int, (image, 0))
    data = {image}
    for node in lifted.graph.nodes:
        if node.op == "call_function" and any(n in data for n in node.all_input_nodes):
            data.add(node)
        _free_reshape(lifted.graph, node, size, batch, carries_data=node in data)
    return batch


def check_batches(program: ExportedProgram, graph: Graph, batch: int) -> None:
    """Raise `LoadError` unless `graph` computes on two batches what `program` does on each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2 * batch, *graph.image.size, generator=generator)
    try:
        with torch.no_grad():
            frozen = program.module()
            expected = torch.cat([frozen(part) for part in images.split(batch)])
            got = graph.module(images)
        close = torch.allclose(got, expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max()))
        reason = "the outputs differ"
    except Exception as error:
        close, reason = False, first_line(error)
    if not close:
        raise LoadError(
            f"{graph.source}: was exported with a fixed batch of {batch} that cannot be freed "
            f"({reason}); export it again with a dynamic batch: torch.export.export(model, "
            '(example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))'
        )


def _free_reshape(
    graph: fx.Graph, node: fx.Node, size: fx.Node, batch: int, *, carries_data: bool
) -> None:
    name = op_name(node)
    if name not in _RESHAPES or not (carries_data or name == "expand"):
        return
    sizes: Any = node.args[1]
    if not isinstance(sizes, (list, tuple)) or not sizes or not isinstance(sizes[0], int):
        return
    times, rest = divmod(sizes[0], batch)
    if times < 1 or rest or (name == "expand" and times != 1):
        return
    lead = size
    if times != 1:
        with graph.inserting_before(node):
            lead = graph.call_function(operator.mul, (size, times))
    node.args = (node.args[0], [lead, *sizes[1:]], *node.args[2:])
