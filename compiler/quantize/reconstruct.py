"""Block reconstruction: rounding, steps and biases learned block by block on synthetic images.

In: a folded graph, calibration images and a plan. Out: a `QuantState`. `adaround`, `brecq`,
`qdrop` and `genie-m` are settings of this loop; its own settings start from the closed form and
need a fraction of their iterations. Per unit, what is ready (the closed form; without one, rounding
to nearest) and what was learned are compared and the best is kept; so at the end for the network,
where rounding to nearest, the closed form and SQuant stand beside it: none of these settings ships
what is farther from float, on images not learned from, than the closed form by itself.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import ConfigDict, Field

from dfqc.compiler.contracts import CalibSet, Progress, QuantizerSupplies, QuantState, silent
from dfqc.compiler.graph import Graph, layer_nodes, node_shapes, on_device
from dfqc.compiler.judging import Copies, count_judges, split_judges
from dfqc.compiler.passes.bias import CORRECTED
from dfqc.compiler.quantize import _check, gptq, rtn, squant
from dfqc.compiler.quantize._check import check_options
from dfqc.compiler.quantize._choice import (
    correct_biases,
    judging_bytes,
    judging_parts,
    keep_best,
    led_astray,
)
from dfqc.compiler.quantize._micro import estimate_bytes
from dfqc.compiler.quantize._passes import TUNED, Run, cache_bytes, plan_passes
from dfqc.compiler.quantize._stream import CacheKind
from dfqc.compiler.quantize._targets import make_targets
from dfqc.compiler.quantize._train import TrainOptions
from dfqc.compiler.quantize._units import UnitKind, merge_blocks, read_spans
from dfqc.compiler.quantize._walker import CLOSED, NEAREST
from dfqc.compiler.spec import Plan


class Options(TrainOptions):
    """Options of the reconstruction; those of one unit's training are in `TrainOptions`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # As the inherited loop, but for these. Measured on CIFAR-10 ResNet-20 at W2A4 and W4A4.
    rounding: Literal["soft", "flex"] = "flex"
    lr_rounding: float = Field(5e-3, ge=0)
    lr_weight_scale: float = Field(3e-3, ge=0)
    lr_act_scale: float = Field(1e-2, ge=0)
    lr_bias: float = Field(1e-3, ge=0)
    relative: bool = True
    unit: UnitKind = "block"
    merge: int = Field(1, ge=1, description="neighboring blocks per unit (MRECG)")
    join: str = Field(
        "", description="neighboring blocks that are one unit, as FIRST..LAST,FIRST..LAST (MRECG)"
    )
    least_layers: int = Field(2, ge=1, description="per unit, where a block has fewer")
    step_share: float = Field(
        0.4, ge=0, lt=1, description="of the iterations before rounding is learned too"
    )
    start: Literal["closed", "nearest"] = Field("closed", description="rounding to begin with")
    order: Literal["joint", "weights-first"] = Field(
        "joint", description="weights-first: activation steps in a second pass (BRECQ)"
    )
    act_iterations: int = Field(5000, ge=1, description="of the second pass of weights-first")
    lr_act_second: float = Field(4e-4, ge=0, description="of the second pass of weights-first")
    tune_iterations: int = Field(
        100, ge=0, description="steps and biases of the whole network, after all units"
    )
    tune_rate: float = Field(1e-3, ge=0)
    tune_rounding: float = Field(0.0, ge=0, description="rate of the codes in it; 0 keeps them")
    tune_temperature: float = Field(2.0, gt=0)
    weighting: Literal["none", "fisher"] = Field("none", description="of the error (BRECQ)")
    output_weight: float = Field(0.0, ge=0, description="weight of the output's KL (PD-Quant)")
    output_temperature: float = Field(4.0, gt=0)
    skip_wide: bool = Field(True, description="leave units alone that have 8 bits everywhere")
    skip_first: bool = Field(
        False, description="learn nothing in the first unit (BRECQ: the first layer)"
    )
    keep_best: bool = Field(True, description="per unit, what is best on held-out images")
    compete: bool = Field(True, description="closed form and SQuant may win in the end")
    copies: int = Field(
        4, ge=1, description="of each calibration image to learn from: mirrored, shifted"
    )
    cache: CacheKind = Field("float32", description="of the units' inputs and outputs")
    weights: Literal["mse", "minmax"] = "mse"
    acts: Literal["mse", "minmax", "percentile"] = "mse"
    percentile: float = Field(99.99, gt=50, le=100)
    pass_size: int = Field(64, ge=1, description="images per pass without gradients")


