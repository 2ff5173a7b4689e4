"""AdaDFQ's generator (Qian et al. 2023): labels in, images out that teach a quantized network.

It is trained in a game against a student, a quantized copy of the model with bits of its own: the
images are those about which both disagree, but not too much. Of several images drawn per label, one
is taken whose adaptability lies in the bounds. `--quantizer adadfq` plays the same game against the
network that is built, and reads other images for ranges and for judging only; this one gives images
to other quantizers. The student's bits are `bits`, whatever is built of the images, so that builds
of other bits share them. AdaSG is `method` "adasg".

`max` is as published, but for what `dfqc.compiler.quantize.adadfq` says.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from dfqc.calib import _adaptability as adaptability
from dfqc.calib._conditional import count_outputs, count_weights
from dfqc.calib._pixels import ImageOptions, finish
from dfqc.calib._player import Player, count_classes
from dfqc.compiler.contracts import CalibSet, Checkpoint, Progress, Supplies, silent
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph
from dfqc.compiler.opponent import Opponent
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.plan import make_plan
from dfqc.compiler.quantize import rtn
from dfqc.compiler.quantize._game import Game, Part
from dfqc.compiler.quantize._game_options import PUBLISHED_ITERATIONS, GameOptions
from dfqc.compiler.quantize._game_start import set_up
from dfqc.compiler.spec import TargetSpec, parse_bits

NEEDS_BN = True
NEEDS_CLASSES = True
USES_ZOO = False
CARRIES = True

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"iterations": 500},
    "standard": {"iterations": 4000},
    "max": {"iterations": PUBLISHED_ITERATIONS, "clip_inside": False},
}
# The student's: grids on the inputs of layers only, as in the papers. Which target will be built is
# not known here.
_TARGET = TargetSpec(
    name="adadfq", description="inputs of layers", weight_bits=tuple(range(2, 9)),
    act_bits=tuple(range(2, 9)), integer_ops=("Conv2d", "Linear"), act_signed=False,
    act_symmetric=False, placement="inputs", clip="float", bias="float32", packed_int4=False,
)  # fmt: skip
_PARTS = 5  # of the game, after each of which the generator is looked at
_PASSES = 2.7  # of an iteration, forward and backward: two networks and the generator
_TIMED = 16  # images that are drawn to see how long that takes
_DRAWING = 1.2  # of the time that drawing is measured to take, that is left for it
_PLAYING = 0.5  # of all the time, that the game has at least
_RANGES = 64  # images for the ranges that the student begins with
_CLASSES = 1000  # where they are not known: for estimates


class Options(GameOptions, ImageOptions):
    """Options of the game, of the student and of the images.

    `bits`: of the student, all layers. `batch_size`: images that are drawn together; the game is
    played for the first of them, and the others are drawn by the generator that it left.
    `candidates`: images drawn per image that is taken.
    """

    batch_size: int = Field(256, ge=1)
    bits: str = Field("w4a4", pattern="^w[2-8]a[2-8]$")
    candidates: int = Field(4, ge=1)


def check_given(options: Options, given: Sequence[str]) -> None:
    """Refuse options of a student that begins reconstructed: this one's is rounded to nearest.

    Raises:
        UsageError: names them, and what reads them.
    """
    unread = [name for name in given if name in ("lr_latent", "lr_steps")]
    if unread:
        raise UsageError(
            f"adadfq: {', '.join(unread)}: read only by --quantizer adadfq with start=reconstruct; "
            "the student that images are made against learns at lr_student"
        )


def count_passes(options: Options, size: tuple[int, int, int], nets: int) -> float:
    """Return the forward-and-backward passes per image, for a full batch with its game."""
    return _PASSES * options.iterations * options.game_batch / options.batch_size


def count_carried(options: Options) -> float:
    """Return the work of a batch that is only drawn: time for it is left by the game before."""
    return 0.0


def count_bytes(options: Options, size: tuple[int, int, int], count: int) -> int:
    """Return the bytes of the generator with what Adam keeps, its outputs, and the candidates."""
    drawn = options.candidates * count * size[0] * size[1] * size[2]
    return _player_bytes(options, size, _CLASSES) + 4 * drawn


def count_player_bytes(graph: Graph, options: GameOptions) -> int:
    """Return the bytes of the generator that plays against a student of `graph`."""
    return _player_bytes(options, graph.image.size, count_classes(graph))


def make_opponent(
    graph: Graph, options: GameOptions, *, rng: torch.Generator, device: torch.device
) -> Opponent:
    """Return a new generator that learns against the unfolded teacher `graph` and a student.

    Raises:
        UnsupportedError: the model does not classify.
    """
    return Player(graph, options, rng=rng, device=device)


def synthesize(
    graph: Graph,
    count: int,
    options: Options,
    *,
    rng: torch.Generator,
    device: torch.device,
    progress: Progress = silent,
    supplies: Supplies = Supplies(),
) -> CalibSet:
    """Return one batch of `count` images with labels; on a CPU, equal seeds give equal images.

    `carry` holds both players: the next batch is drawn by them, without another game. Parts of
    the game are kept as checkpoints.

    Raises:
        UnsupportedError: the model does not classify.
        UsageError: rates at which the game breaks down at once.
    """
    seed = rng.initial_seed()
    begin = time.monotonic()
    player = Player(graph, options, rng=rng, device=device)
    game = _set_up(graph, player, options, seed, device)
    info: dict[str, Any]
    if supplies.carry:
        player.load_generator(supplies.carry)
        game.student.restore(_student_of(supplies.carry))
        progress(1, 1, "drawn by the generator of the first batch")
        info = {"iterations": 0, "shortened": False, "collapse": ""}
    else:
        end = None
        if supplies.seconds is not None:
            drawing = _DRAWING * (count + supplies.following) * _time_drawing(player, game, options)
            end = begin + max(_PLAYING * supplies.seconds, supplies.seconds - drawing)
        info = _play(game, end, progress, supplies.checkpoint)
    labels = supplies.labels
    if labels is None:
        order = torch.randperm(player.classes, generator=rng, device=rng.device).cpu()
        labels = order.repeat(-(-count // player.classes))[:count]
    z, share = _draw(player, game, labels, options, rng)
    images = finish(z, player.pixels, options)
    info |= {"bits": options.bits, "method": options.method, "in_bounds": share}
    carry = {f"generator/{k}": v.cpu() for k, v in player.generator.state_dict().items()}
    carry |= {f"student/{k}": v for k, v in game.student.snapshot().items()}
    return CalibSet(images, labels, "adadfq", info, carry)


def _set_up(
    graph: Graph, player: Player, options: Options, seed: int, device: torch.device
) -> Game:
    """Return a game against a copy of the model that is rounded to nearest."""
    folded = fold(graph)
    bits = parse_bits(options.bits)
    plan = make_plan(folded, _TARGET, bits, [], ends=None)
    own = torch.Generator(device).manual_seed(seed)
    drawn = player.draw(torch.arange(_RANGES) % player.classes, own)
    ranges = CalibSet(drawn, None, "adadfq")
    state = rtn.quantize(
        folded, ranges, plan, rtn.Options.model_validate({}), rng=own, device=device
    )
    return set_up(folded, graph, state, player, options, learned=False, seed=seed, device=device)


def _play(
    game: Game, end: float | None, progress: Progress, checkpoint: Checkpoint
) -> dict[str, Any]:
    """Play the game, until `end` at most; where the generator collapsed, go back a part."""

    def left() -> float | None:
        return None if end is None else max(0.0, end - time.monotonic())

    notes: list[dict[str, Any]] = []
    sound: Part | None = None
    for part in game.play(_PARTS, seconds=left, progress=progress, checkpoint=checkpoint):
        notes.append(part.notes())
        if not part.collapse:
            sound = part
    if notes[-1]["collapse"] and sound is not None:
        game.restore(sound.tensors)
    elif notes[-1]["collapse"] and notes[-1]["loss"] is None:  # it was no number
        raise UsageError(
            f"adadfq: the game broke down in its first part ({notes[-1]['collapse']}), so there is "
            "no generator to draw from: lower its rates (--synth-option "
            "lr_generator=… or lr_student=…)"
        )
    return {
        "iterations": sum(note["iterations"] for note in notes),
        "shortened": any(note["shortened"] for note in notes),
        "collapse": notes[-1]["collapse"],
        "losses": [note["loss"] for note in notes],
    }


def _time_drawing(player: Player, game: Game, options: Options) -> float:
    """Return the seconds per image; the players stay as they are."""
    rng = torch.Generator(player.device).manual_seed(0)
    labels = torch.arange(_TIMED) % player.classes
    for _ in range(2):  # the first time, memory is allocated
        begin = time.monotonic()
        _draw(player, game, labels, options, rng)
    return (time.monotonic() - begin) / _TIMED


@torch.no_grad()
def _draw(
    player: Player, game: Game, labels: Tensor, options: Options, rng: torch.Generator
) -> tuple[Tensor, float]:
    """Return z (n, c, h, w) of the labels, and the share whose adaptability is in the bounds.

    Of an image's candidates the first that is in the bounds is taken, else the nearest to them.
    """
    drawn = torch.stack([player.draw_standardized(labels, rng) for _ in range(options.candidates)])
    gaps = []
    for z in drawn.flatten(0, 1).split(_RANGES):
        images = player.pixels.to_normalized(z)
        _, teacher = player.teacher(images)
        gaps.append(adaptability.disagreement(teacher, game.student(images)))
    spread = adaptability.normalized_entropy(torch.cat(gaps)).view(options.candidates, -1)
    lower, upper = game.settings.lambda_l, options.lambda_u
    outside = (lower - spread).clamp_min(0) + (spread - upper).clamp_min(0)
    chosen = outside.argmin(0)  # the first of equals
    taken = torch.arange(len(labels), device=chosen.device)
    inside = adaptability.in_bounds(spread[chosen, taken], lower, upper)
    return drawn[chosen, taken], float(inside.double().mean())


def _student_of(carry: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "student/"
    return {k.removeprefix(prefix): v for k, v in carry.items() if k.startswith(prefix)}


def _player_bytes(options: GameOptions, size: tuple[int, int, int], classes: int) -> int:
    weights = count_weights(size, classes, options.channels)
    return 4 * (4 * weights + options.game_batch * count_outputs(size, options.channels))
