"""What training on synthetic images adds to reconstruction: AdaDFQ and LSQ with distillation.

Images, held-out images and graphs are those of `dfqc build`. Every trained row has the top-1 of the
last state, which is what is compared with the papers, and of what a build ships: the best of the
start, the last state and those on the way, chosen without labels. Both come from one training.

    python benchmarks/training.py resnet20_cifar10 --bits w3a3 w4a4 --ends same -o OUT
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _nets import list_nets
from _tables import Columns, render_table, save_results, table_line, write_results
from reconstruction import Case, open_case, predict
from torch import Tensor

from dfqc.compiler import plugins
from dfqc.compiler.contracts import QuantizerSupplies, QuantState
from dfqc.compiler.dataset import open_dataset
from dfqc.compiler.options import plugin_options
from dfqc.compiler.passes import bias
from dfqc.compiler.plan import make_plan
from dfqc.compiler.simulate import simulated
from dfqc.compiler.spec import Plan, default_ends, parse_bits

CPU = torch.device("cpu")
# label -> quantizer and its options beside those of the effort
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "reconstruct": ("reconstruct", {}),
    "adadfq, published start": ("adadfq", {"start": "published"}),
    "adadfq, reconstructed": ("adadfq", {"start": "reconstruct"}),
    "adasg, published start": ("adadfq", {"method": "adasg", "start": "published"}),
    "qat": ("qat", {}),
    "qat, closed form": ("qat", {"start": "gptq"}),
    "qat, per tensor": ("qat", {"weight_steps": "tensor"}),
}
LEGEND = (
    "Top-1 in percent on real images, by the simulation: `last`, the state that training ended "
    "with; `shipped`, what a build keeps of it, the start and the states on the way, chosen on "
    "synthetic images. adadfq makes its own images, and starts and judges with those of the row. "
    "`CPU s`: the start and the training, images not counted. Ends `w8a8`: 8-bit first and last "
    "layer; `same`: k bits everywhere."
)


@dataclass(frozen=True)
class Judge:
    """Labelled images, and what the float network answers to them."""

    images: list[Tensor]
    labels: Tensor
    top1_float: float

    def top1(self, case: Case, state: QuantState) -> float:
        """Return the percentage of the images that a state puts into their class."""
        found = predict(simulated(case.graph, state, integer=False), self.images)
        return 100 * float((found.argmax(1) == self.labels).double().mean())


def main() -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="+", help="names of the assets' networks")
    parser.add_argument("--bits", nargs="+", default=["w5a5", "w4a4", "w3a3"])
    parser.add_argument("--ends", nargs="+", default=["same"], choices=("w8a8", "same"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sources", nargs="+", default=["genie"])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--real-images", type=int, default=1024)
    parser.add_argument("--effort", default="quick", choices=("quick", "standard", "max"))
    parser.add_argument("--iterations", type=int, help="of the training, instead of the effort's")
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("-o", "--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    command = shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]])
    rows: list[dict[str, Any]] = []
    for net in list_nets(options.nets):
        for source in options.sources:
            case = open_case(net, source, options)
            for row in measure(case, source, options):
                rows.append(row)
                print(table_line(COLUMNS, row), flush=True)
                save_results(rows, render(rows, command), options.output)
    write_results(rows, render(rows, command), options.output)
    return 0


def measure(case: Case, source: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row per convention, bits and method."""
    judge = read_judge(case, options.test_images)
    target = plugins.load("target", "ort").TARGET
    for ends in options.ends:
        for bits in options.bits:
            asked = parse_bits(bits)
            chosen = default_ends(asked) if ends == "w8a8" else None
            plan = make_plan(case.graph, target, asked, [], ends=chosen)
            for method in options.methods:
                name, overrides = METHODS[method]
                if options.iterations and name != "reconstruct":
                    overrides = overrides | {"iterations": options.iterations}
                parts = Parts()
                start = time.process_time()
                shipped = quantize(case, plan, name, overrides, options.effort, parts)
                seconds = time.process_time() - start
                row = {
                    "net": case.net.name,
                    "calibration": source,
                    "calibration_images": len(case.calib.images),
                    "bits": bits,
                    "ends": ends,
                    "method": method,
                    "images": len(judge.labels),
                    "float": judge.top1_float,
                    "shipped": judge.top1(case, shipped),
                    "kept": shipped.info.get("kept", ""),
                    "iterations": shipped.info.get("iterations"),
                    "cpu_seconds": seconds,
                    "threads": torch.get_num_threads(),
                }
                if name != "reconstruct":
                    overrides = overrides | {"keep_best": False}
                    last = quantize(case, plan, name, overrides, options.effort, parts)
                    row["collapsed"] = last.info.get("collapsed", "")
                    if not row["collapsed"]:  # a last state that is none has no figure
                        row["last"] = judge.top1(case, last)
                yield row


