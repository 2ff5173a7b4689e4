"""What chooses between whole networks, without labels: images in, states and their scores out.

Nothing is fitted to these images, and none of them is a test image of anybody.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfqc.compiler.contracts import CalibSet, QuantizerSupplies, QuantState
from dfqc.compiler.graph import Graph, images_at_once
from dfqc.compiler.judging import augmented, count_judges, mean_divergence
from dfqc.compiler.passes import bias
from dfqc.compiler.quantize._targets import Targets

log = logging.getLogger(__name__)

_COPIES, _SEED = 4, 19_001  # of every image that judges
_ROOM = 256 << 20  # bytes for them; one copy each is made in any case
_ASTRAY = 4 / 3  # of the divergence of what training began with
_LEAST = 1e-12  # a divergence that is nothing


def judging_parts(own: Tensor, supplies: QuantizerSupplies) -> list[Tensor]:
    """Return the kinds of images that judge: those put aside, and mirrored and shifted copies.

    Each has four copies, fewer where they would take more than 256 MiB. Of few images none is put
    aside: then those that are held out and look like the data judge.

    The images themselves have been seen by the closed form, whose statistics are those of the whole
    calibration set, and all that was made by one synthesizer has its traits, which training fits
    first; both fall off where an image is moved. Measured against the divergence on real images,
    ResNet-20 at W3A3 (nearest, SQuant, closed form, reconstructed, tuned, trained): both together
    exchange neighbors only; images that match the batch norms put SQuant first, noise the closed
    form.
    """
    if len(own):
        rng = torch.Generator().manual_seed(_SEED)
        return [own, augmented(own, 1 + _copies(math.prod(own.shape)), rng)[len(own) :]]
    held_out = supplies.held_out
    return [] if held_out is None else [held_out[: supplies.fitting or len(held_out)]]


def _copies(values: int) -> int:
    """Return how many moved copies judge of every image, where all of them have `values` pixels."""
    return max(1, min(_COPIES, _ROOM // (4 * max(1, values))))


def judging_bytes(graph: Graph, samples: int) -> int:
    """Return what the images that judge take, with their copies, of a calibration set."""
    values = count_judges(samples) * math.prod(graph.image.size)
    return 4 * values * (2 + _copies(values))


def correct_biases(
    graph: Graph,
    state: QuantState,
    calib: CalibSet,
    supplies: QuantizerSupplies,
    device: torch.device,
) -> QuantState:
    """Return a state that training starts from, its biases corrected as the recipe says."""
    options = bias.options_of(supplies.bias_correction)
    if options.method == "auto" and supplies.unfolded is None:
        options = bias.options_of("empirical")
    found = bias.correct(
        *(graph, supplies.unfolded or graph, state, calib, options),
        device=device,
        held_out=supplies.held_out,
        memory_bytes=supplies.memory_bytes,
    )
    return dataclasses.replace(found, info={**found.info, bias.CORRECTED: True})


def led_astray(
    graph: Graph,
    start: QuantState,
    learned: Mapping[str, QuantState],
    supplies: QuantizerSupplies,
    targets: Targets,
    device: torch.device,
) -> tuple[list[str], dict[str, float]]:
    """Return the learned states that images of another kind put far behind their start.

    Training fits the traits of one synthesizer, and images of that one do not show it. Those that
    match the batch norms in another way are no judges between methods (see `judging_parts`), but
    they tell what of the learned holds beyond. Divergence of the tuned state, in that of the closed
    form, on these and on real images, all bits alike: ResNet-8 W4A4 1.43 and 1.15, W2A4 2.65 and
    1.06, W4A8 1.11 and 1.27, W3A3 1.13 and 1.16; ResNet-20 W4A4 0.72 and 0.72, W3A3 0.94 and 0.72,
    W2A4 0.93 and 0.71, with 8-bit ends 1.24 and 0.98; SimpleNet W4A8 0.84 and 0.84, W4A4 0.89 and
    0.83. `_ASTRAY` takes what is clear of these: nothing that was better on real images.

    Args:
        graph: folded graph.
        start: what training began with.
        learned: name -> state.
        supplies: their held-out images that match batch norms judge; without any, nothing does.
        targets: what is to be computed.
        device: where everything runs.

    Returns:
        Names of `learned`; and the divergence of each, and that of the start under "start".
    """
    if supplies.held_out is None or supplies.fitting == 0:
        return [], {}
    other = [supplies.held_out[: supplies.fitting]]
    states = {"start": start, **learned}
    found = {name: distance(graph, s, other, targets, device) for name, s in states.items()}
    astray = [name for name in learned if not found[name] <= _ASTRAY * found["start"]]
    if astray:
        log.info("led astray by the calibration images: %s, %s", astray, found)
    return astray, found


def keep_best(
    graph: Graph,
    states: Mapping[str, QuantState],
    judges: Sequence[Tensor],
    targets: Targets,
    device: torch.device,
) -> tuple[QuantState, dict[str, float]]:
    """Return the state whose network is nearest to the float one on images not learned from."""
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
    batch = images_at_once(graph, 32, device)
    found = [
        bias.output_distance(graph, state, part, device=device, batch=batch, exact=targets.graph)
        for part in judges
    ]
    return mean_divergence(found)


def blind_distance(judges: Sequence[Tensor], targets: Targets, device: torch.device) -> float:
    """Return the distance of a network that gives the same mean answer to every image."""
    found = []
    for part in judges:
        with torch.inference_mode():
            batch = images_at_once(targets.graph, 32, device)
            chunks = [targets.graph.module(chunk.to(device)) for chunk in part.split(batch)]
            output = torch.cat(chunks).double()
        if output.dim() < 2 or output.shape[1] < 2:
            spread = (output - output.mean(0)).square().sum()
            found.append(float(spread / output.square().sum().clamp_min(_LEAST)))
            continue
        wanted = output.log_softmax(1)
        mean = wanted.exp().mean(0, keepdim=True).clamp_min(_LEAST).log()
        found.append(float((wanted.exp() * (wanted - mean)).sum(1).mean()))
    return mean_divergence(found)
