"""What the pruning benchmark works with: a network in; images, kept channels and engines out."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _judge import read_set
from _nets import Net, write_member, zoo_of
from torch import Tensor

from dfqc.backends import ort
from dfqc.compiler import bench
from dfqc.compiler.channels import find_groups, remove
from dfqc.compiler.dataset import open_dataset
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph, count_macs, count_params
from dfqc.compiler.job import make_job
from dfqc.compiler.passes import prune
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.pipeline import make_driver, open_store
from dfqc.compiler.recipe import make_recipe

BUDGETS = ("channels", "params", "macs")
SECONDS = 2.0  # of timing per engine


@dataclass(frozen=True)
class Case:
    """A network with images to fit on, by where they come from, and labelled ones to judge by."""

    net: Net
    graph: Graph  # unfolded
    folded: Graph
    images: Mapping[str, Tensor]
    made: float  # seconds for the synthetic ones
    test: list[Tensor]
    labels: Tensor

    def top1(self, graph: Graph) -> float:
        """Return the percentage of the test images that a network puts into their class."""
        with torch.inference_mode():
            found = torch.cat([graph.module(part).argmax(1) for part in self.test])
        return 100 * float((found == self.labels).double().mean())


def open_case(net: Net, *, samples: int, effort: str, synth: str, count: int) -> Case:
    """Trace a network and make or read its images.

    `count` test images are spread over the set; real images to fit on are never among them.
    """
    flags = zip(net.flags[1::2], net.flags[2::2], strict=True)
    given: dict[str, Any] = {name[2:].replace("-", "_"): value for name, value in flags}
    given |= {"model": net.flags[0], "effort": effort, "samples": max(1, samples), "synth": synth}
    last = "synthesize" if samples else "fold"
    with tempfile.TemporaryDirectory(prefix="dfqc-bench-") as scratch, open_store(scratch) as store:
        if synth == "mixmix":
            zoo = [write_member(other, Path(scratch)) for other in zoo_of(net)]
            given["zoo"] = ",".join(map(str, zoo))
        job = make_job(make_recipe(given))
        driver = make_driver(job, store, last=last)
        driver.run()
        graph = driver.value("equalize")
        seconds = sum(r.seconds for r in driver.records if r.name == "synthesize")
        images = {}
        if samples:
            images[synth] = driver.value("synthesize").images
    data = open_dataset(net.test, graph.image)
    step = len(data) / count
    rows = [int(i * step) for i in range(count)]
    if samples:
        images["real"] = _real_images(net, graph, samples, set(rows))
    batches = list(data.subset(rows).batches(50))
    labels = torch.cat([torch.from_numpy(part) for _, part in batches])
    test = [torch.from_numpy(part) for part, _ in batches]
    return Case(net, graph, fold(graph), images, seconds, test, labels)


def _real_images(net: Net, graph: Graph, samples: int, judged: set[int]) -> Tensor:
    """Return images of the model's data that it is not judged on."""
    if not net.in_sample:
        return read_set(net.real, graph)[0][:samples]
    data = open_dataset(net.real, graph.image)
    free = [i for i in range(len(data)) if i not in judged]
    if len(free) < samples:
        raise SystemExit(f"{net.name}: {len(free)} images are left to fit on; lower --images")
    chosen = data.subset(free[:: len(free) // samples][:samples])
    return torch.cat([torch.from_numpy(part) for part, _ in chosen.batches(64)])


@dataclass(frozen=True)
class Cut:
    """Channels that stay, and how long it took to choose them."""

    keep: Mapping[str, Tensor]
    seconds: float


def choose_channels(case: Case, ratio: float, budgets: list[str], multiple: int) -> dict[str, Cut]:
    """Return the uniform choice and, per budget, an allocation that goes as far.

    Of `channels` the same part goes in all; `params` and `macs` leave what the uniform one leaves.
    For `macs` there is another one that keeps a multiple of channels, if one goes that far.
    """
    graph = case.graph
    start = time.process_time()
    uniform = prune.choose(graph, prune.Options(ratio=ratio, criterion="l2"))
    found = {"uniform l2": Cut(uniform.keep, time.process_time() - start)}
    if not budgets:
        return found
    groups = [g for g in find_groups(graph) if g.prunable and not g.residual]
    params, macs = sizes(case, remove(graph, uniform.keep))
    gone = sum(g.size - len(uniform.keep.get(g.name, range(g.size))) for g in groups)
    parts = {"channels": gone / sum(g.size for g in groups), "params": params, "macs": macs}
    wanted = [(budget, 1) for budget in budgets]
    wanted += [("macs", multiple)] if "macs" in budgets and multiple > 1 else []
    for budget, step in wanted:
        start = time.process_time()
        given: dict[str, Any] = {budget: parts[budget], "criterion": "moments", "multiple": step}
        try:
            decision = prune.choose(graph, prune.Options(**given))
        except UsageError as error:
            print(f"{case.net.name}: no {budget} in multiples of {step}: {error}", file=sys.stderr)
            continue
        seconds = time.process_time() - start
        name = f"allocated {budget}" + (f", multiples of {step}" if step > 1 else "")
        found[name] = Cut(decision.keep, seconds)
    return found


def sizes(case: Case, graph: Graph) -> tuple[float, float]:
    """Return the parts of the parameters and of the MACs that are left."""
    whole = case.graph
    return (
        count_params(graph) / count_params(whole),
        count_macs(graph) / count_macs(whole),
    )


def kept_rows(graph: Graph, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, per layer, the output channels that are left."""
    groups = {g.name: g for g in find_groups(graph)}
    return {
        path: channels
        for name, channels in keep.items()
        for path in groups[name].producers + groups[name].through
    }


def time_engines(case: Case, cuts: Mapping[str, Cut], batch: int) -> dict[str, dict[str, float]]:
    """Return how much faster than the whole network's each cut network's float engine is."""
    graphs = {"whole": case.folded}
    graphs |= {name: fold(remove(case.graph, cut.keep)) for name, cut in cuts.items()}
    runners = {}
    with tempfile.TemporaryDirectory(prefix="dfqc-bench-") as folder:
        for number, (name, graph) in enumerate(graphs.items()):
            file = Path(folder) / f"{number}.onnx"
            file.write_bytes(ort.lower_float(graph))
            runners[name] = ort.open_runner(file, threads=1)
        images = bench.random_images(case.graph.image, batch)
        # As many runs as fit: engines of so different sizes share the time.
        times = bench.sample(runners, images, runs=2000, seconds=SECONDS * len(runners))
        for runner in runners.values():
            runner.close()
    return {name: bench.speedup(times["whole"], times[name]) for name in cuts}
