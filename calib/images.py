"""Real images as the calibration set: a path and a count in, that many of its images out."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from dfqc.compiler.contracts import GIVEN, CalibSet, Progress, Supplies, silent
from dfqc.compiler.dataset import open_dataset
from dfqc.compiler.errors import LoadError
from dfqc.compiler.graph import Graph

NEEDS_BN = False
NEEDS_CLASSES = False
USES_ZOO = False
CARRIES = False

_READ = 64  # images decoded at a time


class Options(BaseModel):
    """`path` is an `.npz`, a folder of images, or a `.safetensors` that `dfqc synth` wrote.

    All images are one batch: batches drawn one by one would repeat images.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    batch_size: int = Field(1 << 31, ge=1)


def count_passes(options: Options, size: tuple[int, int, int], nets: int) -> float:
    """Return 0: no model is run."""
    return 0.0


def count_bytes(options: Options, size: tuple[int, int, int], count: int) -> int:
    """Return the bytes of nothing but the images."""
    return 0


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
    """Return `count` images drawn without replacement, with their labels if they have any.

    Raises:
        LoadError: the path cannot be read, or holds fewer images.
    """
    dataset = open_dataset(Path(options.path), graph.image, need_labels=False)
    if len(dataset) < count:
        raise LoadError(
            f"{options.path}: holds {len(dataset)} images and {count} were asked for; give more "
            f"images or --samples {len(dataset)}"
        )
    chosen = torch.randperm(len(dataset), generator=rng, device=rng.device)[:count].cpu()
    order = chosen.argsort()  # they are read in the order of the set, and stay in random order
    subset = dataset.subset(chosen.numpy())
    images = torch.empty(count, *graph.image.size)
    labels = torch.empty(count, dtype=torch.int64)
    done = 0
    for places, (batch, found) in zip(order.split(_READ), subset.batches(_READ), strict=True):
        images[places], labels[places] = torch.from_numpy(batch), torch.from_numpy(found)
        done += len(batch)
        progress(done, count, dataset.source)
    info = {"available": len(dataset)}
    return CalibSet(images, labels if dataset.labeled else None, GIVEN + dataset.source, info)