class Published(Options):
    """The loop as its papers share it; each of them sets the rest.

    What none of the papers does stays: the states that learning starts from have corrected biases
    (`--bias-correction none` leaves them); activation grids of 8 bits and more are neither learned
    nor dropped; every fourth image, or some 256 of many, is put aside and judges; and by these, the
    start is kept for a unit where learning made it no better, so that the units behind it see that
    (`keep_best=false` leaves this out). In the end the closed form and SQuant, which no unit begins
    with, stand beside what was learned, and the best is kept (`compete=false` leaves this out).
    """

    rounding: Literal["soft", "flex"] = "soft"
    relative: bool = False
    skip_wide: bool = False
    least_layers: int = Field(1, ge=1)
    step_share: float = Field(0.0, ge=0, lt=1)
    tune_iterations: int = Field(0, ge=0)
    copies: int = Field(1, ge=1)
    start: Literal["closed", "nearest"] = "nearest"
    iterations: int = Field(20_000, ge=1, description="per block")
    lr_rounding: float = Field(1e-3, ge=0)
    lr_weight_scale: float = Field(0.0, ge=0)
    lr_act_scale: float = Field(0.0, ge=0)
    lr_bias: float = Field(0.0, ge=0)


PRESETS: dict[str, dict[str, object]] = {
    "quick": {"iterations": 250},
    "standard": {"iterations": 1000, "tune_iterations": 300},
    "max": {"iterations": 20_000, "tune_iterations": 300},
}
# Ranges, bias corrections and comparisons, in passes of the calibration set.
_JUDGING = 20.0
_ADVANCING = 3.0  # of a copy through both networks, and its targets
_TRAINING = 4.5  # forward and backward pass with what learns around it, in forward passes
_CHOOSING = 128  # images that judge units; the network is judged by all
_FLIPPED = "squant"  # stands for the network as a whole, and is no unit's


def count_passes(options: Options, samples: int, narrow: float = 1.0) -> float:
    """Return the images that go through the network: every unit that learns sees its part."""
    ready = gptq.count_passes(gptq.Options.model_validate({}), samples) + _JUDGING * samples
    ready += _ADVANCING * (options.copies - 1) * samples
    share = narrow if options.skip_wide else 1.0
    iterations = share * sum(one.train.iterations for one in plan_passes(options))
    iterations += options.tune_iterations if narrow else 0
    return ready + _TRAINING * iterations * min(options.batch_size, samples)


def count_bytes(
    options: Options,
    graph: Graph,
    samples: int,
    memory_bytes: int | None = None,
    unpruned: Graph | None = None,
) -> int:
    """Return what is kept: a unit's inputs and outputs, or what the closed form keeps."""
    closed = gptq.count_bytes(gptq.Options.model_validate({}), graph, samples, memory_bytes)
    learning = estimate_bytes(graph, min(options.batch_size, samples), memory_bytes)
    width = {"float32": 4, "float16": 2, "recompute": 0}[options.cache]
    rows = options.copies * (samples - count_judges(samples)) + _CHOOSING
    cached = int(rows * _cached_values(options, graph, width, unpruned))
    cached = min(cache_bytes(memory_bytes), cached)
    return max(closed, learning + cached) + judging_bytes(graph, samples)


def _cached_values(
    options: Options, graph: Graph, width: int, unpruned: Graph | None = None
) -> float:
    """Return the bytes that caches hold per image where they hold most, each value of `width`.

    In a unit: its inputs of both networks and its target, Fisher's weights of half the width of
    float32 beside it; a layer's unit, those of its block too. Between two units: the next one's
    inputs, and the last one's in the quantized network. What comes from the `unpruned` network is
    as wide as that, until a unit takes the channels that are left.
    """
    size = _values(graph)
    whole = size if unpruned is None else size | _values(unpruned)
    nodes = dict(layer_nodes(graph))
    regions = merge_blocks(graph, nodes, options.merge, options.least_layers, options.join)
    fisher = 2.0 if options.weighting == "fisher" else 0.0
    most = 0.0
    for block in regions:
        entry, end = size[block.entry], size[block.exit]
        both = whole[block.entry] + entry  # where the unit begins, in both networks
        picked = entry if whole[block.entry] != entry else 0
        held = [both + whole[block.exit], entry + whole[block.exit] + end]
        if options.unit == "block":
            held.append(both + picked + end)
        for name in block.layers if options.unit == "layer" else ():
            into, out = size[nodes[name].all_input_nodes[0].name], size[nodes[name].name]
            held.append(both + 2 * into + out)
        most = max(most, width * max(held) + fisher * end)
    return most


def _values(graph: Graph) -> dict[str, int]:
    """Return the values of every node of a graph, for one image."""
    return {name: math.prod(shape) for name, shape in node_shapes(graph).items()}