def read_judge(case: Case, count: int) -> Judge:
    """Read the labelled images."""
    data = open_dataset(case.net.test, case.graph.image)
    batches = list(data.batches(250))[: -(-count // 250)]
    labels = torch.cat([torch.from_numpy(part) for _, part in batches])
    images = [torch.from_numpy(part) for part, _ in batches]
    right = predict(case.graph, images).argmax(1) == labels
    return Judge(images, labels, 100 * float(right.double().mean()))


class Parts:
    """Finished parts of a training in memory: one training serves two questions."""

    def __init__(self) -> None:
        """Begin with none."""
        self.made: dict[str, Any] = {}

    def __call__(
        self,
        part: Mapping[str, Any],
        make: Callable[[], Any],
        save: Callable[[Any, Path], None],
        load: Callable[[Path], Any],
    ) -> Any:
        """Return the part, made or as it was made before."""
        key = json.dumps(part, sort_keys=True, default=str)
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


def quantize(
    case: Case, plan: Plan, name: str, overrides: Mapping[str, Any], effort: str, parts: Parts
) -> QuantState:
    """Run one method with the bias correction of a build."""
    plugin = plugins.load("quantizer", name)
    state: QuantState = plugin.quantize(
        *(case.graph, case.calib, plan, plugin_options(plugin, name, effort, overrides)),
        rng=torch.Generator().manual_seed(0),
        device=CPU,
        supplies=QuantizerSupplies(
            unfolded=case.unfolded,
            held_out=case.held_out,
            fitting=case.fitting,
            checkpoint=parts,
        ),
    )
    return bias.correct(
        *(case.graph, case.unfolded, state, case.calib),
        bias.Options.model_validate({"method": "auto"}),
        device=CPU,
        held_out=case.held_out,
    )


def _points(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return ""
    return f"{row[key]:.2f} ({row['float'] - row[key]:.2f})"


COLUMNS: Columns = (
    ("net", lambda r: r["net"]),
    ("images", lambda r: f"{r['calibration_images']} {r['calibration']}"),
    ("bits", lambda r: r["bits"]),
    ("ends", lambda r: r["ends"]),
    ("method", lambda r: r["method"]),
    ("iterations", lambda r: str(r["iterations"] or "")),
    ("last (drop)", lambda r: _points(r, "last")),
    ("shipped (drop)", lambda r: _points(r, "shipped")),
    ("kept", lambda r: r["kept"]),
    ("collapsed", lambda r: r.get("collapsed") or ""),
    ("CPU s", lambda r: f"{r['cpu_seconds']:.0f}"),
)


def render(rows: list[dict[str, Any]], command: str) -> str:
    """Return the Markdown table with its command."""
    floats = {f"{r['net']} {r['float']:.2f} on {r['images']} images" for r in rows}
    legend = f"{LEGEND} Float: {'; '.join(sorted(floats))}. Threads: {rows[0]['threads']}."
    return render_table(COLUMNS, rows, command, legend)


if __name__ == "__main__":
    sys.exit(main())
