"""MixMix (Li et al. 2021): noise, labels and nets in, images that all the nets recognize out.

DeepInversion with two additions. Feature mixing: several nets of a zoo read the same images, each
with its own normalization, and their losses are averaged. Data mixing: a second image is put,
resized, into a random box of every image, and the result is to have both classes, by area.

`max` is as published (section 5), except for the size of a batch, the rate at CIFAR's size
(DeepInversion's), and that the model itself is always one of the nets (`own`); how losses' weights
are learned is not published, and Kendall's uncertainty weighting is taken. `quick` and `standard`
have DeepInversion's cheaper settings, no learned weights, which gained nothing, and mix in half of
the iterations: statistics that only mixed images were matched to are not those of the images. With
a ResNet-20, -56 and -8 on CIFAR-10, mixing never, in half and in all of the iterations left the
ResNet-20's batch norms' distance at 0.12, 0.16 and 0.19, and the output of W4A4 at 9.0, 9.6 and
9.5 dB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field

from dfqc.calib import _inversion_options
from dfqc.calib._inversion import invert
from dfqc.calib._inversion_options import InversionOptions, Schedule
from dfqc.calib._objective import Method
from dfqc.calib.deepinversion import CHEAP
from dfqc.compiler.contracts import CalibSet, Progress, Supplies, silent
from dfqc.compiler.errors import UnsupportedError, UsageError
from dfqc.compiler.graph import Graph, batch_norms
from dfqc.compiler.mixing_zoo import count_outputs

NEEDS_BN = True
NEEDS_CLASSES = True
USES_ZOO = True
CARRIES = False

_MIXED = {**CHEAP, "mix": 0.5, "learn_weights": False}
# Changes to the defaults of `Options`. Measured, in CPU seconds: 28 and 82 for 64 images of CIFAR
# ResNets 20, 56 and 8 (quick and standard); 120 for 32 images at 224 pixels of a 0.25 MobileNet and
# a Tiny Darknet (quick).
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {**_MIXED, "iterations": 60},
    "standard": {**_MIXED, "iterations": 150},
    "max": {"batch_size": 128},
}

_ALONE = (
    "mixmix: no other models were given, so images come from the model alone, with data mixing; "
    "--zoo adds models of the same classes"
)


class Options(InversionOptions):
    """How the images are optimized; the defaults are as published.

    `models`: nets drawn per batch from the model and its zoo.
    `own`: the model is always one of them. A MobileNet recognized 22 % of the images that a Darknet
    alone was asked for.
    `mix`: share of the iterations in which images are mixed.
    `learn_weights`: learn how much classes, batch norms and priors count; else they count as given.
    """

    iterations: int | None = Field(5000, ge=1)
    schedule: Schedule | None = "cosine"
    warm_up: int = Field(0, ge=0)
    models: int = Field(3, ge=1)
    own: bool = True
    mix: float = Field(1.0, ge=0, le=1)
    learn_weights: bool = True


def count_passes(options: Options, size: tuple[int, int, int], nets: int) -> float:
    """Return the forward-and-backward passes per image, those of other nets counted alike."""
    return _inversion_options.count_passes(options, size) * min(options.models, nets)


def count_bytes(options: Options, size: tuple[int, int, int], count: int) -> int:
    """Return the bytes of the images, their gradients, Adam's two moments, and two copies."""
    return 24 * count * math.prod(size)


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

    Raises:
        UsageError: a net of the zoo has other classes or another input size than the model.
        UnsupportedError: a net has no batch norm with running statistics, or no classes.
    """
    for net in supplies.zoo:
        _check(net, graph)
    nets = _choose([graph, *supplies.zoo], options, rng)
    made = invert(
        graph, nets, count, options, Method("mixmix", options.mix, options.learn_weights),
        rng=rng, device=device, progress=progress, supplies=supplies,
    )  # fmt: skip
    info = {**made.info, "models": [net.source for net in nets]}
    if not supplies.zoo:
        info["note"] = "; ".join(filter(None, (_ALONE, made.info.get("note"))))
    return CalibSet(made.images, made.labels, made.source, info)


def _check(net: Graph, graph: Graph) -> None:
    """Refuse a net of the zoo that cannot be mixed with the model."""
    if net.image.size != graph.image.size:
        raise UsageError(
            f"{net.source} reads images of {net.image.size} and {graph.source} of "
            f"{graph.image.size}: the models of a zoo need one input size"
        )
    found, expected = count_outputs(net), count_outputs(graph)
    if found != expected:
        raise UsageError(
            f"{net.source} has {found} outputs and {graph.source} has {expected}: the models of a "
            "zoo need the same classes in the same order; leave it out"
        )
    if all(norm.module.running_mean is None for norm in batch_norms(net)):
        raise UnsupportedError(
            f"{net.source} has no batch norm with running statistics, which images are matched to: "
            "leave it out of the zoo"
        )


def _choose(nets: Sequence[Graph], options: Options, rng: torch.Generator) -> list[Graph]:
    """Draw the nets of this batch; the model is the first of `nets`."""
    order = torch.randperm(len(nets), generator=rng, device=rng.device).tolist()
    if options.own:
        order.remove(0)
        order.insert(0, 0)
    return [nets[i] for i in sorted(order[: options.models])]
