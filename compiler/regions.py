"""Cut a region out of a graph: module, first and last node in, a module of that part out.

The region shares its layers with the module it was cut from: training them trains both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from dfqc.compiler._aten import op_name

_SIZE = torch.ops.aten.sym_size.int


def cut_region(
    module: fx.GraphModule, entry: str, exit: str, shapes: Mapping[str, tuple[int, ...]]
) -> fx.GraphModule:
    """Return a module of one input, the output of `entry`, that computes the output of `exit`.

    Args:
        module: the graph, with or without quantizers.
        entry: name of the node whose output is given.
        exit: name of the node whose output is wanted.
        shapes: output shapes of the nodes for one image (`graph.node_shapes`).

    Raises:
        ValueError: something before `entry` is needed too: it is no cut of the graph.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    wanted = _ancestors(nodes[exit], nodes[entry])
    region = fx.Graph()
    made: dict[fx.Node, fx.Node] = {nodes[entry]: region.placeholder("x")}
    for node in module.graph.nodes:
        if node is nodes[entry] or node not in wanted:
            continue
        if node.op == "placeholder":
            raise ValueError(f"{exit} does not depend on the image through {entry} alone")
        outer = _outer_size(node, made, nodes[entry], shapes)
        if outer is None:
            made[node] = region.node_copy(node, lambda n: made[n])
        elif outer == 0:
            made[node] = region.call_function(_SIZE, (made[nodes[entry]], 0))
        else:
            made[node] = region.call_function(int, (outer,))
    region.output(made[nodes[exit]])
    return fx.GraphModule(module, region)


def _ancestors(exit: fx.Node, entry: fx.Node) -> set[fx.Node]:
    """Return what `exit` is computed from, back to `entry`; sizes need no values before it."""
    wanted: set[fx.Node] = set()
    pending = [exit]
    while pending:
        node = pending.pop()
        if node in wanted:
            continue
        wanted.add(node)
        if node is not entry and not _reads_size(node):
            pending.extend(node.all_input_nodes)
    return wanted


def _reads_size(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node).startswith("sym_size")


def _outer_size(
    node: fx.Node,
    made: Mapping[fx.Node, fx.Node],
    entry: fx.Node,
    shapes: Mapping[str, tuple[int, ...]],
) -> int | None:
    """Return the size that `node` reads from a tensor outside the region; 0 for its batch.

    None for any other node.
    """
    if not _reads_size(node):
        return None
    source, axis = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    assert isinstance(axis, int)
    if source in made:
        return None
    if axis % len(shapes[source.name]) == 0:
        if shapes[source.name][0] != shapes[entry.name][0]:
            raise ValueError(f"{entry.name} does not have the batch of {source.name} in front")
        return 0
    return shapes[source.name][axis]
