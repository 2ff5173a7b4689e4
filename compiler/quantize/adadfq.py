"""AdaDFQ (Qian et al. 2023): a generator and the quantized network play a zero-sum game.

In: a folded graph and a plan; images are made while they are learned from. Out: a `QuantState`. The
generator (`dfqc.calib.adadfq`) makes images about which float and quantized network disagree, but
not too much, and that look to the float one like their class and like its training data; the
quantized network learns the float one's answers to them. AdaSG is `method` "adasg".

`max` is as published, 400 epochs of 200 iterations of 16 images, with what follows changed:
- Ranges of activations follow a mean of the batches' extremes. In the released code, as in that of
  GDFQ before it, the correction of its beginning is applied to what is already corrected: inputs
  that are always 1 are read as 3904 at the 20th update, and as 1 only after some 200. Here the mean
  begins with the first batch and is right from there on, so that warm-ups can be short.
- The released code only runs with batches of 16. Here the adaptability is normalized per batch, of
  any size.
- Batch norms are folded into the student's layers, and their scales and shifts so trained with
  weights and biases; the plan decides which tensors have a grid, and how many bits the ends have.
  The network begins with biases corrected for its rounding; weight decay is that of weights alone.
- Ranges of 4 bits and more are symmetric for weights, and what lies outside of an activation's grid
  gets no gradient. The settings by size of the image are those of ResNet-20 and ResNet-18; the
  published ones of single networks and bits (a ResNet-50's rate, other bounds) are options.
- On an accelerator that has it, layers compute in bfloat16 (`precision` "float32": as published).
- The last state is judged, on synthetic images, against the start and those on the way. The
  published figures are those of the best epoch on the test set.

`start` "reconstruct" learns on from codes, steps and biases of a block reconstruction: steps are
learned, by LSQ, with rates of their own (`lr_latent`, `lr_steps`).

Measured on a CIFAR-10 ResNet-20 at W3A3, k bits everywhere (`benchmarks/training.py`; float 91.60,
5,000 images), 500 iterations: from a reconstruction (88.92) the last state is at 89.08, and 88.68
is shipped; with the published start at 79.40 (its start, 84.90, is shipped): so short a game is
not worth it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from pydantic import Field

from dfqc.compiler import plugins
from dfqc.compiler.contracts import CalibSet, Progress, QuantizerSupplies, QuantState, silent
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph, count_params, on_device
from dfqc.compiler.judging import split_judges
from dfqc.compiler.opponent import MakesOpponents
from dfqc.compiler.options import plugin_options
from dfqc.compiler.passes.bias import CORRECTED
from dfqc.compiler.quantize import reconstruct, rtn
from dfqc.compiler.quantize._choice import (
    blind_distance,
    correct_biases,
    distance,
    judging_bytes,
    judging_parts,
)
from dfqc.compiler.quantize._game import Game, Part
from dfqc.compiler.quantize._game_options import PUBLISHED_ITERATIONS, GameOptions, resolve
from dfqc.compiler.quantize._game_start import set_up
from dfqc.compiler.quantize._targets import make_targets
from dfqc.compiler.spec import Plan

log = logging.getLogger(__name__)


class Options(GameOptions):
    """Options of the game, of what it begins with and of what is kept.

    `start`: `published` rounds the float weights to nearest; see above for `reconstruct`, whose
    iterations per block are `start_iterations`.
    `parts`: of the game; after each one the state is stored and judged, and the generator looked
    at. `keep_best`: return the best of the start and all of them, by images not learned from.
    """

    start: Literal["published", "reconstruct"] = "published"
    start_iterations: int = Field(250, ge=1)
    parts: int = Field(10, ge=1)
    keep_best: bool = True


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"iterations": 500, "start": "reconstruct", "start_iterations": 250},
    "standard": {"iterations": 4000, "start": "reconstruct", "start_iterations": 1000, "parts": 20},
    "max": {"iterations": PUBLISHED_ITERATIONS, "parts": 40, "clip_inside": False},
}
# Options that one start alone reads: only the published one learns by SGD and follows ranges.
_READ_BY = dict.fromkeys(("start_iterations", "lr_latent", "lr_steps"), "reconstruct") | (
    dict.fromkeys(("lr_student", "momentum", "weight_decay", "observe"), "published")
)
OPPONENT = "adadfq"  # the synthesizer that is loaded by name: its code is part of the cache's key
# What is kept is the start, the last state of the game, or the best on its way.
START, LAST, BEST = "start", "trained", "best"
_LOST = 2.0  # times the distance of a constant answer
_TUNE_SHARE = 0.4  # iterations of the network, per iteration of a block, in a reconstruction
_START_SHARE = 0.4  # of the time, for a reconstruction before the game
# A student's and a teacher's pass each forward and twice back, the generator's beside them.
_PASSES = 8.0


def check_given(options: Options, given: Sequence[str]) -> None:
    """Refuse options that the chosen start would not read.

    Raises:
        UsageError: names them, and the start that does.
    """
    unread = [name for name in given if _READ_BY.get(name, options.start) != options.start]
    if unread:
        it, other = ("it", "is") if len(unread) == 1 else ("them", "are")
        start = _READ_BY[unread[0]]
        raise UsageError(
            f"adadfq: {', '.join(unread)} {other} read by start={start} only, got "
            f"start={options.start}: leave {it} out, or give start={start}"
        )


def count_passes(options: Options, samples: int, narrow: float = 1.0) -> float:
    """Return the images that go through the network, a backward pass counted as two."""
    start = 0.0
    if options.start == "reconstruct":
        start = reconstruct.count_passes(_start_options(options), samples, narrow)
    return start + _PASSES * options.iterations * options.game_batch + 6.0 * samples


def count_bytes(
    options: Options,
    graph: Graph,
    samples: int,
    memory_bytes: int | None = None,
    unpruned: Graph | None = None,
) -> int:
    """Return what is kept: the student thrice, and the generator with its optimizer."""
    maker = plugins.load("synthesizer", OPPONENT)
    start = 0
    if options.start == "reconstruct":
        start = reconstruct.count_bytes(
            _start_options(options), graph, samples, memory_bytes, unpruned
        )
    players = 4 * 6 * count_params(graph) + int(maker.count_player_bytes(graph, options))
    return max(start, players + judging_bytes(graph, samples))


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
    """Play the game and return the last state, or the best.

    Args:
        graph: folded graph.
        calib: images (n, c, h, w) in normalized space: for the start, and for judging.
        plan: what each layer and tensor gets.
        options: the game.
        rng: its seed is that of everything that is drawn.
        device: where everything runs.
        progress: called per iteration.
        supplies: the unfolded teacher, held-out images, time; parts are kept as checkpoints.

    Raises:
        UnsupportedError: the model does not classify.
    """
    begin = time.monotonic()

    def left() -> float | None:
        if supplies.seconds is None:
            return None
        return max(0.0, supplies.seconds - (time.monotonic() - begin))

    graph = on_device(graph, device)
    teacher = supplies.unpruned.graph if supplies.unpruned else supplies.unfolded or graph
    seed = rng.initial_seed()
    # Before the start, which takes time: a model without classes is refused here.
    maker = cast(MakesOpponents, plugins.load("synthesizer", OPPONENT))
    own = torch.Generator(device).manual_seed(seed)
    opponent = maker.make_opponent(teacher, options, rng=own, device=device)
    state = _start(graph, calib, plan, options, rng, device, progress, supplies)
    game = set_up(
        *(graph, teacher, state, opponent, options),
        learned=options.start == "reconstruct", seed=seed, device=device,
    )  # fmt: skip
    judges = judging_parts(split_judges(calib.images)[1], supplies) or [calib.images]
    targets = make_targets(graph, supplies.unpruned, device)
    contest = _Contest(
        *(game, lambda found: distance(graph, found, judges, targets, device), state),
        blind_distance(judges, targets, device),
    )
    for part in game.play(
        options.parts, seconds=left, progress=progress, checkpoint=supplies.checkpoint
    ):
        contest.add(part)
        if contest.collapse:
            break
    return contest.finish(options, resolve(options, graph.image.size).to_json())


def _start_options(options: Options) -> Any:
    chosen = {
        "iterations": options.start_iterations,
        "tune_iterations": round(_TUNE_SHARE * options.start_iterations),
    }
    return plugin_options(reconstruct, "reconstruct", "quick", chosen)


def _start(
    graph: Graph,
    calib: CalibSet,
    plan: Plan,
    options: Options,
    rng: torch.Generator,
    device: torch.device,
    progress: Progress,
    supplies: QuantizerSupplies,
) -> QuantState:
    """Return the state before the game: reconstructed, or rounded, biases corrected."""
    if options.start == "reconstruct":
        seconds = None if supplies.seconds is None else _START_SHARE * supplies.seconds
        return reconstruct.quantize(
            *(graph, calib, plan, _start_options(options)),
            rng=rng,
            device=device,
            progress=progress,
            supplies=dataclasses.replace(supplies, seconds=seconds),
        )
    state = rtn.quantize(graph, calib, plan, rtn.Options.model_validate({}), rng=rng, device=device)
    return correct_biases(graph, state, calib, supplies, device)


class _Contest:
    """The start and what the game's parts left; only the best of them and the last are kept."""

    def __init__(
        self, game: Game, judge: Callable[[QuantState], float], start: QuantState, blind: float
    ) -> None:
        self.game, self.judge, self.start = game, judge, start
        self.states = {START: start}
        self.distances = {START: judge(start)}
        self.blind, self.told = blind, False  # whether the student once told more than nothing
        self.collapse = ""
        self.parts: list[dict[str, Any]] = []

    def add(self, part: Part) -> None:
        """Judge what a part left; a network that is not finite is no candidate.

        One that is twice as far from the float network as a constant answer, and as the start,
        and was nearer once, has collapsed.
        """
        self.parts.append(part.notes())
        self.collapse = part.collapse
        # Bounds of a range are no numbers until something is seen.
        own = [
            v for n, v in part.tensors.items() if n.startswith("student/") and "/bounds/" not in n
        ]
        if not all(bool(torch.isfinite(value).all()) for value in own):
            return
        state = self.game.student.state()
        found = self.judge(state)
        if not math.isfinite(found):
            self.collapse = self.collapse or "the student's answers are no numbers"
            return
        self.parts[-1]["distance"] = found
        if found < self.distances.get(BEST, math.inf):
            self.states[BEST], self.distances[BEST] = state, found
        self.states[LAST], self.distances[LAST] = state, found
        lost = self.told and found > _LOST * max(self.blind, self.distances[START])
        self.told |= found < self.blind
        if lost and not self.collapse:
            self.collapse = "the student collapsed: its answers tell less than a constant one"
            log.warning("adadfq: %s: the game ends", self.collapse)

    def finish(self, options: Options, settings: dict[str, Any]) -> QuantState:
        """Return the best state, or the last, with notes for the manifest."""
        kept = LAST if LAST in self.states else START
        if options.keep_best:
            order = [name for name in (LAST, BEST, START) if name in self.states]
            kept = min(order, key=lambda name: self.distances[name])
            if kept == START:
                log.warning("adadfq: nothing in the game was better than its start, which is kept")
        about = self.start.info
        info = {
            "quantizer": "adadfq",
            "start": options.start,
            "start_kept": about.get("kept", "nearest"),
            "kept": kept,
            "heldout_distance": self.distances,
            "last": self.parts[-1] if self.parts else {},
            "collapsed": self.collapse,
            "iterations": sum(part["iterations"] for part in self.parts),
            "shortened": any(part["shortened"] for part in self.parts)
            or bool(about.get("shortened")),
            "learned_biases": kept != START or bool(about.get("learned_biases")),
            CORRECTED: kept == START and bool(about.get(CORRECTED)),
            "game": {"method": options.method, **settings},
            "parts": self.parts,
        }
        return dataclasses.replace(self.states[kept], info={**about, **info})
