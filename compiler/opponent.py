"""What plays against a student and gives it images: a student in, logits of both networks out.

Generators live with the synthesizers, students with the quantizers; a quantizer loads the one it
plays against by name, as the plug-in `synthesizer` with a function `make_opponent`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dfqc.compiler.graph import Graph


class Move(NamedTuple):
    """One batch of images, seen by both.

    Attributes:
        teacher: logits of the float network, (n, classes), without a graph.
        student: logits of the student, with the graph: their gradients can still be taken.
        loss: of the generator, before its step, a scalar without a graph.
    """

    teacher: Tensor
    student: Tensor
    loss: Tensor


class Opponent(Protocol):
    """A generator of images that learns from what its student does not know yet."""

    classes: int

    def step(self, student: Callable[[Tensor], Tensor], factor: float) -> Move:
        """Draw a batch, learn from it once, rates times `factor`; return what both saw in it."""
        ...

    def draw(self, labels: Tensor, rng: torch.Generator) -> Tensor:
        """Return normalized images (n, c, h, w) of the classes (n,) on the CPU; learn nothing."""
        ...

    def snapshot(self) -> dict[str, Tensor]:
        """Return all that the next steps depend on, by names of its own, on the CPU."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a snapshot: the next steps are those that followed it."""
        ...


class MakesOpponents(Protocol):
    """A synthesizer's module whose generator can be played against."""

    def make_opponent(
        self, graph: Graph, options: Any, *, rng: torch.Generator, device: torch.device
    ) -> Opponent:
        """Return a new generator against the teacher `graph`, which is unfolded."""
        ...
