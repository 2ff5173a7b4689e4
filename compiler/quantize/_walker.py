"""Walk through a network unit by unit, deciding each on what the decided ones before it give.

In: a folded graph, whole-network states to choose from and images. Out: the assembled state, and
what was decided for every unit and why.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from dfqc.compiler import affine
from dfqc.compiler.contracts import Checkpoint, QParams, QuantState, WeightGrid
from dfqc.compiler.graph import Block, Graph, copy_graph, node_shapes
from dfqc.compiler.quantize._judge import output_error
from dfqc.compiler.quantize._learned import LearnedGrid
from dfqc.compiler.quantize._ranges import weight_grid
from dfqc.compiler.quantize._rounding import Layer
from dfqc.compiler.quantize._stream import Stream
from dfqc.compiler.quantize._targets import Targets
from dfqc.compiler.quantize._train import UnitData
from dfqc.compiler.quantize._units import Unit, UnitState, load_unit, save_unit
from dfqc.compiler.regions import cut_region
from dfqc.compiler.simulate import insert_quantizers, quantizer_target, snapped_bias

LEARNED, CLOSED, NEAREST = "learned", "closed", "nearest"  # candidates


class Trainer(Protocol):
    """Trains one unit in place of the walker: it knows the method, the walker the network."""

    def __call__(
        self, unit: Unit, network: Network, data: UnitData, acts: Sequence[str], number: int
    ) -> tuple[dict[str, UnitState], dict[str, Any]]:
        """Return what was learned by name, the last one last, and notes on how; empty: nothing."""
        ...


@dataclass
class Network:
    """The quantized copy of a graph whose layers are decided one after the other."""

    graph: Graph
    state: QuantState  # what undecided parts begin with
    device: torch.device
    targets: Targets
    relative: bool = False  # whether grids learn parts of their scale
    module: fx.GraphModule = field(init=False)
    grids: dict[str, LearnedGrid] = field(init=False)

    def __post_init__(self) -> None:
        """Copy the graph and put a grid behind every tensor that the plan quantizes."""
        self.module = copy_graph(self.graph).module.to(self.device)
        self.shapes = node_shapes(self.graph)
        self.plan = self.state.plan
        self.grids = {}

        def make(quantizer: Any) -> LearnedGrid:
            # A tied quantizer repeats the grid of another: one module serves both.
            shared = self.grids.get(quantizer.tied) if quantizer.tied else None
            grid = LearnedGrid(
                self.state.acts[quantizer.name],
                quantizer.scheme,
                self.device,
                relative=self.relative,
            )
            self.grids[quantizer.name] = shared or grid
            return self.grids[quantizer.name]

        insert_quantizers(self.module, self.plan, make)
        self.module.requires_grad_(False)

    def float_region(self, entry: str, exit: str) -> fx.GraphModule:
        """Return the float network between two nodes; what it is fitted to is in `targets`."""
        return cut_region(self.graph.module, entry, exit, self.shapes)

    def region(self, entry: str, exit: str) -> fx.GraphModule:
        """Return the quantized network between two nodes, as far as it is decided."""
        return cut_region(self.module, entry, exit, self.shapes)

    def ends(self) -> tuple[str, str]:
        """Return the names of the image's node and of the one that computes the output."""
        nodes = list(self.graph.module.graph.nodes)
        result = next(n for n in nodes if n.op == "output").args[0]
        assert isinstance(result, fx.Node)
        return next(n for n in nodes if n.op == "placeholder").name, result.name

    def grids_in(self, region: fx.GraphModule) -> list[str]:
        """Return the names of the quantizers that a region passes through."""
        called = {str(node.target) for node in region.graph.nodes if node.op == "call_module"}
        return [name for name in self.plan.quantizers if quantizer_target(name) in called]

    def original(self, layer: str) -> Layer:
        """Return a copy of the float layer."""
        module = self.graph.module.get_submodule(layer)
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        return copy.deepcopy(module).to(self.device)

    def start_grid(self, layer: str, state: QuantState, method: str) -> WeightGrid:
        """Return the grid of a layer's weight, with the scales of `state`."""
        planned = self.plan.layers[layer].weight
        assert planned is not None
        weight = self.graph.module.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        grid = weight_grid(weight.cpu(), planned, method)
        # A clone: what came out of inference mode cannot be learned from.
        return dataclasses.replace(grid, scale=state.weights[layer].scale.clone())

    def quantize_acts(self, on: bool) -> None:
        """Switch all activation grids on or off."""
        for grid in self.grids.values():
            grid.enabled = on

    def put(self, layer: str, module: nn.Module) -> None:
        """Put another module in the place of a layer."""
        self.module.set_submodule(layer, module)

    def apply(self, unit: UnitState) -> None:
        """Put a unit's decisions into the network: grids, rounded weights, snapped biases."""
        for name, grid in unit.acts.items():
            self.grids[name].set(grid)
        acts = {name: grid.qparams() for name, grid in self.grids.items()}
        for name, weight in unit.weights.items():
            layer = self.plan.layers[name]
            module = self.original(name)
            axis = layer.weight.axis if layer.weight else None
            module.weight = _frozen(affine.dequantize_weight(weight, axis).to(self.device))
            bias = unit.biases.get(name)
            if bias is not None:
                snapped = snapped_bias(bias, layer, weight, acts)
                module.bias = _frozen(snapped.to(self.device))
            self.put(name, module.eval())


@dataclass(frozen=True)
class Decision:
    """What was kept for one unit, and the errors of all candidates on held-out images.

    `winner` has the smallest error of those that may win: nearest codes may not beside closed ones.
    With `keep_best` off there are no errors, and it is what was learned last.
    """

    walk: str
    unit: str
    layers: tuple[str, ...]
    winner: str
    errors: Mapping[str, float]
    notes: Mapping[str, Any]


