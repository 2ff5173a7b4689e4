"""What a game begins with: a quantized state and options in, both players on the field out."""

from __future__ import annotations

import torch

from dfqc.compiler.contracts import QuantState
from dfqc.compiler.graph import Graph
from dfqc.compiler.opponent import Opponent
from dfqc.compiler.quantize._game import Game
from dfqc.compiler.quantize._game_options import GameOptions, resolve
from dfqc.compiler.quantize._student import Student, StudentOptions

# As published: steps of weights span them as they are, ranges of activations follow the images.
FRESH = StudentOptions.model_validate(
    {"weight_grid": "minmax", "act_grid": "ema", "latent": "float"}
)
# From codes, steps and biases that were learned, in units of themselves.
LEARNED = StudentOptions.model_validate(
    {"weight_grid": "learned", "act_grid": "learned", "latent": "codes", "relative": True}
)


def set_up(
    graph: Graph,
    teacher: Graph,
    state: QuantState,
    opponent: Opponent,
    options: GameOptions,
    *,
    learned: bool,
    seed: int,
    device: torch.device,
) -> Game:
    """Return a game about to begin.

    Args:
        graph: folded; the student's.
        teacher: unfolded.
        state: what the student begins with.
        opponent: makes the images.
        options: of the game.
        learned: whether the state's codes and steps are kept and learned on, by Adam; else the
            published student takes weights and plan alone, and learns by SGD.
        seed: of the images that are looked at.
        device: where both play.
    """
    settings = resolve(options, graph.image.size)
    student = Student(graph, state, LEARNED if learned else FRESH, device=device)
    rate = settings.lr_student
    optimizer: torch.optim.Optimizer
    if learned:
        groups = student.parameter_groups(
            weights=options.lr_latent,
            weight_scales=options.lr_steps,
            act_scales=options.lr_steps,
            biases=options.lr_steps,
        )
        optimizer = torch.optim.Adam(groups)
    else:
        groups = student.parameter_groups(weights=rate, biases=rate, decay=options.weight_decay)
        optimizer = torch.optim.SGD(
            groups, momentum=options.momentum, nesterov=options.momentum > 0
        )
    return Game(student, opponent, teacher, options, settings, optimizer, seed=seed, device=device)
