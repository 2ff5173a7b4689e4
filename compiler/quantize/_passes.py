"""The passes of a reconstruction over a network: options, images and ready states in, a state out.

One pass learns everything together; BRECQ's order learns weights first, without any activation
grid, and then the activation steps alone.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfqc.compiler import affine, machine
from dfqc.compiler.contracts import Progress, QuantizerSupplies, QuantState, WeightGrid
from dfqc.compiler.graph import Graph, node_shapes
from dfqc.compiler.quantize import _output, rtn
from dfqc.compiler.quantize._caches import Budget, Cache
from dfqc.compiler.quantize._learned import LearnedGrid
from dfqc.compiler.quantize._rounding import (
    FlexRounding,
    Layer,
    LearnedWeight,
    SoftRounding,
    Units,
)
from dfqc.compiler.quantize._stream import Stream
from dfqc.compiler.quantize._train import TrainOptions, UnitData, train_unit
from dfqc.compiler.quantize._units import Unit, UnitState, list_units, merge_blocks
from dfqc.compiler.quantize._walker import LEARNED, Decision, Network, Walker
from dfqc.compiler.spec import MAX_BITS, LayerPlan, Plan

if TYPE_CHECKING:
    from dfqc.compiler.quantize.reconstruct import Options

STEPS = "steps"  # the candidate whose rounding is that of the start
_CACHE_SHARE = 0.5  # of the memory that is left; without a limit, of half of the machine's
_SEED_STEP = 10_007  # between the seeds of two passes


@dataclass(frozen=True)
class Pass:
    """One walk through the network."""

    name: str
    weights: bool  # whether rounding, weight steps and biases are learned
    acts: bool  # whether activations are on their grids, and their steps learned
    train: TrainOptions


def plan_passes(options: Options) -> list[Pass]:
    """Return the passes of a method."""
    fields = {name: getattr(options, name) for name in TrainOptions.model_fields}
    train = TrainOptions(**fields)
    if options.order == "joint":
        return [Pass("joint", weights=True, acts=True, train=train)]
    # The second pass: steps alone, on float inputs, by the norm that ranges are searched with.
    second = {
        "iterations": options.act_iterations,
        "lr_act_scale": options.lr_act_second,
        "inputs": "float",
        "drop": 0.0,
        "norm": 2.4,
        "round_weight": 0.0,
    }
    return [
        Pass("weights", weights=True, acts=False, train=train),
        Pass("acts", weights=False, acts=True, train=TrainOptions(**{**fields, **second})),
    ]


@dataclass
class Run:
    """One reconstruction of one network."""

    graph: Graph
    plan: Plan
    options: Options
    images: Tensor
    held_out: Tensor
    ready: Mapping[str, QuantState]
    seed: int
    device: torch.device

    def all_passes(
        self, progress: Progress, supplies: QuantizerSupplies, seconds: float | None
    ) -> tuple[QuantState, dict[str, Any]]:
        """Return the reconstructed state, and notes for the manifest."""
        blocks = merge_blocks(self.graph, self.plan, self.options.merge, self.options.least_layers)
        units = list_units(self.graph, self.plan, blocks, self.options.unit)
        passes = plan_passes(self.options)
        clock = _Clock.of(self.graph, self.plan, units, passes, seconds)
        report = _Report(progress, sum(one.train.iterations for one in passes) * len(units))
        budget = Budget(cache_bytes(supplies.memory_bytes))
        states, decisions = dict(self.ready), list[Decision]()
        try:
            for number, one in enumerate(passes):
                network = Network(
                    self.graph, self._start(states), self.device, self.options.relative
                )
                network.quantize_acts(one.acts)
                trainer = _Trainer(self, one, clock, report, self.seed + _SEED_STEP * number)
                walker = Walker(
                    network,
                    blocks,
                    units,
                    states,
                    self._stream(self.images, budget),
                    self._stream(self.held_out, budget),
                    trainer,
                    supplies.checkpoint,
                    {"pass": one.name},
                    self.options.keep_best,
                )
                states = {one.name: walker.run()}
                decisions += walker.decisions
        finally:
            budget.close()
        (state,) = states.values()
        return state, _notes(decisions, budget)

    def _start(self, states: Mapping[str, QuantState]) -> QuantState:
        """Return the state that learning begins with."""
        names = ("closed", "nearest", *states)
        return states[next(name for name in names if name in states)]

    def _stream(self, images: Tensor, budget: Budget) -> Stream:
        source = Cache(images, budget, 0, None)
        return Stream(source, budget, self.options.cache, self.options.pass_size, self.device)


def cache_bytes(limit: int | None) -> int:
    """Return what the caches of units' inputs and outputs may hold in memory."""
    if limit is None:
        return int(_CACHE_SHARE * machine.total_memory() / 2)
    return max(0, int(_CACHE_SHARE * (limit - machine.current_rss())))


