"""How long ours and the published loops take to images of equal batch-norm distance.

Both run in this process on the same network, batch and threads. Ours makes one batch with the
options of `--effort`; then the straight loop runs until its images are as near to the batch norms'
statistics, or `--limit` times as long. Looking at the distance is not counted.

    python benchmarks/synthesis_speed.py --output benchmarks/results/synthesis_speed.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _published
import torch
from _judge import open_net
from _nets import Net, list_nets
from torch import Tensor

from dfqc.compiler import plugins
from dfqc.compiler.calib_quality import bn_distance
from dfqc.compiler.contracts import Supplies
from dfqc.compiler.graph import Graph
from dfqc.compiler.loading import load_model
from dfqc.compiler.options import plugin_options

METHODS = ("zeroq", "deepinversion", "genie")
LOOK = 10  # iterations between two looks at the distance


def main() -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", default=["resnet20_cifar10"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--effort", default="quick", choices=("quick", "standard", "max"))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--limit", type=float, default=10.0, help="times the time of ours")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    header = (
        *("net", "method", "BN distance", "ours s", "straight s", "ratio"),
        *("ours ms/iteration", "straight ms/iteration", "ratio"),
    )
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    print("\n".join(lines))
    for net in list_nets(options.nets):
        for method in options.methods:
            lines.append("| " + " | ".join(measure(net, method, options)) + " |")
            print(lines[-1], flush=True)
    command = f"Command: `python benchmarks/synthesis_speed.py {' '.join(sys.argv[1:])}`"
    text = "\n".join([command, "", f"Threads: {torch.get_num_threads()}", "", *lines]) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    return 0


def measure(net: Net, method: str, options: argparse.Namespace) -> list[str]:
    """Return one row."""
    graph = open_net(net)
    start = time.perf_counter()
    images, iterations = ours(graph, method, options)
    seconds = time.perf_counter() - start
    goal = mean_distance(graph, images)
    taken, best, count = run_until(
        straight(net, graph, method, options), graph, goal, seconds, options
    )
    reached = best <= goal
    mark = "" if reached else f"> (at {best:.3f}) "
    ratio = f"{'' if reached else '> '}{taken / seconds:.1f}"
    each, theirs = 1e3 * seconds / iterations, 1e3 * taken / count
    return [
        *(net.name, method, f"{goal:.3f}", f"{seconds:.1f}", f"{mark}{taken:.1f}", ratio),
        *(f"{each:.0f}", f"{theirs:.0f}", f"{theirs / each:.2f}"),
    ]


def ours(graph: Graph, method: str, options: argparse.Namespace) -> tuple[Tensor, int]:
    """Make one batch; return it and the number of iterations."""
    plugin = plugins.load("synthesizer", method)
    size = {"batch_size": options.images}
    calib = plugin.synthesize(
        graph,
        options.images,
        plugin_options(plugin, method, options.effort, size),
        rng=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
        supplies=Supplies(),
    )
    return calib.images, int(calib.info["iterations"])


def straight(net: Net, graph: Graph, method: str, options: argparse.Namespace) -> Iterator[Tensor]:
    """Return the published loop on the model as its author gives it."""
    torch.manual_seed(0)
    flags = dict(zip(net.flags[1::2], net.flags[2::2], strict=True))
    loaded: Any = load_model(net.flags[0], arch=flags["--arch"]).model
    shape = (options.images, *graph.image.size)
    if method == "deepinversion":
        if min(graph.image.size[1:]) > 64:
            raise SystemExit("the straight DeepInversion is the published one of CIFAR's size only")
        classes = 100 if "cifar100" in net.name else 10
        return _published.deepinversion(loaded, shape, classes)
    return getattr(_published, method)(loaded, shape)


def run_until(
    loop: Iterator[Tensor], graph: Graph, goal: float, seconds: float, options: argparse.Namespace
) -> tuple[float, float, int]:
    """Return the seconds of the loop, the least distance seen and the number of iterations."""
    taken, best, count = 0.0, float("inf"), 0
    start = time.perf_counter()
    for count, images in enumerate(loop, 1):
        taken += time.perf_counter() - start
        if count % LOOK == 0:
            best = min(best, mean_distance(graph, images))
        if best <= goal or taken > options.limit * seconds:
            break
        start = time.perf_counter()
    return taken, best, count


def mean_distance(graph: Graph, images: Tensor) -> float:
    """Return the mean distance to the stored statistics over all batch norms."""
    return statistics.mean(bn_distance(graph, images).values())


if __name__ == "__main__":
    sys.exit(main())
