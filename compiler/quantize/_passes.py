"""The passes of a reconstruction over a network: options, images and ready states in, a state out.

One pass learns everything together; BRECQ's order learns weights first, without any activation
grid, and then the activation steps alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfqc.compiler import machine
from dfqc.compiler.contracts import Progress, QuantizerSupplies, QuantState
from dfqc.compiler.graph import Graph, images_at_once
from dfqc.compiler.quantize import _output
from dfqc.compiler.quantize._caches import Budget, Cache
from dfqc.compiler.quantize._layers import UnitLayers
from dfqc.compiler.quantize._learned import LearnedGrid
from dfqc.compiler.quantize._micro import training_bytes
from dfqc.compiler.quantize._rounding import FlexRounding, SoftRounding
from dfqc.compiler.quantize._schedule import Clock, Report
from dfqc.compiler.quantize._stream import Rows, Stream
from dfqc.compiler.quantize._targets import Targets
from dfqc.compiler.quantize._train import TrainOptions, UnitData, train_unit
from dfqc.compiler.quantize._tune import tune
from dfqc.compiler.quantize._units import (
    Unit,
    UnitState,
    list_units,
    load_unit,
    merge_blocks,
    save_unit,
)
from dfqc.compiler.quantize._walker import CLOSED, LEARNED, NEAREST, Decision, Network, Walker
from dfqc.compiler.spec import MAX_BITS, Plan

if TYPE_CHECKING:
    from dfqc.compiler.quantize.reconstruct import Options

DONE, TUNED = "reconstructed", "tuned"  # what all passes give, and that tuned as a whole
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
    images: Rows
    held_out: Tensor
    ready: Mapping[str, QuantState]
    seed: int
    device: torch.device
    targets: Targets

    def all_passes(
        self, progress: Progress, supplies: QuantizerSupplies, seconds: float | None
    ) -> tuple[dict[str, QuantState], dict[str, Any]]:
        """Return the reconstructed state, that one tuned as a whole, and notes for the manifest."""
        planned = {one.name for one in self.plan.layers.values() if one.weight is not None}
        options = self.options
        blocks = merge_blocks(
            self.graph, planned, options.merge, options.least_layers, options.join
        )
        blocks = self.targets.close_blocks(blocks)
        units = list_units(self.graph, self.plan, blocks, self.options.unit)
        units = self.targets.close_units(blocks, units)
        passes = plan_passes(self.options)
        counts = [one.train.iterations for one in passes]
        last = 0 if all_wide(self.plan) else self.options.tune_iterations
        clock = Clock.of(self.graph, self.plan, units, counts, last=last, seconds=seconds)
        report = Report(progress, sum(counts) * len(units) + last)
        report.begin()
        budget = Budget(cache_bytes(supplies.memory_bytes), supplies.scratch)
        states, decisions = dict(self.ready), list[Decision]()
        try:
            for number, one in enumerate(passes):
                network = Network(
                    *(self.graph, self._start(states), self.device, self.targets),
                    relative=self.options.relative,
                )
                network.quantize_acts(one.acts)
                trainer = _Trainer(
                    *(self, one, clock, report, budget, self.seed + _SEED_STEP * number),
                    limit=training_bytes(supplies.memory_bytes),
                )
                walker = Walker(
                    network,
                    blocks,
                    units,
                    states,
                    self._stream(self.images, budget),
                    self._stream(Cache(self.held_out, budget), budget),
                    trainer,
                    supplies.checkpoint,
                    {"pass": one.name},
                    self.options.keep_best,
                    name=one.name,
                    skipped=trainer.skip,
                )
                states = {one.name: walker.run()}
                decisions += walker.decisions
            (state,) = states.values()
            notes = _notes(decisions, budget)
            notes["shortened"] |= any(s.info.get("shortened", False) for s in self.ready.values())
            candidates = {DONE: state}
            if last:
                tuned, notes["tuned"] = self._tune(state, budget, clock, report, supplies)
                candidates[TUNED] = tuned
                notes["shortened"] |= notes["tuned"]["shortened"]
        finally:
            budget.close()
        return candidates, notes

    def _tune(
        self,
        state: QuantState,
        budget: Budget,
        clock: Clock,
        report: Report,
        supplies: QuantizerSupplies,
    ) -> tuple[QuantState, dict[str, Any]]:
        """Tune steps and biases of the whole network, or find them tuned."""

        def make() -> tuple[UnitState, dict[str, str]]:
            stream = self._stream(self.images, budget)
            limit = training_bytes(supplies.memory_bytes)
            progress = report.of("network")
            tuned, notes = tune(
                *(self, state, stream), seconds=clock.left(), limit=limit, progress=progress
            )
            return tuned, {"tuned": json.dumps(notes)}

        def save(value: Any, folder: Path) -> None:
            save_unit(value[0], value[1], folder)

        tuned, notes = supplies.checkpoint({"pass": "tune"}, make, save, load_unit)
        result = dataclasses.replace(
            state,
            weights={**state.weights, **tuned.weights},
            biases={**state.biases, **tuned.biases},
            acts={**state.acts, **tuned.acts},
        )
        return result, json.loads(notes["tuned"])

    def _start(self, states: Mapping[str, QuantState]) -> QuantState:
        """Return the state that learning begins with."""
        names = (CLOSED, NEAREST, *states)
        return states[next(name for name in names if name in states)]

    def _stream(self, images: Rows, budget: Budget) -> Stream:
        batch = images_at_once(self.graph, self.options.pass_size, self.device)
        return Stream(images, budget, self.options.cache, batch, self.device)


def all_wide(plan: Plan) -> bool:
    """Report whether nothing in a plan is narrower than 8 bits."""
    schemes = [layer.weight for layer in plan.layers.values()]
    schemes += [quantizer.scheme for quantizer in plan.quantizers.values()]
    return all(scheme is None or scheme.bits >= MAX_BITS for scheme in schemes)


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
        "widened_caches": budget.widened,
    }


@dataclass
class _Trainer:
    """Learns one unit of one pass."""

    run: Run
    one: Pass
    clock: Clock
    report: Report
    budget: Budget
    seed: int
    limit: int  # bytes of a batch's activations

    def __call__(
        self, unit: Unit, network: Network, data: UnitData, acts: Sequence[str], number: int
    ) -> tuple[dict[str, UnitState], dict[str, Any]]:
        """Return what was learned, in steps on the way, and notes on how."""
        run, one = self.run, self.one
        if reason := self._reason_to_skip(unit, network, acts, number):
            self.skip(unit)
            return {}, {"skipped": reason}
        rng = torch.Generator(run.device).manual_seed(self.seed + number)
        layers = self._learn(unit, network) if one.weights else None
        if layers is None:  # steps of activations alone: on weights that are decided
            network.apply(UnitState.of(network.state, unit.layers, acts))
        region = network.region(unit.entry, unit.exit)
        grids = self._grids(network, acts) if one.acts else []
        tail = _output.make_tail(run, unit, network, region, data, self.budget)
        rows = dataclasses.replace(data, weighting=tail.weighting)
        seconds = self.clock.grant(unit)
        states: dict[str, UnitState] = {}
        notes: dict[str, Any] = {}
        for phase in self._phases():
            share = phase.train.iterations / one.train.iterations
            trained = train_unit(
                *(region, layers.trained() if layers else [], grids, rows, phase.train),
                rng=rng,
                device=run.device,
                seconds=None if seconds is None else seconds * share,
                progress=self.report.of(unit.name),
                penalty=tail.penalty,
                limit=self.limit,
            )
            self.report.finish(phase.train.iterations)
            if layers is not None:
                states[phase.name] = layers.state(acts)
            else:
                kept = UnitState.of(network.state, unit.layers, acts)
                found = {name: network.grids[name].qparams() for name in acts}
                states[phase.name] = dataclasses.replace(kept, acts=found)
            notes[phase.name] = dataclasses.asdict(trained)
        if tail.weighting is not None:
            tail.weighting.free()
        return states, notes

    def skip(self, unit: Unit) -> None:
        """Count a unit as done that was found ready."""
        self.clock.skip(unit)
        self.report.finish(self.one.train.iterations)

    def _learn(self, unit: Unit, network: Network) -> UnitLayers:
        """Put layers whose weight is learned in the place of the unit's."""
        options = self.run.options
        kind = SoftRounding if self.one.train.rounding == "soft" else FlexRounding
        layers = UnitLayers.put(
            network,
            unit.layers,
            kind,
            method=options.weights,
            from_codes=options.start == "closed",
            relative=self.one.train.relative,
        )
        for layer in layers.trained():
            layer.learn_nearest_halfway(self.one.train.undecided)
        return layers

    def _phases(self) -> list[Pass]:
        """Return what is learned one after the other: steps and biases alone, then rounding too."""
        train, share = self.one.train, self.run.options.step_share
        first = round(share * train.iterations)
        steps = max(train.lr_weight_scale, train.lr_act_scale, train.lr_bias)
        if not first or not self.one.weights or not steps or first == train.iterations:
            return [dataclasses.replace(self.one, name=LEARNED)]
        alone = {"iterations": first, "lr_rounding": 0.0, "round_weight": 0.0}
        rest = {"iterations": train.iterations - first}
        return [
            dataclasses.replace(self.one, name=STEPS, train=train.model_copy(update=alone)),
            dataclasses.replace(self.one, name=LEARNED, train=train.model_copy(update=rest)),
        ]

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

    def _grids(self, network: Network, acts: Sequence[str]) -> list[LearnedGrid]:
        """Return the grids below 8 bits, each once; wider ones lose nothing by calibration."""
        found = dict.fromkeys(network.grids[name] for name in acts)
        return [grid for grid in found if grid.scheme.bits < MAX_BITS]
