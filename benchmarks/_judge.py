"""What a set of calibration images is worth: images and networks in, figures out."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from _nets import Net, open_net
from torch import Tensor

from dfqc.backends import ort
from dfqc.compiler.calib_quality import bn_distance
from dfqc.compiler.contracts import CalibSet
from dfqc.compiler.dataset import open_dataset
from dfqc.compiler.graph import Graph
from dfqc.compiler.passes import bias
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.plan import make_plan
from dfqc.compiler.quantize import rtn
from dfqc.compiler.spec import parse_bits

CPU = torch.device("cpu")
open_net = functools.cache(open_net)  # a network is traced once, whatever is measured on it


def read_set(path: Path, graph: Graph) -> tuple[Tensor, Tensor]:
    """Return the images of a file of `dfqc synth` in the normalization of `graph`, and labels."""
    parts = list(open_dataset(path, graph.image, need_labels=False).batches(64))
    images = np.concatenate([images for images, _ in parts])
    return torch.from_numpy(images), torch.from_numpy(np.concatenate([n for _, n in parts]))


def distance(net: Net, path: Path) -> float:
    """Return the mean distance to the batch-norm statistics of a network; 0 is a match."""
    graph = open_net(net)
    found = bn_distance(graph, read_set(path, graph)[0])
    return sum(found.values()) / len(found)


@torch.inference_mode()
def classify(net: Net, path: Path) -> Tensor:
    """Return the class that a network puts each image into, (n,)."""
    graph = open_net(net)
    images = read_set(path, graph)[0]
    return torch.cat([graph.module(part).argmax(1) for part in images.split(64)])


def top1(judge: Net, net: Net, path: Path) -> float:
    """Return the percentage of the images that `judge` puts into the class of their label.

    Images without labels count as what `net`, for which they were made, takes them for.
    """
    labels = read_set(path, open_net(net))[1]
    if (labels < 0).all():
        labels = classify(net, path)
    return 100 * float((classify(judge, path) == labels).float().mean())


def accuracy(net: Net, path: Path, bits: str) -> float:
    """Return the engine's top-1 on real images, with ranges and biases from the images of a set.

    Rounding to nearest, biases corrected as a build does; ends in 8 bits.
    """
    graph = open_net(net)
    folded = fold(graph)
    plan = make_plan(folded, ort.TARGET, parse_bits(bits), [], ends=parse_bits("w8a8"))
    calib = CalibSet(read_set(path, graph)[0], None, "file")
    state = rtn.quantize(
        folded, calib, plan, rtn.Options(), rng=torch.Generator().manual_seed(0), device=CPU
    )
    options = bias.Options(method="auto")
    state = bias.correct(folded, graph, state, calib, options, device=CPU)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(ort.lower(folded, state, metadata={}).model)
        runner = ort.open_runner(file)
        data = open_dataset(net.test, graph.image)
        hits = sum(
            int((runner.infer(images).argmax(1) == labels).sum())
            for images, labels in data.batches(100)
        )
        runner.close()
    return 100 * hits / len(data)
