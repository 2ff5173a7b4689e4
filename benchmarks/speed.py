"""Speed of `dfqc build`'s models beside float and beside the peers' files, on the same engine.

First `--prepare` makes everything (minutes, on a machine that may be busy); then the same command
without it times, on a quiet one. All models of a setting take turns, see `dfqc bench`; every call
has its wall clock and the CPU time of its process. Networks of torchvision have random weights,
with the batch norms' statistics of noise: that is as fast, and is not judged.

    python benchmarks/speed.py --work DIR --prepare && python benchmarks/speed.py --work DIR -o OUT
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _peers
import numpy as np
import torch
from _nets import Net, list_nets, open_net
from _plots import write_bars
from _tables import Columns, render_table, save_results, table_line, write_results

from dfqc.backends import _ort_census, _ov_census, openvino, ort
from dfqc.compiler.bench import sample
from dfqc.compiler.contracts import CalibSet, Model
from dfqc.compiler.errors import LoadError
from dfqc.compiler.graph import Graph
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.plan import make_plan
from dfqc.compiler.quantize import rtn
from dfqc.compiler.sizes import ideal_bytes
from dfqc.compiler.spec import default_ends, parse_bits

ZOO = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large"),
    *("efficientnet_b0", "regnet_y_400mf"),
)
ENGINES = {"ort": ort, "openvino": openvino}
BITS = ("w8a8", "w4a8", "w4a4")
PEERS = {"ort": ("onnxruntime", "nncf"), "openvino": ("onnxruntime", "nncf")}
WARMUP, CALLS = 3, 200
LEGEND = (
    "Times float: the float model's median over the quantized one's, CPU time of the process with "
    "one thread, wall clock with two; more is faster. `onnxruntime`: `quantize_static`, QDQ, per "
    "channel, after its own preprocessing. `nncf`: `nncf.quantize`, on ONNX for ONNX Runtime, on "
    "the engine's own format for OpenVINO. Both begin at the float model that dfqc's control is."
)


class Clocked:
    """A runner that keeps the CPU time of every call, of all threads of this process."""

    def __init__(self, runner: Model) -> None:
        self.runner = runner
        self.cpu: list[float] = []

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Run a batch."""
        start = time.process_time()
        outputs = self.runner.infer(images)
        self.cpu.append(time.process_time() - start)
        return outputs


def main() -> int:
    """Prepare, or measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", help="of torchvision or the assets; default: all")
    parser.add_argument("--work", type=Path, required=True, help="folder of what was prepared")
    parser.add_argument("--prepare", action="store_true", help="build what is missing there")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--bits", nargs="+", default=list(BITS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=1.5, help="per model and setting")
    parser.add_argument("-o", "--output", type=Path, help="write OUTPUT.json, .md and .svg")
    options = parser.parse_args()
    zoo_only = bool(options.nets) and set(options.nets) <= set(ZOO)
    assets = {} if zoo_only else {net.name: net for net in list_nets([])}
    names = options.nets or [*ZOO, *assets]
    if options.prepare:
        for name in names:
            prepare(name, assets.get(name), options)
        return 0
    rows = _measured(options.output)
    words = iter(sys.argv[1:])
    told = [w for w in words if w != "--work" or not next(words)]  # a place of this machine
    command = " ".join(["python", "benchmarks/speed.py", "--work", "DIR", *told])
    for name in names:
        for engine in options.engines:
            for threads in options.threads:
                for batch in options.batches:
                    if any(_setting(row) == (name, engine, threads, batch) for row in rows):
                        continue
                    rows.append(measure(name, engine, threads, batch, options))
                    print(table_line(COLUMNS, rows[-1]), flush=True)
        save_results(rows, render(rows, command), options.output)
    write_results(rows, render(rows, command), options.output)
    if options.output:
        write_bars(rows, options.output)
    return 0


def prepare(name: str, asset: Net | None, options: argparse.Namespace) -> None:
    """Make every model and peer's file of a network that is not there yet."""
    folder: Path = options.work / name
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(e, b) for e in options.engines for b in options.bits]
    missing = [(e, b) for e, b in wanted if not (folder / f"{e}-{b}.json").is_file()]
    if missing:
        graph = fold(open_net(asset) if asset else _peers.random_network(name))
        (folder / "float.onnx").write_bytes(ort.lower_float(graph))
        for engine, bits in missing:
            _compile(graph, engine, bits, folder)
            print(f"{name}: {engine} {bits}", flush=True)
    for peer, (file, make) in _peers.FILES.items():
        if not (folder / file).is_file():
            make(folder / "float.onnx", folder / file)
            print(f"{name}: {peer}", flush=True)


