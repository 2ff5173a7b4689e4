"""Block reconstruction of pruned networks: fitted to the pruned network or to the original one.

Channels are pruned uniformly (l2) and restored, and then refitted on the synthetic images or not;
each such network is then quantized by the block loop with both kinds of targets. Images are
mirrored and shifted for the refit, and its ridge is that of a build.

    python benchmarks/pruned_reconstruction.py resnet20_cifar10 --ratio .3 --bits w4a4 -o OUT
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _nets import list_nets
from _pruned import Case, choose_channels, kept_rows, open_case
from _tables import write_results

from dfqc.compiler import plugins
from dfqc.compiler.contracts import GIVEN, CalibSet, Pruned, QuantizerSupplies
from dfqc.compiler.graph import Graph
from dfqc.compiler.judging import augmented
from dfqc.compiler.options import plugin_options
from dfqc.compiler.passes._least_squares import refit
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.passes.restore import Options as RestoreOptions
from dfqc.compiler.passes.restore import restore
from dfqc.compiler.plan import make_plan
from dfqc.compiler.simulate import simulated
from dfqc.compiler.spec import default_ends, parse_bits
from dfqc.compiler.stages_prune import COPIES, RIDGE

CPU = torch.device("cpu")
TARGETS = ("pruned", "original")  # whose values the blocks learn
HEADER = ("net", "ratio", "bits", "images", "weights", "fitted to", "top-1", "drop", "kept", "s")


def main() -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="+", help="names of the assets' networks")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--quantizer", default="reconstruct")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--synth", default="genie")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--real", action="store_true", help="the same with as many real images too")
    parser.add_argument("--effort", default="quick", choices=("quick", "standard", "max"))
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("-o", "--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    command = " ".join(["python", "benchmarks/pruned_reconstruction.py", *sys.argv[1:]])
    rows: list[dict[str, Any]] = []
    for net in list_nets(options.nets):
        case = open_case(
            *(net,),
            samples=options.samples,
            effort=options.effort,
            synth=options.synth,
            count=options.images,
        )
        for source in (options.synth, *(("real",) if options.real else ())):
            for row in measure(case, source, options):
                shared = {"net": net.name, "ratio": options.ratio, "bits": options.bits}
                rows.append({**shared, "source": source, **row})
                print(line(rows[-1]), flush=True)
                write_results(rows, render(rows, command, options), options.output)
    return 0


def measure(case: Case, source: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of one network and one kind of images."""
    exact = case.top1(case.folded)
    keep = choose_channels(case, options.ratio, [], 1)["uniform l2"].keep
    restored = restore(case.graph, keep, RestoreOptions())
    images = augmented(case.images[source], COPIES, torch.Generator().manual_seed(0))
    rows = kept_rows(case.graph, keep)
    fitted = refit(case.graph, restored, images, outputs=rows, ridge=RIDGE)
    for name, pruned in (("restored", restored), ("least squares", fitted)):
        row = {"weights": name, "target": "", "float": exact, "top1": case.top1(pruned)}
        yield {**row, "kept": "not quantized", "seconds": 0.0, "images": len(case.labels)}
        for target in options.targets:
            unpruned = Pruned(case.graph, keep) if target == "original" else None
            start = time.perf_counter()
            found, kept = quantize(case, pruned, unpruned, source, options)
            seconds = time.perf_counter() - start
            yield {**row, "target": target, "top1": case.top1(found), "kept": kept,
                   "seconds": seconds, "images": len(case.labels)}  # fmt: skip


def quantize(
    case: Case, pruned: Graph, unpruned: Pruned | None, source: str, options: argparse.Namespace
) -> tuple[Graph, str]:
    """Return the quantized network, and which candidate was kept."""
    folded, bits = fold(pruned), parse_bits(options.bits)
    target = plugins.load("target", "ort").TARGET
    plan = make_plan(folded, target, bits, [], ends=default_ends(bits))
    plugin = plugins.load("quantizer", options.quantizer)
    name = GIVEN + source if source == "real" else source
    state = plugin.quantize(
        *(folded, CalibSet(case.images[source], None, name), plan),
        plugin_options(plugin, options.quantizer, options.effort, {}),
        rng=torch.Generator().manual_seed(0),
        device=CPU,
        supplies=QuantizerSupplies(unfolded=pruned, unpruned=unpruned),
    )
    return simulated(folded, state, integer=False), state.info.get("kept", "")


def line(row: dict[str, Any]) -> str:
    """Return one row of the table."""
    cells = [row["net"], f"{100 * row['ratio']:.0f} %", row["bits"], row["source"]]
    cells += [row["weights"], row["target"]]
    cells += [f"{row['top1']:.2f}", f"{row['float'] - row['top1']:.2f}", row["kept"]]
    return "| " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |"


def render(rows: list[dict[str, Any]], command: str, options: argparse.Namespace) -> str:
    """Return the Markdown table with its command."""
    setting = (
        f"Top-1 in percent on {rows[0]['images']} real images, by the simulation; drop against the "
        f"whole network in float. {options.samples} images. `fitted to`: whose "
        f"values the blocks learn. Threads: {torch.get_num_threads()}."
    )
    head = [
        f"Command: `{command}`",
        "",
        setting,
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + " --- |" * len(HEADER),
    ]
    return "\n".join([*head, *map(line, rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
