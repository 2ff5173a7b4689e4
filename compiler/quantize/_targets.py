"""What units are fitted to: a folded graph, and what it was before pruning, in; regions out.

A pruned network is fitted to what the original one computes. Where channels are gone, those that
stay are compared; tensors whose channels cannot be told apart are no ends of units.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from dfqc.compiler.channels import find_groups
from dfqc.compiler.contracts import Pruned
from dfqc.compiler.graph import Block, Graph, node_shapes, on_device
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.quantize._units import Unit, join_blocks
from dfqc.compiler.regions import cut_region

_MAP = 4  # dimensions of a feature map; an operator on more may mix channels


@dataclass(frozen=True)
class Targets:
    """The float network that units are fitted to.

    Attributes:
        graph: folded; the network itself where nothing was pruned.
        shapes: of its nodes, for one image.
        picks: by node, the channels of it that the pruned network has too.
        unclear: nodes of which that is not known.
    """

    graph: Graph
    shapes: Mapping[str, tuple[int, ...]]
    picks: Mapping[str, Tensor]
    unclear: frozenset[str]

    def region(self, entry: str, exit: str) -> fx.GraphModule:
        """Return the network between two nodes."""
        return cut_region(self.graph.module, entry, exit, self.shapes)

    def picked(self, entry: str, exit: str) -> nn.Module:
        """Return the network between two nodes, its output as the pruned network has it."""
        region = nn.Identity() if entry == exit else self.region(entry, exit)
        return nn.Sequential(region, _Pick(self.picks[exit])) if exit in self.picks else region

    def close_blocks(self, blocks: list[Block]) -> list[Block]:
        """Return the blocks, merged where the tensor between two is unclear."""
        groups: list[list[Block]] = []
        for block in blocks:
            if groups and groups[-1][-1].exit in self.unclear:
                groups[-1].append(block)
            else:
                groups.append([block])
        return [join_blocks(group) for group in groups]

    def close_units(self, blocks: list[Block], units: list[Unit]) -> list[Unit]:
        """Return the units, those of a block as one where an end of any is unclear."""
        found: list[Unit] = []
        for place, same in itertools.groupby(units, lambda unit: unit.block):
            own = list(same)
            if self.unclear.isdisjoint({end for unit in own for end in (unit.entry, unit.exit)}):
                found += own
                continue
            block, layers = blocks[place], tuple(name for unit in own for name in unit.layers)
            found.append(Unit(block.name, place, block.entry, block.exit, layers))
        return found


def make_targets(graph: Graph, unpruned: Pruned | None, device: torch.device) -> Targets:
    """Return what a folded graph is fitted to: itself, or what it was."""
    if unpruned is None:
        return Targets(graph, node_shapes(graph), {}, frozenset())
    whole = on_device(fold(unpruned.graph), device)
    made = {
        path: (unpruned.keep[group.name], group.size)
        for group in find_groups(whole)
        if group.name in unpruned.keep
        for path in group.producers + group.through
    }
    shapes, left = node_shapes(whole), node_shapes(graph)
    nodes = {node.name: node for node in whole.module.graph.nodes}
    picks: dict[str, Tensor] = {}
    unclear: set[str] = set()
    for name, shape in left.items():
        if shape == shapes.get(name):
            continue
        keep, size = made.get(_maker(nodes[name], shapes), (torch.empty(0), 0))
        if (len(keep), size) == (shape[1], shapes[name][1]):
            picks[name] = keep
        else:
            unclear.add(name)
    return Targets(whole, shapes, picks, frozenset(unclear))


def _maker(node: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the path of the layer that makes the channels of a node; empty if there is no one.

    Operators in between leave every channel where it is: their maps have as many.
    """
    while True:
        if node.op == "call_module" and _has_weight(node):
            return str(node.target)
        sources = [n for n in node.all_input_nodes if n.name in shapes]
        if not sources:
            return ""
        own, source = shapes[node.name], shapes[sources[0].name]
        if not all(1 < len(shape) <= _MAP for shape in (own, source)) or own[1] != source[1]:
            return ""
        node = sources[0]


def _has_weight(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    assert owner is not None
    module = owner.get_submodule(str(node.target))
    return isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))


class _Pick(nn.Module):
    """Takes channels out of axis 1."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep)
        self.keep: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.keep.to(x.device))