def _notes(decisions: Sequence[Decision], budget: Budget) -> dict[str, Any]:
    """Return what the manifest says of the units."""
    rows = [dataclasses.asdict(decision) for decision in decisions]
    for row in rows:
        row["layers"] = list(row["layers"])
        row["errors"] = {k: v for k, v in row["errors"].items() if math.isfinite(v)}
    return {
        "units": rows,
        "shortened": any(
            phase["shortened"]
            for row in rows
            for phase in row["notes"].values()
            if isinstance(phase, dict)
        ),
        "spilled_bytes": budget.spilled,
    }


@dataclass
class _Trainer:
    """Learns one unit of one pass."""

    run: Run
    one: Pass
    clock: _Clock
    report: _Report
    seed: int

    def __call__(
        self, unit: Unit, network: Network, data: UnitData, acts: Sequence[str], number: int
    ) -> tuple[dict[str, UnitState], dict[str, Any]]:
        """Return what was learned, in steps on the way, and notes on how."""
        run, one = self.run, self.one
        if reason := self._reason_to_skip(unit, network, acts, number):
            self.clock.skip(unit)
            self.report.finish(one.train.iterations)
            return {}, {"skipped": reason}
        rng = torch.Generator(run.device).manual_seed(self.seed + number)
        layers = [self._learned(name, network) for name in unit.layers] if one.weights else []
        region = network.region(unit.entry, unit.exit)
        grids = self._grids(network, acts) if one.acts else []
        tail = _output.make_tail(run, unit, network, region, data)
        rows = dataclasses.replace(data, weighting=tail.weighting)
        seconds = self.clock.grant(unit, one.train.iterations)
        states: dict[str, UnitState] = {}
        notes: dict[str, Any] = {}
        for phase in self._phases():
            share = phase.train.iterations / one.train.iterations
            trained = train_unit(
                *(region, layers, grids, rows, phase.train),
                rng=rng,
                device=run.device,
                seconds=None if seconds is None else seconds * share,
                progress=self.report.of(unit.name),
                penalty=tail.penalty,
            )
            self.report.finish(phase.train.iterations)
            states[phase.name] = self._state(unit, network, layers, acts)
            notes[phase.name] = dataclasses.asdict(trained)
        return states, notes

    def _phases(self) -> list[Pass]:
        """Return what is learned one after the other: steps and biases alone, then rounding too."""
        train, share = self.one.train, self.run.options.step_share
        first = round(share * train.iterations)
        if not first or not self.one.weights or first == train.iterations:
            return [dataclasses.replace(self.one, name=LEARNED)]
        alone = {"iterations": first, "lr_rounding": 0.0, "round_weight": 0.0}
        rest = {"iterations": train.iterations - first}
        return [
            dataclasses.replace(self.one, name=STEPS, train=train.model_copy(update=alone)),
            dataclasses.replace(self.one, name=LEARNED, train=train.model_copy(update=rest)),
        ]

    def _state(
        self,
        unit: Unit,
        network: Network,
        layers: Sequence[LearnedWeight],
        acts: Sequence[str],
    ) -> UnitState:
        """Return what a unit has learned so far."""
        self._make_room(unit, network, layers)
        learned = {name: network.grids[name].qparams() for name in acts}
        if not self.one.weights:
            kept = UnitState.of(network.state, unit.layers, acts)
            return dataclasses.replace(kept, acts=learned)
        names = dict(zip(unit.layers, layers, strict=True))
        biases = {n: layer.bias for n, layer in names.items()}
        return UnitState(
            {name: layer.quantized() for name, layer in names.items()},
            {n: b.detach().cpu().clone() for n, b in biases.items() if b is not None},
            learned,
        )

    def _reason_to_skip(
        self, unit: Unit, network: Network, acts: Sequence[str], number: int
    ) -> str:
        """Say why a unit is left as it is; empty if it is not."""
        options, plan = self.run.options, network.plan
        if options.skip_first and number == 0 and self.one.weights:
            return "first unit"
        schemes = [plan.layers[name].weight for name in unit.layers]
        schemes += [plan.quantizers[name].scheme for name in acts]
        if options.skip_wide and all(s is None or s.bits >= MAX_BITS for s in schemes):
            return "8 bits everywhere"
        return ""

    def _learned(self, name: str, network: Network) -> LearnedWeight:
        """Put a layer whose weight is learned into the network."""
        options, layer = self.run.options, network.plan.layers[name]
        kind = SoftRounding if self.one.train.rounding == "soft" else FlexRounding
        module = network.original(name)
        bias, least = network.state.biases.get(name), None
        if bias is not None:
            # A clone: corrected biases may come out of inference mode.
            module.bias = torch.nn.Parameter(bias.to(self.run.device).clone())
        if bias is not None and layer.input is not None:
            scale = network.grids[layer.input].qparams().scale
            least = rtn.smallest_weight_scale(bias, scale)
        grid = network.start_grid(name, network.state, options.weights)
        codes = network.state.weights[name].codes.to(self.run.device)
        start = codes if options.start == "closed" else None
        units = self._units(module, grid, network, layer) if self.one.train.relative else None
        learned = kind(module, grid, least, start, units)
        network.put(name, learned)
        return learned

    def _make_room(self, unit: Unit, network: Network, layers: Sequence[LearnedWeight]) -> None:
        """Raise scales where the learned bias would leave the int32 grid of the learned steps."""
        for name, learned in zip(unit.layers, layers, strict=False):
            source, bias = network.plan.layers[name].input, learned.bias
            if source is not None and bias is not None:
                scale = network.grids[source].qparams().scale
                least = rtn.smallest_weight_scale(bias.detach(), scale)
                learned.least = torch.maximum(learned.least, least)
                learned.hold_scale()

    def _units(self, module: Layer, grid: WeightGrid, network: Network, layer: LayerPlan) -> Units:
        """Return what scales and biases of a layer are compared with while they are learned.

        A bias with what the inputs move the output by: their range times the weight's norm.
        """
        spread = 1.0
        if layer.input is not None:
            scheme = network.plan.quantizers[layer.input].scheme
            spread = network.grids[layer.input].qparams().scale * scheme.levels / 4
        norm = module.weight.detach().flatten(1).norm(dim=1).cpu()
        return Units(grid.scale, (norm * spread).clamp_min(affine.SMALLEST_SCALE))

    def _grids(self, network: Network, acts: Sequence[str]) -> list[LearnedGrid]:
        """Return the grids below 8 bits, each once; wider ones lose nothing by calibration."""
        found = dict.fromkeys(network.grids[name] for name in acts)
        return [grid for grid in found if grid.scheme.bits < MAX_BITS]


