"""How much faster engines of pruned networks are, in float and in 8 bits, by widths that are kept.

Channels go uniformly (l2) in multiples of 1, 4, 8 and 16; every network is written in float and
at W8A8 and timed in turns with the whole one on the same engine: CPU time of one thread. Networks
of torchvision have random weights; nothing is judged here.

    python benchmarks/pruned_speed.py resnet18 resnet56_cifar10 -o OUT
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import _peers
import numpy as np
import torch
from _nets import list_nets, open_net
from _tables import Columns, render_table, table_line, write_results
from speed import ENGINES, WARMUP, Clocked

from dfqc.compiler.bench import sample
from dfqc.compiler.channels import remove
from dfqc.compiler.contracts import CalibSet
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph, count_macs
from dfqc.compiler.passes import prune
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.plan import make_plan
from dfqc.compiler.quantize import rtn
from dfqc.compiler.spec import default_ends, parse_bits

KINDS = ("float", "w8a8")
LEGEND = (
    "`float`, `w8a8`: time of the whole network over that of the pruned one, both in this "
    "precision, medians of CPU time, one thread. In brackets: over how many times fewer "
    "multiply-adds it has (1: as much faster as there is less to do)."
)


def main() -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="+", help="of torchvision or the assets")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--multiples", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=0.7, help="per model and setting")
    parser.add_argument("-o", "--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    assets = {net.name: net for net in list_nets([])} if _wants_assets(options.nets) else {}
    command = " ".join(["python", "benchmarks/pruned_speed.py", *sys.argv[1:]])
    rows: list[dict[str, Any]] = []
    for name in options.nets:
        graph = open_net(assets[name]) if name in assets else _peers.random_network(name)
        cases = dict(_cut(graph, options))
        for engine in options.engines:
            for row in measure(graph, cases, engine, options):
                rows.append({"net": name, "engine": engine, **row})
                print(table_line(COLUMNS, rows[-1]), flush=True)
    write_results(rows, render_table(COLUMNS, rows, command, LEGEND), options.output)
    return 0


def _wants_assets(names: list[str]) -> bool:
    import speed

    return not set(names) <= set(speed.ZOO)


def _cut(graph: Graph, options: argparse.Namespace) -> Iterator[tuple[tuple[float, int], Graph]]:
    """Yield the whole network and the pruned ones; multiples that leave nothing to go are not."""
    yield (0.0, 1), graph
    for ratio in options.ratios:
        for multiple in options.multiples:
            chosen = prune.Options(ratio=ratio, criterion="l2", multiple=multiple)
            try:
                yield (ratio, multiple), remove(graph, prune.choose(graph, chosen).keep)
            except UsageError as error:
                print(f"{ratio:.0%} in multiples of {multiple}: {error}", file=sys.stderr)


def measure(
    whole: Graph,
    cases: Mapping[tuple[float, int], Graph],
    engine: str,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one network on one engine."""
    with tempfile.TemporaryDirectory(prefix="dfqc-bench-") as scratch:
        runners = {
            (case, kind): Clocked(ENGINES[engine].open_runner(path, threads=1))
            for number, (case, graph) in enumerate(cases.items())
            for kind, path in zip(
                KINDS, _write(graph, engine, Path(scratch) / str(number)), strict=True
            )
        }
        for batch in options.batches:
            shape = (batch, *whole.image.size)
            images = np.random.default_rng(0).standard_normal(shape, np.float32)
            for runner in runners.values():
                runner.cpu.clear()
            sample(runners, images, warmup=WARMUP, runs=60, seconds=options.seconds * len(runners))
            times = {key: float(np.median(r.cpu[WARMUP:])) for key, r in runners.items()}
            first = next(iter(cases))
            for case, graph in cases.items():
                fewer = count_macs(whole) / count_macs(graph)
                yield {
                    "batch": batch,
                    "ratio": case[0],
                    "multiple": case[1],
                    "fewer": fewer,
                    **{f"{kind}_ms": 1000 * times[case, kind] for kind in KINDS},
                    **{kind: times[first, kind] / times[case, kind] for kind in KINDS},
                }


def _write(graph: Graph, engine: str, path: Path) -> tuple[Path, Path]:
    """Write a network in float and, rounded to nearest, at W8A8."""
    backend, folded, bits = ENGINES[engine], fold(graph), parse_bits("w8a8")
    plan = make_plan(folded, backend.TARGET, bits, [], ends=default_ends(bits))
    images = CalibSet(torch.from_numpy(_peers.noise(folded.image.size)), None, "noise")
    state = rtn.quantize(
        *(folded, images, plan, rtn.Options()), rng=torch.Generator(), device=torch.device("cpu")
    )
    found = path.with_suffix(".float.onnx"), path.with_suffix(".onnx")
    found[0].write_bytes(backend.lower_float(folded))
    found[1].write_bytes(backend.lower(folded, state, metadata={"dfqc": "benchmark"}).model)
    return found


def _gain(row: Mapping[str, Any], kind: str) -> str:
    return f"{row[kind]:.2f} ({row[kind] / row['fewer']:.2f})"


COLUMNS: Columns = (
    ("net", lambda r: r["net"]),
    ("engine", lambda r: r["engine"]),
    ("batch", lambda r: str(r["batch"])),
    ("pruned", lambda r: f"{100 * r['ratio']:.0f} %"),
    ("multiples of", lambda r: str(r["multiple"])),
    ("fewer MACs", lambda r: f"{r['fewer']:.2f}"),
    ("float ms", lambda r: f"{r['float_ms']:.2f}"),
    ("w8a8 ms", lambda r: f"{r['w8a8_ms']:.2f}"),
    ("float", lambda r: _gain(r, "float")),
    ("w8a8", lambda r: _gain(r, "w8a8")),
)


if __name__ == "__main__":
    sys.exit(main())