def _compile(graph: Graph, engine: str, bits: str, folder: Path) -> None:
    """Round to nearest, lower, and look at what the engine makes of that."""
    backend, asked = ENGINES[engine], parse_bits(bits)
    plan = make_plan(graph, backend.TARGET, asked, [], ends=default_ends(asked))
    images = torch.from_numpy(_peers.noise(graph.image.size))
    state = rtn.quantize(
        graph,
        CalibSet(images, None, "noise"),
        plan,
        rtn.Options(),
        rng=torch.Generator(),
        device=torch.device("cpu"),
    )
    lowered = backend.lower(graph, state, metadata={"dfqc": "benchmark"})
    path = folder / f"{engine}-{bits}.onnx"
    path.write_bytes(lowered.model)
    kernels = backend.executed(path, lowered.layers)
    convs = [n for n in kernels if isinstance(graph.module.get_submodule(n), torch.nn.Conv2d)]
    census = {"ort": _ort_census, "openvino": _ov_census}[engine]
    facts = {
        "ideal_ratio": len(lowered.model) / ideal_bytes(graph, state),
        "integer_convs": f"{sum(census.is_integer(kernels[n]) for n in convs)}/{len(convs)}",
        "image": list(graph.image.size),
    }
    path.with_suffix(".json").write_text(json.dumps(facts) + "\n", encoding="utf-8")


def measure(
    name: str, engine: str, threads: int, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Time all models of a network on an engine in one setting."""
    folder: Path = options.work / name
    files = {"float": folder / "float.onnx"}
    files |= {bits: folder / f"{engine}-{bits}.onnx" for bits in options.bits}
    files |= {peer: folder / _peers.file_of(peer, engine) for peer in PEERS[engine]}
    runners, refused = {}, {}
    for label, path in files.items():
        try:
            runners[label] = Clocked(_peers.open_file(ENGINES[engine], path, threads))
        except LoadError as error:
            if label not in PEERS[engine]:
                raise
            refused[label] = str(error)  # a peer's file that the engine does not take
    facts = {b: json.loads(files[b].with_suffix(".json").read_text()) for b in options.bits}
    size = facts[options.bits[0]]["image"]
    images = np.random.default_rng(0).standard_normal((batch, *size), np.float32)
    seconds = options.seconds * len(runners)
    wall = sample(runners, images, warmup=WARMUP, runs=CALLS, seconds=seconds)
    row: dict[str, Any] = {"net": name, "engine": engine, "threads": threads, "batch": batch}
    row["refused"] = refused
    for label, runner in runners.items():
        row[label] = {
            "wall_ms": float(np.median(wall[label])),
            "cpu_ms": 1000 * float(np.median(runner.cpu[WARMUP:])),
            "calls": len(wall[label]),
            "bytes": _peers.size_of(files[label]),
        }
    for bits in options.bits:
        row[bits] |= {k: facts[bits][k] for k in ("ideal_ratio", "integer_convs")}
    return row


def _measured(output: Path | None) -> list[dict[str, Any]]:
    """Return the rows of a run that was cut off."""
    file = output and output.with_suffix(".json")
    return json.loads(file.read_text()) if file and file.is_file() else []


def _setting(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("net", "engine", "threads", "batch"))


def ratio(row: Mapping[str, Any], label: str) -> float:
    """Return how many times as fast as float: by CPU time of one thread, by the clock of more."""
    clock = "cpu_ms" if row["threads"] == 1 else "wall_ms"
    return float(row["float"][clock] / row[label][clock])


def _ratio(label: str) -> Any:
    absent = "" if label in BITS else "refused"  # bits that were not asked for; peers' files
    return lambda row: f"{ratio(row, label):.2f}" if label in row else absent


def _timed(row: Mapping[str, Any]) -> list[str]:
    return [bits for bits in BITS if bits in row]


COLUMNS: Columns = (
    ("net", lambda r: r["net"]),
    ("engine", lambda r: r["engine"]),
    ("threads", lambda r: str(r["threads"])),
    ("batch", lambda r: str(r["batch"])),
    ("float ms", lambda r: f"{r['float']['wall_ms']:.2f}"),
    ("float CPU ms", lambda r: f"{r['float']['cpu_ms']:.2f}"),
    *((label, _ratio(label)) for label in (*BITS, "onnxruntime", "nncf")),
)
SIZES: Columns = (
    ("net", lambda r: r["net"]),
    ("engine", lambda r: r["engine"]),
    ("float kB", lambda r: f"{r['float']['bytes'] / 1e3:.0f}"),
    *(
        (
            f"{label} kB",
            lambda r, label=label: f"{r[label]['bytes'] / 1e3:.0f}" if label in r else "",
        )
        for label in (*BITS, "onnxruntime", "nncf")
    ),
    ("x ideal", lambda r: " ".join(f"{r[bits]['ideal_ratio']:.3f}" for bits in _timed(r))),
    ("integer convs", lambda r: " ".join(r[bits]["integer_convs"] for bits in _timed(r))),
)


def render(rows: list[dict[str, Any]], command: str) -> str:
    """Return the Markdown tables of speed and of size."""
    once = {(r["net"], r["engine"]): r for r in rows}
    sizes = render_table(SIZES, list(once.values()), command, "Sizes of the files.")
    return render_table(COLUMNS, rows, command, LEGEND) + "\n" + sizes.split("\n", 2)[2]


if __name__ == "__main__":
    sys.exit(main())