@dataclass
class _Clock:
    """Shares the time among the units by their work."""

    work: dict[str, list[float]]  # unit -> what is still to come in each pass, in order
    seconds: float | None

    @staticmethod
    def of(
        graph: Graph, plan: Plan, units: Sequence[Unit], passes: Sequence[Pass], left: float | None
    ) -> _Clock:
        """Weigh units by their multiplications and the passes' iterations."""
        shapes = node_shapes(graph)
        work = {
            unit.name: [_count_macs(graph, plan, unit, shapes) * p.train.iterations for p in passes]
            for unit in units
        }
        end = None if left is None else time.monotonic() + left
        return _Clock(work, end)

    def skip(self, unit: Unit) -> float:
        """Return the next work of a unit, and strike it off."""
        return self.work[unit.name].pop(0)

    def grant(self, unit: Unit, iterations: int) -> float | None:
        """Return the seconds that a unit may take; None without a limit."""
        total = sum(sum(parts) for parts in self.work.values())
        own = self.skip(unit)
        if self.seconds is None:
            return None
        left = max(0.0, self.seconds - time.monotonic())
        return left * own / max(total, 1e-9)


def _count_macs(
    graph: Graph, plan: Plan, unit: Unit, shapes: Mapping[str, tuple[int, ...]]
) -> float:
    """Return the multiplications of a unit for one image."""
    total = 0.0
    for name in unit.layers:
        weight = graph.module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        out = shapes[plan.layers[name].node]
        positions = math.prod(out) / weight.shape[0]
        total += positions * weight.numel()
    return max(total, 1.0)


@dataclass
class _Report:
    """Counts the iterations of all units as one long work."""

    progress: Progress
    total: int
    done: int = 0

    def of(self, unit: str) -> Callable[[int, int, str], None]:
        """Return the progress of one unit."""

        def report(done: int, total: int, note: str) -> None:
            self.progress(min(self.done + done, self.total), self.total, f"{unit} {note}".strip())

        return report

    def finish(self, planned: int) -> None:
        """Count a unit as done, also if it took fewer iterations."""
        self.done += planned
