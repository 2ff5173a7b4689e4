"""Distillation from the float network: images in, losses of a student's answers out.

KL of the outputs at a temperature (Hinton et al. 2015) and the block outputs' squared error by the
float outputs' variance (the feature loss of PLF and KW, normalized so that blocks count alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfqc.compiler.graph import Graph, blocks
from dfqc.compiler.quantize import _output
from dfqc.compiler.quantize._student import with_features
from dfqc.compiler.quantize._targets import Targets

_LEAST = 1e-8  # variance of a block that always gives the same


@dataclass(frozen=True)
class Losses:
    """How a student is told apart from its teacher."""

    temperature: float
    output_weight: float
    feature_weight: float

    def of(
        self, wanted: tuple[Tensor, tuple[Tensor, ...]], found: tuple[Tensor, tuple[Tensor, ...]]
    ) -> Tensor:
        """Return the loss of (logits, block outputs) against the teacher's."""
        temperature = self.temperature
        kl = _output.divergence(wanted[0].float(), found[0].float(), temperature)
        loss = self.output_weight * temperature**2 * kl
        if self.feature_weight and wanted[1]:
            loss = loss + self.feature_weight * feature_loss(wanted[1], found[1])
        return loss


def feature_loss(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
    """Return the mean over blocks of the squared error, each in variances of the float output."""
    terms = [
        (one - exact).square().mean() / exact.var().clamp_min(_LEAST)
        for exact, one in zip(wanted, found, strict=True)
    ]
    return torch.stack(terms).mean()


class Teacher:
    """The float network with the outputs of its blocks, as the student has them."""

    def __init__(self, graph: Graph, targets: Targets) -> None:
        """Take the blocks of `graph`; where channels were pruned, those that are left of them."""
        output = next(n for n in graph.module.graph.nodes if n.op == "output").args[0]
        ends = [block.exit for block in blocks(graph)]
        self.exits = tuple(n for n in ends if n != str(output) and n not in targets.unclear)
        self._picks = [targets.picks.get(name) for name in self.exits]
        self._network = with_features(targets.graph.module, self.exits)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the logits and the blocks' outputs."""
        logits, found = self._network(images)
        return logits, tuple(
            value if keep is None else value.index_select(1, keep.to(value.device))
            for value, keep in zip(found, self._picks, strict=True)
        )