@dataclass
class Walker:
    """Decides the units of a network in order."""

    network: Network
    blocks: Sequence[Block]
    units: Sequence[Unit]
    candidates: Mapping[str, QuantState]
    images: Stream
    held_out: Stream
    trainer: Trainer
    checkpoint: Checkpoint
    part: Mapping[str, Any]  # what the parts depend on beside the stage's own options
    keep_best: bool = True
    name: str = "joint"
    skipped: Callable[[Unit], None] = lambda unit: None  # called for a unit that was found ready
    decided: dict[str, UnitState] = field(default_factory=dict, init=False)
    decisions: list[Decision] = field(default_factory=list, init=False)
    _settled: set[int] = field(default_factory=set, init=False)

    def run(self) -> QuantState:
        """Decide all units and return the whole state."""
        for place, block in enumerate(self.blocks):
            for number, unit in enumerate(self.units):
                if unit.block == place:
                    self._decide(unit, block, number)
            exact = self.network.targets.region(block.entry, block.exit)
            quantized = self.network.region(block.entry, block.exit)
            for stream in (self.images, self.held_out):
                stream.advance(exact, quantized)
        return self._assemble()

    def _decide(self, unit: Unit, block: Block, number: int) -> None:
        """Make or find a unit's state, and go on with it."""
        acts = self._new_grids(unit)

        made: list[Unit] = []

        def make() -> tuple[UnitState, dict[str, str]]:
            made.append(unit)
            state, decision = self._choose(unit, block, number, acts)
            return state, {"decision": json.dumps(dataclasses.asdict(decision))}

        def save(value: Any, folder: Any) -> None:
            save_unit(value[0], value[1], folder)

        part = {**self.part, "unit": unit.name, "number": number}
        state, notes = self.checkpoint(part, make, save, load_unit)
        if not made:
            self.skipped(unit)
        fields = json.loads(notes["decision"])
        self.decisions.append(Decision(**{**fields, "layers": tuple(fields["layers"])}))
        self.network.apply(state)
        self.decided[unit.name] = state
        self._settled.update(id(self.network.grids[name]) for name in state.acts)

    def _new_grids(self, unit: Unit) -> list[str]:
        """Return the quantizers that this unit is the first to pass through."""
        region = self.network.region(unit.entry, unit.exit)
        grids = self.network.grids
        # By module: tied quantizers repeat one grid, which is decided once.
        names = self.network.grids_in(region)
        return [name for name in names if id(grids[name]) not in self._settled]

    def _choose(
        self, unit: Unit, block: Block, number: int, acts: Sequence[str]
    ) -> tuple[UnitState, Decision]:
        """Train a unit, and return the best of that and the ready candidates."""
        data = self._data(unit, block, self.images)
        learned, notes = self.trainer(unit, self.network, data, acts, number)
        _free(data, self.images)
        states = {n: UnitState.of(s, unit.layers, acts) for n, s in self.candidates.items()}
        states |= learned
        if self.keep_best:
            errors = self._judge(unit, block, states)
            # Closed codes make up for the closed codes before them, nearest ones in a single unit
            # break that chain even where its own error falls: MobileNetV1 at W4A8 is at 51.4 with
            # closed codes everywhere, at 47-49 with nearest ones in two units of 14, at 41.8 in
            # four. They stand for the network as a whole.
            able = [n for n in errors if n != NEAREST or CLOSED not in errors]
            winner = min(able, key=lambda name: errors[name])
        else:
            errors, winner = {}, list(learned or states)[-1]
        return states[winner], Decision(self.name, unit.name, unit.layers, winner, errors, notes)

    def _judge(self, unit: Unit, block: Block, states: Mapping[str, UnitState]) -> dict[str, float]:
        """Return the held-out error of every candidate of a unit."""
        data = self._data(unit, block, self.held_out)
        errors = {}
        for name, state in states.items():
            self.network.apply(state)
            region = self.network.region(unit.entry, unit.exit)
            errors[name] = output_error(
                region,
                data.quantized,
                data.target,
                batch=self.held_out.batch,
                device=self.network.device,
            )
        _free(data, self.held_out)
        return errors

    def _data(self, unit: Unit, block: Block, stream: Stream) -> UnitData:
        """Return the rows of a unit inside the block where `stream` stands."""
        network, targets = self.network, self.network.targets
        target = stream.rows(targets.picked(block.entry, unit.exit), stream.exact)
        exact = stream.exact
        if unit.entry != block.entry or unit.entry in targets.picks:
            exact = stream.rows(targets.picked(block.entry, unit.entry), stream.exact)
        if unit.entry == block.entry:
            return UnitData(exact, stream.quantized, target)
        region = network.region(block.entry, unit.entry)
        return UnitData(exact, stream.rows(region, stream.quantized), target)

    def _assemble(self) -> QuantState:
        """Return the state of the network: what was decided, and the rest as it began."""
        base = self.network.state
        parts = list(self.decided.values())
        return dataclasses.replace(
            base,
            weights=dict(base.weights) | {n: w for part in parts for n, w in part.weights.items()},
            biases=dict(base.biases) | {n: b for part in parts for n, b in part.biases.items()},
            acts=_tied(base, {n: grid.qparams() for n, grid in self.network.grids.items()}),
        )


def _tied(base: QuantState, acts: Mapping[str, QParams]) -> dict[str, QParams]:
    """Return the grids in the plan's order."""
    return {name: acts[name] for name in base.plan.quantizers}


def _free(data: UnitData, stream: Stream) -> None:
    """Give back what was made for one unit alone."""
    for rows in (data.exact, data.quantized, data.target):
        if rows is not stream.exact and rows is not stream.quantized:
            rows.free()


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
