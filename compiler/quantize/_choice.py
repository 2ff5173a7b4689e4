"""What chooses between whole networks, without labels: images in, states and their scores out.

Nothing is fitted to these images, and none of them is a test image of anybody.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfqc.compiler.contracts import QuantizerSupplies, QuantState
from dfqc.compiler.graph import Graph
from dfqc.compiler.judging import mean_divergence
from dfqc.compiler.passes import bias
from dfqc.compiler.quantize._targets import Targets

log = logging.getLogger(__name__)

_FEW = 8  # images that do not speak for their kind
_LEAST = 1e-12  # a divergence that is nothing


def judging_parts(own: Tensor, supplies: QuantizerSupplies, *, others: bool = True) -> list[Tensor]:
    """Return the kinds of images that judge: put aside, held out and like the data, others.

    The others, mostly noise, are left out where a whole network was trained: far from the data it
    may answer anything, and that says nothing of what it answers to the data. On ResNet-20 at W3A3
    training halved the drop on real images, and noise came twice as far from the float network.
    """
    held_out = supplies.held_out
    if held_out is None:
        return [own] if len(own) else []
    count = supplies.fitting or len(held_out)
    parts = [own, held_out[:count]] + [held_out[count:]] * others
    return [part for part in parts if len(part)]


def even(parts: Sequence[Tensor]) -> Tensor:
    """Return as many images of each part: of two kinds, none outvotes the other.

    A part that is too small to speak for its kind is left out.
    """
    parts = [part for part in parts if len(part) >= _FEW] or parts
    count = min(map(len, parts))
    return torch.cat([part[:count] for part in parts])


def keep_best(
    graph: Graph,
    states: Mapping[str, QuantState],
    judges: Sequence[Tensor],
    targets: Targets,
    device: torch.device,
) -> tuple[QuantState, dict[str, float]]:
    """Return the state whose network is nearest to the float one on images not learned from.

    The states that need no training have seen the first kind: their ranges and statistics are
    those of all calibration images.

    Three kinds of them: of the calibration set, made to fit the batch norms in another way, and
    noise. Each misleads somewhere: what was learned is best on its own kind, and on MobileNetV1
    rounding to nearest is as good as the closed form by the other two, which it is far from. So
    the divergences of all kinds count by their ratios (geometric mean).
    """
    scores = {name: distance(graph, s, judges, targets, device) for name, s in states.items()}
    best = min(scores, key=lambda name: scores[name])
    log.info("kept %s of %s", best, scores)
    return states[best], scores


def distance(
    graph: Graph,
    state: QuantState,
    judges: Sequence[Tensor],
    targets: Targets,
    device: torch.device,
) -> float:
    """Return how far a state's network is from the float one: see `keep_best`."""
    found = [
        bias.output_distance(graph, state, part, device=device, exact=targets.graph)
        for part in judges
    ]
    return mean_divergence(found)


def blind_distance(judges: Sequence[Tensor], targets: Targets, device: torch.device) -> float:
    """Return the distance of a network that gives the same mean answer to every image."""
    found = []
    for part in judges:
        with torch.inference_mode():
            chunks = [targets.graph.module(chunk.to(device)) for chunk in part.split(32)]
            output = torch.cat(chunks).double()
        if output.dim() < 2 or output.shape[1] < 2:
            spread = (output - output.mean(0)).square().sum()
            found.append(float(spread / output.square().sum().clamp_min(_LEAST)))
            continue
        wanted = output.log_softmax(1)
        mean = wanted.exp().mean(0, keepdim=True).clamp_min(_LEAST).log()
        found.append(float((wanted.exp() * (wanted - mean)).sum(1).mean()))
    return mean_divergence(found)
