"""Whether calibration images are copies: a set and images of the user in, their distances out.

For each synthetic image, the nearest of the supplied ones, and the same from each supplied image to
its nearest other: only beside that can a distance be read. It is evidence against memorized copies
and no proof of privacy: it knows only the images it is given, and only two notions of likeness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqc.compiler._likeness import Nearest, shrink, to_pixels
from dfqc.compiler.contracts import CalibSet, Progress, silent
from dfqc.compiler.dataset import ImageSet, open_dataset
from dfqc.compiler.graph import Graph, layer_nodes, on_device
from dfqc.compiler.output import table
from dfqc.compiler.report import contact_sheet
from dfqc.compiler.stages_calib import as_pixels

# Larger images are averaged down to this many pixels a side. That only brings images nearer, all
# alike, so it misses no copy, and finds those under fine noise.
_SIDE = 64
_BASELINE = 2000  # supplied images at most, evenly spaced, whose own neighbors are searched
_PERCENT = 1  # of the supplied images that are as near to another as what counts as a copy
_PAIRS = 8
_BATCH = 64
_FIGURES = ("min", "p1", "median")
PIXELS, FEATURES = "pixels", "features"
# What the root mean square difference of rows of some width means in each space. Features have
# length 1: the squared difference of two is 2 (1 - cosine).
_SCALES: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    PIXELS: lambda rms, width: rms,
    FEATURES: lambda rms, width: rms.square() * width / 2,
}


@dataclass(frozen=True)
class Comparison:
    """Plain data for a program, `describe` makes lines of it; and a PNG of the closest pairs.

    The PNG shows supplied images: it must not leave the house where those must not.
    """

    report: dict[str, Any]
    sheet: bytes


def compare_to(
    graph: Graph,
    calib: CalibSet,
    path: Path,
    *,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare a calibration set with the images under `path`, whatever `--calib-data` takes.

    Raises:
        LoadError: there are no images that can be read.
    """
    supplied = open_dataset(path, graph.image, need_labels=False)
    report = compare(graph, calib.images, supplied, device=device, progress=progress)
    return Comparison(
        {"source": str(path), **report}, _sheet(calib.images, supplied, report["closest"])
    )


