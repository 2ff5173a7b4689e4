"""Two graphs in; which of their blocks are alike, and what one can take over from the other, out.

Nothing is matched by name: blocks are alike if they hold the same layers with the same shapes, and
feature maps are if they have the same size. ResNets of one width thus match at every depth.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from dfqc.compiler.graph import Block, Graph, blocks, node_shapes

Signature = tuple[Any, ...]
# Of a convolution, beside the shapes of its weights.
_WAYS = ("stride", "groups", "dilation", "padding", "padding_mode")


class Hint(NamedTuple):
    """Nodes of teacher and student whose outputs have one shape (c, h, w) and are to agree."""

    teacher: str
    student: str
    shape: tuple[int, ...]


def find_hints(teacher: Graph, student: Graph) -> tuple[Hint, ...]:
    """Pair the last blocks that give each shape of feature map, in the order they run.

    FitNets (Romero et al. 2015) without regressors: only maps of equal shape are compared. Maps of
    one pixel and the logits are left to the loss on the output.
    """
    last = [_last_exits(graph) for graph in (teacher, student)]
    hints: list[Hint] = []
    reached = -1
    for shape, (_, exit_of_teacher) in last[0].items():
        place, exit_of_student = last[1].get(shape, (-1, ""))
        if place > reached:  # blocks run in the same order in both
            hints.append(Hint(exit_of_teacher, exit_of_student, shape))
            reached = place
    return tuple(hints)


def _last_exits(graph: Graph) -> dict[tuple[int, ...], tuple[int, str]]:
    """Return, by shape, place and exit of the last block that gives it, in order of place."""
    shapes = node_shapes(graph)
    found: dict[tuple[int, ...], tuple[int, str]] = {}
    for place, block in enumerate(blocks(graph)):
        shape = shapes.get(block.exit, ())[1:]
        if len(shape) == 3 and shape[1] * shape[2] > 1:
            found.pop(shape, None)
            found[shape] = (place, block.exit)
    return found


def copy_blocks(teacher: Graph, student: Graph) -> dict[str, str]:
    """Copy into the student, in place, the weights and statistics of blocks that are alike.

    Of n alike blocks in the teacher, a student with k of them takes k that are spread evenly, the
    first and the last among them. Returns which block came from which.
    """
    offered, wanted = _by_signature(teacher), _by_signature(student)
    copied: dict[str, str] = {}
    for signature, takers in wanted.items():
        givers = offered.get(signature, [])
        if not givers:
            continue
        for index, taker in enumerate(takers):
            giver = givers[_spread(index, len(takers), len(givers))]
            _copy(teacher, giver, student, taker)
            copied[taker.name] = giver.name
    return copied


def _spread(index: int, takers: int, givers: int) -> int:
    """Return which of `givers` goes to taker `index`; a lone taker gets the first."""
    return round(index * (givers - 1) / (takers - 1)) if takers > 1 else 0


def _by_signature(graph: Graph) -> dict[Signature, list[Block]]:
    found: dict[Signature, list[Block]] = defaultdict(list)
    for block in blocks(graph):
        found[_sign(graph, block)].append(block)
    return found


def _sign(graph: Graph, block: Block) -> Signature:
    """Return what two blocks must share: their layers' types, shapes and ways, in order."""
    return tuple(
        (
            type(module).__name__,
            tuple(tuple(value.shape) for value in module.state_dict().values()),
            *(getattr(module, name, None) for name in _WAYS),
        )
        for module in _modules(graph, block)
    )


def _copy(teacher: Graph, giver: Block, student: Graph, taker: Block) -> None:
    pairs = zip(_modules(teacher, giver), _modules(student, taker), strict=True)
    with torch.no_grad():
        for theirs, ours in pairs:
            ours.load_state_dict(theirs.state_dict())


def _modules(graph: Graph, block: Block) -> list[nn.Module]:
    """Return the layers and batch norms that a block calls, each once."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    paths = [str(nodes[n].target) for n in block.nodes if nodes[n].op == "call_module"]
    return [graph.module.get_submodule(path) for path in dict.fromkeys(paths)]


def with_outputs(graph: Graph, names: tuple[str, ...]) -> fx.GraphModule:
    """Return a module that shares all tensors with `graph` and gives (output, outputs of nodes)."""
    copied = fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    result = copied.graph_copy(graph.module.graph, places)
    by_name = {node.name: node for node in graph.module.graph.nodes}
    copied.output((result, tuple(places[by_name[name]] for name in names)))
    return fx.GraphModule(graph.module, copied)
