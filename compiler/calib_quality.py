"""What a calibration set is worth, before anything is built on it: images and a graph in, a score.

One forward pass: distance to the batch norms' statistics, channels that fire, classes. Beside it,
twins among the images and pixels that no camera gives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfqc.compiler._likeness import HALF_CODE, Twins, find_twins, shrink, to_pixels
from dfqc.compiler._observe import Moments, Observer
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph, batch_norms, on_device

# Where `warnings` begins. Measured on five CNNs for CIFAR-10, CIFAR-100 and ImageNet, 16 to 256
# images each: real ones, those of zeroq (quick), 1/f noise and Gaussian noise.
# Mean distance to the batch norms' statistics. Real 0.10 to 0.19 (8 images: 0.22), zeroq 0.05 to
# 0.13, 1/f noise 0.48 to 0.65, Gaussian noise 0.72 to 1.4; CIFAR's images on an ImageNet net 0.45.
DISTANCE_LIMIT = 0.3
# Distance of the worst batch norm. Real up to 0.47 (ResNet-56), zeroq up to 0.32, 1/f noise from
# 0.69 on.
LAYER_LIMIT = 0.6
# Share of the channels that ought to fire and do not. Real and zeroq 0 everywhere, with 16 images
# too. On the ImageNet nets 1/f noise 0.01 to 0.07, Gaussian noise 0.03 to 0.20.
SILENT_LIMIT = 0.005
# Evenness of the classes. Real and zeroq 0.89 to 1, noise 0 to 0.6; with fewer images chance rules.
EVENNESS_LIMIT, EVENNESS_FROM = 0.7, 16
# Share of labels that the model agrees with. Real 0.55 to 1, its top-1; deepinversion (quick) 1.
AGREEMENT_LIMIT = 0.3
# Share of images that nearly equal an earlier one. Real, zeroq, deepinversion and noise 0.
TWINS_LIMIT = 0.05
TWINS_COLLAPSED = 0.5  # share of twins from which on a generator makes one image
# Share of pixel values out of range. Real 0; zeroq 0 with its clipping and 0.07 to 0.11 without;
# Gaussian noise 0.03.
OUTSIDE_LIMIT = 0.01

_BETTER = "take another --synth (`dfqc list`), a higher --effort or more --samples"
_EPS = 1e-6  # added to variances before a root is taken
_THUMBNAIL = 32  # pixels at most of a side where images are compared


@dataclass(frozen=True)
class Classes:
    """How often each class occurs.

    `counts` has the classes that occur, by number. `evenness` is the entropy over that of the most
    even counts of as many images, 0..1; `possible` is how many classes could occur.
    """

    counts: Mapping[str, int]
    hit: int
    possible: int
    evenness: float


@dataclass(frozen=True)
class Firing:
    """Channels of activations that fire; see `score`.

    `share` is of all channels, `layers` the same per activation, named by the module it reads. Of
    the channels behind a batch norm, `expected` fire on the images the model was trained with, as
    its statistics tell; `silent` of those do not here. Dead channels are thus no fault of images.
    """

    share: float
    expected: int
    silent: int
    layers: Mapping[str, float]


@dataclass(frozen=True)
class Score:
    """What `score` found; what does not apply to a model is None or empty.

    Attributes:
        images: how many.
        bn_distance: mean over the batch norms of the distance to their statistics; 0 is a match.
        worst_layer: the batch norm that is farthest.
        layers: the distance of every batch norm.
        firing: channels of activations that fire.
        labels: classes that the images were made for.
        predictions: classes that the model sees in them.
        agreement: share of images that the model puts into the class of their label.
        twins: images that are nearly the same.
        out_of_range: share of pixel values that no image file can hold.
    """

    images: int
    bn_distance: float | None
    worst_layer: str | None
    layers: Mapping[str, float]
    firing: Firing | None
    labels: Classes | None
    predictions: Classes | None
    agreement: float | None
    twins: Twins
    out_of_range: float

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return dataclasses.asdict(self)


def score(
    graph: Graph,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    device: torch.device | None = None,
    batch: int = 64,
) -> Score:
    """Judge normalized images (n, c, h, w) with labels (n,) against an unfolded graph.

    A channel of an activation fires if its output is above 0 at any position of any image; for
    activations that are not about 0 (sigmoid, say) and batch norms that feed none, if it varies.

    Raises:
        UsageError: there are values that are not finite.
    """
    _check_finite(images)
    device = device or torch.device("cpu")
    graph = on_device(graph, device)
    observer = Observer(graph, device)
    thumbnails: list[Tensor] = []
    found: list[Tensor] = []
    classes, outside = None, 0
    with torch.inference_mode():
        for part in images.split(batch):
            chunk = part.to(device)
            output = observer(chunk)
            if output.dim() == 2 and output.shape[1] > 1:
                classes = output.shape[1]
                found.append(output.argmax(1).cpu())
            pixels = to_pixels(chunk, graph.image)
            outside += int(((pixels < -HALF_CODE) | (pixels > 1 + HALF_CODE)).sum())
            thumbnails.append(shrink(pixels, _THUMBNAIL).flatten(1).cpu())
    layers = _distances(graph, observer)
    predictions = torch.cat(found) if found else None
    return Score(
        images=len(images),
        bn_distance=sum(layers.values()) / len(layers) if layers else None,
        worst_layer=max(layers, key=lambda name: layers[name]) if layers else None,
        layers=layers,
        firing=_firing(observer),
        labels=_count(labels, classes),
        predictions=_count(predictions, classes),
        agreement=None
        if labels is None or predictions is None
        else _share(labels.cpu() == predictions),
        twins=find_twins(torch.cat(thumbnails)),
        out_of_range=outside / images.numel(),
    )


def warnings(score: Score) -> list[str]:
    """Say what is wrong with a set, what real images have, and what to do; nothing if all is well.

    The limits and what they were measured on stand above.
    """
    return [*_warn_of_statistics(score), *_warn_of_classes(score), *_warn_of_pixels(score)]


def _warn_of_statistics(score: Score) -> Iterator[str]:
    worst = score.layers.get(score.worst_layer or "", 0.0)
    own = "for images of your own, check --mean, --std and --resize"
    if score.bn_distance is not None and not score.bn_distance <= DISTANCE_LIMIT:
        yield (
            f"the images are {score.bn_distance:.2f} away from the batch norms' statistics (0 is a "
            "match; real images have 0.1 to 0.2, noise 0.5 to 1.4), so activation ranges fitted to "
            f"them will not be those of real inputs: {_BETTER}; {own}"
        )
    elif not worst <= LAYER_LIMIT:
        yield (
            f"the images are {worst:.2f} away from the statistics of batch norm "
            f"{score.worst_layer} (real images stay below 0.5), so activation ranges there will "
            f"not be those of real inputs: {_BETTER}; {own}"
        )
    firing = score.firing
    if firing is not None and firing.silent > SILENT_LIMIT * firing.expected:
        yield (
            f"{firing.silent} of {firing.expected} channels stay 0 that by their batch norm do not "
            f"(real images: none), so they get no range and no correction: {_BETTER}"
        )


def _warn_of_classes(score: Score) -> Iterator[str]:
    seen = {"are labeled as": score.labels, "look to the model like": score.predictions}
    for what, found in seen.items() if score.images >= EVENNESS_FROM else ():
        if found is not None and found.evenness < EVENNESS_LIMIT:
            yield (
                f"the images {what} {found.hit} of {found.possible} possible classes, evenness "
                f"{found.evenness:.2f} (1 is even; real images of all classes have 0.9 to 1), so "
                f"what other classes need is not calibrated: {_BETTER}"
            )
    if score.agreement is not None and score.agreement < AGREEMENT_LIMIT:
        yield (
            f"the model puts {100 * score.agreement:.0f} % of the images into the class of their "
            "label (real images: its top-1), so they do not show what they are labeled as: take a "
            "higher --effort or another --synth; for images of your own, check the order of the "
            "classes and --mean, --std and --resize"
        )


def _warn_of_pixels(score: Score) -> Iterator[str]:
    if score.twins.images > TWINS_LIMIT * score.images:
        yield (
            f"{score.twins.images} of {score.images} images nearly equal another one (real images: "
            f"none), so the set is worth as much as one of {score.images - score.twins.images}: "
            "take another --synth or another --seed"
        )
    if score.out_of_range > OUTSIDE_LIMIT:
        yield (
            f"{100 * score.out_of_range:.1f} % of the pixel values are out of the range of image "
            "files (real images: none), which widens the range of the input for nothing: "
            "--synth-option clip=true, or another --synth"
        )


def bn_distance(
    graph: Graph, images: Tensor, *, device: torch.device | None = None, batch: int = 64
) -> dict[str, float]:
    """Return, per batch norm, how far its input is from the stored statistics; 0 is a match.

    The 2-Wasserstein distance between the normal distributions with the moments over all images
    and with the stored ones, relative to the layer's spread: the root of the sum over channels of
    (m - μ)² + (s - σ)² over the sum of σ². Empty for a model without batch norms.
    """
    device = device or torch.device("cpu")
    graph = on_device(graph, device)
    observer = Observer(graph, device, activations=False)
    with torch.inference_mode():
        for part in images.split(batch):
            observer(part.to(device))
    return _distances(graph, observer)


def _distances(graph: Graph, observer: Observer) -> dict[str, float]:
    norms = [n.module for n in batch_norms(graph) if n.module.running_mean is not None]
    return {
        name: _distance(norm, moments)
        for norm, (name, moments) in zip(norms, observer.moments.items(), strict=True)
    }


def _distance(norm: nn.BatchNorm1d | nn.BatchNorm2d, moments: Moments) -> float:
    assert norm.running_var is not None
    wanted = norm.running_var.double()
    mean, var = moments.mean_and_var()
    shift = (mean - moments.center).square()
    spread = ((var + _EPS).sqrt() - (wanted + _EPS).sqrt()).square()
    return float(((shift + spread).sum() / (wanted.sum() + _EPS)).sqrt())


def _firing(observer: Observer) -> Firing | None:
    fired = {name: seen.fired() for name, seen in observer.channels.items()}
    if not fired:
        return None
    expected = {n: s.expected for n, s in observer.channels.items() if s.expected is not None}
    return Firing(
        share=_share(torch.cat(list(fired.values()))),
        expected=sum(int(mask.sum()) for mask in expected.values()),
        silent=sum(int((mask & ~fired[name]).sum()) for name, mask in expected.items()),
        layers={name: _share(channels) for name, channels in fired.items()},
    )


def _count(labels: Tensor | None, classes: int | None) -> Classes | None:
    """Count classes; labels of a model that does not classify may be any numbers."""
    if labels is None:
        return None
    numbers, counts = labels.cpu().unique(return_counts=True)
    total = int(counts.sum())
    classes = max(classes or 0, len(numbers))
    each, more = divmod(total, classes)
    best = _entropy([each + 1] * more + [each] * (classes - more))
    return Classes(
        counts={str(n): c for n, c in zip(numbers.tolist(), counts.tolist(), strict=True)},
        hit=len(numbers),
        possible=min(classes, total),
        evenness=_entropy(counts.tolist()) / best if best > 0 else 1.0,
    )


def _entropy(counts: Sequence[int]) -> float:
    total = sum(counts)
    return sum(c / total * math.log(total / c) for c in counts if c)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _check_finite(images: Tensor) -> None:
    broken = [i for i, image in enumerate(images) if not bool(torch.isfinite(image).all())]
    if broken:
        raise UsageError(
            f"{len(broken)} of {len(images)} calibration images hold values that are not finite "
            f"(the first is image {broken[0]}): their optimization diverged; lower its step size "
            "(--synth-option lr=...) or take another --synth; images of your own must be remade"
        )
