"""Units of reconstruction: a folded graph and a plan in, regions with layers and grids out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from dfqc.compiler.contracts import QParams, QTensor, QuantState
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Block, Graph, blocks
from dfqc.compiler.operators import output_end
from dfqc.compiler.spec import LayerPlan, Plan

UNIT_FILE = "unit.safetensors"
UnitKind = Literal["block", "layer"]
POINTWISE = ("relu", "hardtanh", "leaky_relu", "silu", "hardswish", "gelu", "sigmoid", "elu")


@dataclass(frozen=True)
class Unit:
    """A part of a block that is reconstructed as a whole: everything by name."""

    name: str
    block: int
    entry: str
    exit: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class UnitState:
    """What one unit gets: `QuantState` of its layers and grids alone."""

    weights: Mapping[str, QTensor]
    biases: Mapping[str, Tensor]
    acts: Mapping[str, QParams]

    @staticmethod
    def of(state: QuantState, layers: Sequence[str], acts: Sequence[str]) -> UnitState:
        """Take a unit's part out of the state of the network."""
        return UnitState(
            {name: state.weights[name] for name in layers},
            {name: state.biases[name] for name in layers if name in state.biases},
            {name: state.acts[name] for name in acts},
        )


def merge_blocks(
    graph: Graph, planned: Collection[str], count: int = 1, least: int = 1, join: str = ""
) -> list[Block]:
    """Return the blocks with planned layers, some neighbors taken together (Ma et al. 2023).

    In a plain chain, where every layer is a block, so many are taken together that each has
    `least` layers. What lies between them, and blocks without planned layers, belongs to the block
    before.

    Args:
        graph: the network.
        planned: names of the layers that count.
        count: how many neighbors are one.
        least: layers of each.
        join: which neighbors are one beside that, as FIRST..LAST,FIRST..LAST.

    Raises:
        UsageError: `join` names a block that is not there, or nothing that can be joined.
    """
    every = blocks(graph)
    spans = read_spans(graph, join)
    closed = False  # whether the last group is one that `join` names
    groups: list[list[Block]] = []
    for place, block in enumerate(every):
        busy = any(name in planned for name in block.layers)
        if place in spans:
            full = spans[place] == place
        else:
            full = busy and bool(groups) and (closed or _is_full(groups[-1], planned, count, least))
        if full or not groups:
            groups.append([])
            closed = place in spans
        groups[-1].append(block)
    return [join_blocks(group) for group in groups]


def read_spans(graph: Graph, join: str) -> dict[int, int]:
    """Return, for the places of all blocks that `join` names, that of the first of its span.

    Raises:
        UsageError: see `merge_blocks`.
    """
    if not join:
        return {}
    names = [block.name for block in blocks(graph)]
    places = {name: place for place, name in enumerate(names)}
    found: dict[int, int] = {}
    for text in join.split(","):
        first, dots, last = text.strip().partition("..")
        if not dots or first not in places or last not in places:
            raise UsageError(
                f"join: expected FIRST..LAST with the names of two blocks, got {text.strip()!r}; "
                f"the blocks are: {', '.join(names)}"
            )
        span = range(places[first], places[last] + 1)
        if len(span) < 2 or any(place in found for place in span):
            raise UsageError(
                f"join: {text.strip()} does not run from a block to a later one, or shares a block "
                f"with another; the blocks are, in order: {', '.join(names)}"
            )
        found.update(dict.fromkeys(span, span[0]))
    return found


def _is_full(group: Sequence[Block], planned: Collection[str], count: int, least: int) -> bool:
    busy = [[name for name in block.layers if name in planned] for block in group]
    return sum(map(bool, busy)) >= count and sum(map(len, busy)) >= least


def join_blocks(group: Sequence[Block]) -> Block:
    """Return neighboring blocks as one."""
    return Block(
        group[0].name if len(group) == 1 else f"{group[0].name}..{group[-1].name}",
        group[0].entry,
        group[-1].exit,
        tuple(node for block in group for node in block.nodes),
        tuple(name for block in group for name in block.layers),
    )


def list_units(graph: Graph, plan: Plan, regions: Sequence[Block], kind: UnitKind) -> list[Unit]:
    """Return the units in the order they are reconstructed; only those with planned layers."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    units: list[Unit] = []
    for place, block in enumerate(regions):
        names = tuple(n for n in block.layers if plan.layers[n].weight is not None)
        if not names:
            continue
        if kind == "block":
            units.append(Unit(block.name, place, block.entry, block.exit, names))
            continue
        for name in names:
            layer = plan.layers[name]
            end = _activation_end(nodes[layer.node], block)
            units.append(Unit(name, place, _layer_entry(layer, plan, nodes), end, (name,)))
    return units


def _layer_entry(layer: LayerPlan, plan: Plan, nodes: Mapping[str, fx.Node]) -> str:
    """Return the tensor that a layer's input quantizer reads, in front of any absorbed padding."""
    if layer.input is not None:
        return plan.quantizers[layer.input].source
    source = nodes[layer.node].args[0]
    assert isinstance(source, fx.Node)
    return source.name


def _activation_end(node: fx.Node, block: Block) -> str:
    """Return the last pointwise activation behind a layer, inside its block."""
    end = output_end(node)
    while len(end.users) == 1:
        (user,) = end.users
        name = getattr(getattr(user.target, "_schema", None), "name", "").rpartition("::")[2]
        if user.name not in block.nodes or name not in POINTWISE or len(user.all_input_nodes) != 1:
            break
        end = user
    return end.name


def save_unit(state: UnitState, notes: Mapping[str, str], folder: Path) -> None:
    """Write a unit's state with notes on how it was made."""
    tensors: dict[str, Tensor] = {}
    for name, weight in state.weights.items():
        tensors |= {f"codes/{name}": weight.codes, f"scale/{name}": weight.scale}
    tensors |= {f"bias/{name}": bias.detach().cpu() for name, bias in state.biases.items()}
    for name, grid in state.acts.items():
        pair = [grid.scale, float(grid.zero_point)]
        tensors[f"act/{name}"] = torch.tensor(pair, dtype=torch.float64)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / UNIT_FILE, metadata=dict(notes))


def load_unit(folder: Path) -> tuple[UnitState, dict[str, str]]:
    """Read what `save_unit` wrote."""
    parts: dict[str, dict[str, Tensor]] = {"codes": {}, "scale": {}, "bias": {}, "act": {}}
    with safe_open(folder / UNIT_FILE, "pt") as file:
        notes = dict(file.metadata() or {})
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            kind, _, name = key.partition("/")
            parts[kind][name] = file.get_tensor(key)
    weights = {n: QTensor(codes, parts["scale"][n]) for n, codes in parts["codes"].items()}
    acts = {n: QParams(float(pair[0]), int(pair[1])) for n, pair in parts["act"].items()}
    return UnitState(weights, parts["bias"], acts), notes