def compare(
    graph: Graph,
    images: Tensor,
    supplied: ImageSet,
    *,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare normalized images (n, c, h, w) with all of `supplied`, read batch by batch.

    Distances of pixels are root mean squares over 0..1, the smaller of as it is and mirrored;
    those of features, of what the model's last layer reads, are 1 - cosine. `nearer` counts the
    images that are as near to a supplied one as only 1 % of the supplied ones are to each other:
    about 1 % of fresh images from the same source are, too. One supplied image has no baseline.
    """
    eye = _Eye(graph, device or torch.device("cpu"))
    count = min(len(supplied), _BASELINE)
    own = torch.arange(count) * len(supplied) // count
    sample = supplied.subset(own.numpy()).batches(_BATCH)
    baseline = eye.look(torch.from_numpy(batch) for batch, _ in sample)
    searches = {
        space: _Search(rows, baseline[space], own)
        for space, rows in eye.look(images.split(_BATCH)).items()
    }
    start = 0
    for batch, _ in supplied.batches(_BATCH):
        for space, rows in eye.look([torch.from_numpy(batch)]).items():
            searches[space].add(rows, start)
            if space == PIXELS:
                mirrored = rows.unflatten(1, eye.shape).flip(-1).flatten(1)
                searches[space].add(mirrored, start, mirrored=True)
        start += len(batch)
        progress(start, len(supplied), "supplied images compared")
    found: dict[str, Any] = {PIXELS: None, FEATURES: None}
    found |= {space: search.summarize(_SCALES[space]) for space, search in searches.items()}
    return {
        "images": len(images),
        "supplied": len(supplied),
        **found,
        "closest": searches[PIXELS].closest(supplied),
    }


def describe(report: Mapping[str, Any]) -> list[str]:
    """Return the report of `compare_to` as lines to print."""
    pixels, images = report[PIXELS], report["images"]
    spaces = [(space, report[space]) for space in (PIXELS, FEATURES) if report[space]]
    rows = [
        (f"{whose} to supplied", space, *(_figure(found[whose], name) for name in _FIGURES))
        for space, found in spaces
        for whose in ("synthetic", "supplied")
    ]
    supplied = f"{report['supplied']} of {report.get('source', 'the supplied images')}"
    lines = [
        f"{images} synthetic images against {supplied}; distances to the nearest (other) image:",
        *table(("", "compared by", "minimum", f"{_PERCENT} %", "median"), rows),
    ]
    if pixels["nearer"] is None:
        lines.append("A single supplied image has no neighbor, so there is nothing to judge by.")
    elif pixels["nearer"]:
        lines.append(
            f"{pixels['nearer']} of {images} are as near to a supplied image as only {_PERCENT} % "
            f"of those are to each other (of fresh images of the same kind, about {_PERCENT} % "
            "are): look at the closest pairs before this set leaves the house."
        )
    else:
        lines.append(
            f"None is as near to a supplied image as the closest {_PERCENT} % of those are to each "
            "other."
        )
    lines += ["Closest pairs:"] + [
        f"  image {pair['image']}: {pair['file']}{' (mirrored)' if pair['mirrored'] else ''}, "
        f"{pair['distance']:.4f}"
        for pair in report["closest"]
    ]
    lines.append(
        "This is evidence against memorized copies, no proof of privacy: images that were not "
        "supplied, parts of images and other likenesses were not looked for."
    )
    return lines


class _Eye:
    """Sees images as rows of numbers, one way per space in which they are compared.

    Features are what the last layer reads, averaged over positions; a model whose last layer is its
    only one has none.
    """

    def __init__(self, graph: Graph, device: torch.device) -> None:
        graph = on_device(graph, device)
        self.module, self.image, self.device = graph.module, graph.image, device
        layers = list(dict.fromkeys(path for path, _ in layer_nodes(graph)))
        self.last = graph.module.get_submodule(layers[-1]) if len(layers) > 1 else None
        channels, height, width = graph.image.size
        self.shape = (channels, min(height, _SIDE), min(width, _SIDE))

    def look(self, batches: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return, by space, rows (n, d) for normalized images (n, c, h, w)."""
        pixels, features = [], []
        with torch.inference_mode():
            for batch in batches:
                shown = to_pixels(batch, self.image).clamp(0, 1)  # as files would hold them
                pixels.append(shrink(shown, _SIDE).flatten(1))
                if self.last is not None:
                    features.append(self._features(self.last, batch))
        rows = {PIXELS: torch.cat(pixels)}
        return rows | ({FEATURES: torch.cat(features)} if features else {})

    def _features(self, last: nn.Module, batch: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.module(batch.to(self.device))
        finally:
            hook.remove()
        x = seen[-1]
        positions = tuple(range(2, x.dim())) if x.dim() == 4 else tuple(range(1, x.dim() - 1))
        return F.normalize(x.mean(positions) if positions else x, dim=1).float().cpu()


class _Search:
    """Nearest supplied images in one space: of the synthetic ones, and of some supplied ones."""

    def __init__(self, synthetic: Tensor, baseline: Tensor, own: Tensor) -> None:
        self.synthetic, self.baseline, self.own = Nearest(synthetic), Nearest(baseline), own
        self.mirrored = torch.zeros(len(synthetic), dtype=torch.bool)

    def add(self, rows: Tensor, start: int, *, mirrored: bool = False) -> None:
        """Take in supplied images (m, d), the first of number `start`."""
        self.mirrored[self.synthetic.add(rows, start)] = mirrored
        self.baseline.add(rows, start, own=self.own)

    def summarize(self, scale: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
        """Return the figures of both, and how many synthetic images are as near as few others."""
        width = self.synthetic.queries.shape[1]
        ours, theirs = (scale(s.distance, width) for s in (self.synthetic, self.baseline))
        if not bool(torch.isfinite(theirs).all()):  # one image, without another
            return {"synthetic": _quantiles(ours), "supplied": None, "nearer": None}
        limit = torch.quantile(theirs.double(), _PERCENT / 100)
        return {
            "synthetic": _quantiles(ours),
            "supplied": _quantiles(theirs),
            "nearer": int((ours.double() <= limit).sum()),
        }

    def closest(self, supplied: ImageSet) -> list[dict[str, Any]]:
        """Return the closest pairs, nearest first."""
        found = self.synthetic
        return [
            {
                "image": i,
                "file": supplied.name(int(found.index[i])),
                "position": int(found.index[i]),
                "distance": float(found.distance[i]),
                "mirrored": bool(self.mirrored[i]),
            }
            for i in found.distance.argsort(stable=True)[:_PAIRS].tolist()
        ]


def _quantiles(distances: Tensor) -> dict[str, float]:
    at = torch.tensor([0, _PERCENT / 100, 0.5], dtype=torch.float64)
    values = torch.quantile(distances.double(), at).tolist()
    return dict(zip(_FIGURES, values, strict=True))


def _figure(quantiles: Mapping[str, float] | None, name: str) -> str:
    return "-" if quantiles is None else f"{quantiles[name]:.4f}"


def _sheet(images: Tensor, supplied: ImageSet, pairs: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw every pair, the synthetic image on the left."""
    positions = np.unique([pair["position"] for pair in pairs])
    batches = [batch for batch, _ in supplied.subset(positions).batches(_BATCH)]
    theirs = dict(zip(positions.tolist(), np.concatenate(batches), strict=True))
    tiles = [
        tile
        for pair in pairs
        for tile in (images[pair["image"]], torch.from_numpy(theirs[pair["position"]]))
    ]
    return contact_sheet(as_pixels(torch.stack(tiles), supplied.image))