def named(name: str) -> Callable[..., QuantState]:
    """Return `quantize` of a plug-in that runs this loop under its own name and options."""

    def quantize(
        graph: Graph,
        calib: CalibSet,
        plan: Plan,
        options: Options,
        *,
        rng: torch.Generator,
        device: torch.device,
        progress: Progress = silent,
        supplies: QuantizerSupplies = QuantizerSupplies(),
    ) -> QuantState:
        """Learn rounding, weight steps, activation steps and biases block by block.

        Args:
            graph: folded graph.
            calib: images (n, c, h, w) in normalized space.
            plan: what each layer and tensor gets.
            options: the method.
            rng: its seed is that of every unit's own generator.
            device: where everything runs.
            progress: called per iteration.
            supplies: held-out images, time, memory; finished units are kept as checkpoints. With
                `unpruned`, what the original network computes is learned.

        Raises:
            UsageError: options that exclude each other.
        """
        return _reconstruct(name, graph, calib, plan, options, rng, device, progress, supplies)

    return quantize


quantize = named("reconstruct")
check_given = _check.check_given("reconstruct")
check_graph = _check.check_graph("reconstruct")


def _reconstruct(
    name: str,
    graph: Graph,
    calib: CalibSet,
    plan: Plan,
    options: Options,
    rng: torch.Generator,
    device: torch.device,
    progress: Progress,
    supplies: QuantizerSupplies,
) -> QuantState:
    """Run the loop; see `named`."""
    check_options(options)
    read_spans(graph, options.join)  # a wrong name ends this here, not behind the closed form
    start = time.monotonic()
    graph = on_device(graph, device)
    images, own = split_judges(calib.images)  # what judges is not fitted to
    judges = judging_parts(own, supplies) or [images]
    ready = _ready(graph, calib, plan, options, rng=rng, device=device, supplies=supplies)
    left = None if supplies.seconds is None else supplies.seconds - (time.monotonic() - start)
    learning, choosing = Copies(images, options.copies, rng), judges[-1][:_CHOOSING]
    targets = make_targets(graph, supplies.unpruned, device)
    run = Run(
        *(graph, plan, options, learning, choosing),
        {name: state for name, state in ready.items() if name in _begun(options)},
        *(rng.initial_seed(), device),
        targets=targets,
    )
    learned, notes = run.all_passes(progress, supplies, left)
    state = list(learned.values())[-1]
    info = {"quantizer": name, "start": options.start, **notes}
    info["learned_biases"] = _learns_biases(options, list(learned)[-1])
    if options.keep_best:
        states = {**ready, **learned}
        state, scores = keep_best(graph, states, judges, targets, device)
        kept = min(scores, key=lambda name: scores[name])
        if kept in learned and CLOSED in ready and len(own):
            astray, beyond = led_astray(graph, ready[CLOSED], learned, supplies, targets, device)
            able = [CLOSED, *(n for n in learned if n not in astray)] if kept in astray else [kept]
            kept = min(able, key=lambda name: scores[name])
            state, info = states[kept], {**info, "led_astray": astray, "matched_distance": beyond}
        info |= {"kept": kept, "heldout_distance": scores}
        info["learned_biases"] = kept in learned and _learns_biases(options, kept)
    info[CORRECTED] = info.get("kept") in ready
    return dataclasses.replace(state, info={**state.info, **info})


def _learns_biases(options: Options, kept: str) -> bool:
    """Report whether biases of what was learned are fitted: another correction would undo that."""
    return options.lr_bias > 0 or (kept == TUNED and options.tune_rate > 0)


def _begun(options: Options) -> tuple[str, ...]:
    """Name the ready states that units begin with, and fall back to."""
    return (NEAREST, CLOSED) if options.start == "closed" else (NEAREST,)


def _ready(
    graph: Graph,
    calib: CalibSet,
    plan: Plan,
    options: Options,
    *,
    rng: torch.Generator,
    device: torch.device,
    supplies: QuantizerSupplies,
) -> dict[str, QuantState]:
    """Return the states that need no training, biases corrected: what learning must beat."""
    ranges = {name: getattr(options, name) for name in ("weights", "acts", "percentile")}
    ranges["batch_size"] = options.pass_size
    states = {}
    for name, plugin in ((NEAREST, rtn), (CLOSED, gptq), (_FLIPPED, squant)):
        if name not in _begun(options) and not (options.keep_best and options.compete):
            continue
        state = plugin.quantize(
            *(graph, calib, plan, plugin.Options.model_validate(ranges)),
            rng=rng,
            device=device,
            supplies=supplies,
        )
        states[name] = correct_biases(graph, state, calib, supplies, device)
    return states
