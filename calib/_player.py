"""AdaDFQ's generator as a player: a teacher and a student in, images to learn from out.

It descends L_G = L_bound + beta (alpha_ds L_ds + alpha_as L_as) + gamma L_BNS (Qian et al. 2023),
through teacher and student; the parts of the sum are in `_adaptability`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam

from dfqc.calib import _adaptability as adaptability
from dfqc.calib._bns import BNTeacher, Moments
from dfqc.calib._conditional import LATENT, ConditionalGenerator
from dfqc.calib._pixels import Z_HIGH, Z_LOW, pixel_map
from dfqc.compiler.errors import UnsupportedError
from dfqc.compiler.graph import Graph, batch_norms, copy_graph, node_shapes
from dfqc.compiler.opponent import Move
from dfqc.compiler.precision import Precision, choose_precision
from dfqc.compiler.quantize._game_options import GameOptions, resolve
from dfqc.compiler.quantize._optimizer import pack_optimizer, unpack_optimizer

log = logging.getLogger(__name__)

_BETAS = (0.5, 0.999)  # of Adam (published)
_DRAWN = 64  # images of one draw: norms read their own batch


class Terms(NamedTuple):
    """The parts of the generator's loss, scalars."""

    bounds: Tensor
    disagreement: Tensor
    agreement: Tensor
    statistics: Tensor


class Player:
    """The generator, its teacher and its optimizer; an `Opponent`.

    Attributes:
        classes: how many the teacher tells apart.
        generator: the network that makes images.
    """

    def __init__(
        self, graph: Graph, options: GameOptions, *, rng: torch.Generator, device: torch.device
    ) -> None:
        self.classes = count_classes(graph)
        self.options, self.settings = options, resolve(options, graph.image.size)
        self.rng, self.device = rng, device
        self.precision = choose_precision(options.precision, device)
        self.teacher = _Teacher(graph, device, self.precision)
        self.pixels = pixel_map(graph.image, device)
        made = ConditionalGenerator(graph.image.size, self.classes, rng, channels=options.channels)
        self.generator = made.to(device)
        self.optimizer = Adam(self.generator.parameters(), lr=options.lr_generator, betas=_BETAS)

    def step(self, student: Callable[[Tensor], Tensor], factor: float) -> Move:
        """Draw labels and latents, descend the loss once; see `Opponent`."""
        count = self.options.game_batch
        labels = torch.randint(
            self.classes, (count,), generator=self.rng, device=self.rng.device
        ).to(self.device)
        images = self.pixels.to_normalized(self._make(labels, self.rng))
        found, teacher = self.teacher(images)
        answer = student(images)
        loss = self.total(self.terms(found, teacher, answer, labels))
        weights = list(self.generator.parameters())
        # Kept for the student's own step, which walks another part of it.
        for weight, slope in zip(
            weights, torch.autograd.grad(loss, weights, retain_graph=True), strict=True
        ):
            weight.grad = slope
        self.optimizer.param_groups[0]["lr"] = factor * self.options.lr_generator
        self.optimizer.step()
        return Move(teacher.detach(), answer, loss.detach())

    def terms(
        self, found: Sequence[Moments], teacher: Tensor, student: Tensor, labels: Tensor
    ) -> Terms:
        """Return the parts of the loss for the moments and the logits of one batch."""
        options, settings = self.options, self.settings
        spread = adaptability.normalized_entropy(adaptability.disagreement(teacher, student))
        none = teacher.new_zeros(())
        return Terms(
            adaptability.bounds_loss(spread, settings.lambda_l, options.lambda_u),
            *adaptability.class_losses(teacher, student, labels),
            adaptability.bns_loss(found, self.teacher.stored) if found else none,
        )

    def total(self, terms: Terms) -> Tensor:
        """Return L_G."""
        options, settings = self.options, self.settings
        classes = settings.alpha_ds * terms.disagreement + options.alpha_as * terms.agreement
        return terms.bounds + options.beta * classes + options.gamma * terms.statistics

    def draw(self, labels: Tensor, rng: torch.Generator) -> Tensor:
        """Return normalized images of the classes (n,), on the CPU."""
        return self.pixels.to_normalized(self.draw_standardized(labels, rng)).cpu()

    @torch.no_grad()
    def draw_standardized(self, labels: Tensor, rng: torch.Generator) -> Tensor:
        """Return images z (n, c, h, w) of the classes (n,), on the player's device.

        They are made in batches of 64 at most, filled up with images of other classes where there
        are fewer: a generator's norms read their own batch, and a small one would not show them
        what they were trained with.
        """
        made = []
        for part in labels.to(self.device).split(_DRAWN):
            filling = torch.randint(
                self.classes, (max(0, self.options.game_batch - len(part)),),
                generator=rng, device=rng.device,
            ).to(self.device)  # fmt: skip
            made.append(self._make(torch.cat((part, filling)), rng)[: len(part)])
        return torch.cat(made)

    def snapshot(self) -> dict[str, Tensor]:
        """Return weights, moments of Adam and the state of the random numbers."""
        return {
            **{f"generator/{k}": v.cpu().clone() for k, v in self.generator.state_dict().items()},
            **{f"adam/{k}": v for k, v in pack_optimizer(self.optimizer).items()},
            "rng": self.rng.get_state(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a snapshot."""
        self.load_generator(state)
        adam = {k.removeprefix("adam/"): v for k, v in state.items() if k.startswith("adam/")}
        unpack_optimizer(self.optimizer, adam)
        self.rng.set_state(state["rng"].cpu())

    def load_generator(self, state: Mapping[str, Tensor]) -> None:
        """Take the generator's weights alone out of a snapshot."""
        prefix = "generator/"
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        self.generator.load_state_dict(own)

    def _make(self, labels: Tensor, rng: torch.Generator) -> Tensor:
        latents = torch.randn(len(labels), LATENT, generator=rng, device=rng.device)
        precision = getattr(torch, self.precision)
        with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
            z: Tensor = self.generator(latents.to(self.device), labels)
        return z.clamp(Z_LOW, Z_HIGH) if self.options.clip_inside else z


class _Teacher:
    """The float network; its statistics, if it has any."""

    def __init__(self, graph: Graph, device: torch.device, precision: Precision) -> None:
        self.plain: torch.nn.Module | None = None
        self.stored: list[Moments] = []
        if any(norm.module.running_mean is not None for norm in batch_norms(graph)):
            self.taps = BNTeacher(graph, device, logits=True, precision=precision)
            self.stored = self.taps.stored
        else:
            log.warning("adadfq: the model has no batch norms: images match labels alone")
            self.plain = copy_graph(graph).module.to(device).requires_grad_(False)

    def __call__(self, images: Tensor) -> tuple[list[Moments], Tensor]:
        """Return the moments of the batch norms' inputs and the logits."""
        if self.plain is not None:
            return [], self.plain(images)
        found = self.taps(images)
        assert found.logits is not None
        return found.moments, found.logits


def count_classes(graph: Graph) -> int:
    """Return how many classes a network tells apart.

    Raises:
        UnsupportedError: its output is not one row of logits per image.
    """
    result = next(n for n in graph.module.graph.nodes if n.op == "output").args[0]
    shape = node_shapes(graph)[result.name]
    if len(shape) != 2 or shape[1] < 2:
        raise UnsupportedError(
            f"adadfq: the model's output has the shape {(*shape,)} for one image, expected logits "
            "(1, classes): its game is about classes; take another --quantizer or --synth"
        )
    return shape[1]
