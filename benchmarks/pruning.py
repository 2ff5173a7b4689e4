"""Pruning and restoring without data, against others and with images: one table, one command.

Uniform ratios (smallest l2 norm of filters) with every form of restoration, then allocated
ones, weights in 6 and 4 bits, least squares on images, and masks. All are judged on the same real
labelled images, engines of pruned networks are timed beside the whole network's.

    python benchmarks/pruning.py resnet20_cifar10 --ratios .3 --bits 6 -o OUT
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from _nets import list_nets
from _pruned import BUDGETS, Case, Cut, choose_channels, kept_rows, open_case, sizes, time_engines
from _tables import Columns, render_table, save_results, table_line, write_results
from torch import Tensor

from dfqc.compiler import plugins
from dfqc.compiler.channels import remove
from dfqc.compiler.contracts import CalibSet, Pruned, QuantizerSupplies
from dfqc.compiler.graph import Graph, count_params
from dfqc.compiler.passes._least_squares import refit
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.passes.restore import Options as RestoreOptions
from dfqc.compiler.passes.restore import restore
from dfqc.compiler.passes.sparsity import apply_masks, mask_n_of_m, mask_smallest
from dfqc.compiler.plan import make_plan
from dfqc.compiler.quantize import rtn, udfc
from dfqc.compiler.simulate import simulated
from dfqc.compiler.spec import Bits

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"mean_fix": False, "variance_fix": False}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"method": "none", **PLAIN},
    "Neuron Merging": {"method": "merging", **PLAIN},
    "LBYL": {"method": "lbyl", **PLAIN},
    "udfc, no fixes": {"method": "patches", **PLAIN},
    "udfc + mean": {"method": "patches", "variance_fix": False},
    "udfc + mean + variance": {"method": "patches"},
}
BASELINES = ("plain", "Neuron Merging", "LBYL")
OURS = "udfc + mean + variance"
LEGEND = (
    "Top-1 in percent on real images, by the simulation. `W`: bits of all weights (activations "
    "in float); udfc rounds as it restores, the others are rounded to nearest afterwards. "
    "`least squares`: on top of " + OURS + ", layer by layer on these images. `params`, `MACs`: "
    "parts that are left. `speed-up`: float engine of the whole network / of the pruned one, one "
    "thread, in turns, medians (best calls); `x MACs`: times the MACs left, 1 is all that can be "
    "hoped for. `CPU s`: of choosing, restoring and rounding; no tracing, no making of images."
)


def main() -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="+", help="names of the assets' networks")
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--bits", nargs="*", type=int, default=[6, 4])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--budgets", nargs="*", default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--multiple", type=int, default=16, help="engines pad channels to it")
    parser.add_argument("--fitted", nargs="*", type=float, default=[0.2, 0.3, 0.5],
                        help="ratios with least squares on images")  # fmt: skip
    parser.add_argument("--masks", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--samples", type=int, default=256, help="images to fit on; 0: none")
    parser.add_argument("--synth", default="genie")
    parser.add_argument("--effort", default="quick", choices=("quick", "standard", "max"))
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--batch", type=int, default=16, help="of the timing")
    parser.add_argument("-o", "--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    command = " ".join(["python", "benchmarks/pruning.py", *map(shlex.quote, sys.argv[1:])])
    rows: list[dict[str, Any]] = []
    for net in list_nets(options.nets):
        case = open_case(
            *(net,),
            samples=options.samples,
            effort=options.effort,
            synth=options.synth,
            count=options.images,
        )
        exact = case.top1(case.folded)
        for row in measure(case, options):
            rows.append({"net": net.name, "float": exact, "made": case.made, **row})
            print(table_line(COLUMNS, rows[-1]), flush=True)
            save_results(rows, render(rows, command, options), options.output)
        del case
        gc.collect()
    write_results(rows, render(rows, command, options), options.output)
    return 0


def measure(case: Case, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of one network."""
    yield from measure_rounding(case, options)
    for ratio in options.ratios:
        cuts = choose_channels(case, ratio, options.budgets, options.multiple)
        speeds = time_engines(case, cuts, options.batch)
        for name, cut in cuts.items():
            params, macs = sizes(case, remove(case.graph, cut.keep))
            common = {"pruning": name, "ratio": ratio, "params": params, "macs": macs}
            common |= {"speedup": speeds[name]["median"], "speedup_best": speeds[name]["best"]}
            for row in measure_cut(case, cut, name, ratio, options):
                yield common | row
    if options.masks:
        yield from measure_masks(case)


def measure_rounding(case: Case, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the whole network's rows in few bits."""
    whole = {"pruning": "none", "ratio": 0.0, "params": 1.0, "macs": 1.0}
    for bits in options.bits:
        for name in ("plain", *(f for f in options.forms if f not in BASELINES)):
            start = time.process_time()
            if name == "plain":
                found = round_nearest(case.folded, bits)
            else:
                found = round_jointly(case, case.folded, {}, FORMS[name], bits)
            seconds = time.process_time() - start
            yield whole | _row(case, found, name if name != "plain" else "rtn", bits, seconds)


def measure_cut(
    case: Case, cut: Cut, name: str, ratio: float, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one choice of channels; allocated ones with the restoration they expect."""
    uniform = name == "uniform l2"
    smaller = fold(remove(case.graph, cut.keep))
    for form in options.forms:
        if not uniform and form != OURS:
            continue
        start = time.process_time()
        chosen = RestoreOptions(**FORMS[form])
        restored = restore(case.graph, cut.keep, chosen)
        seconds = cut.seconds + time.process_time() - start
        yield _row(case, restored, form, 32, seconds)
        for bits in options.bits:
            start = time.process_time()
            if form in BASELINES:
                rounded, before = round_nearest(fold(restored), bits), seconds
            else:
                rounded = round_jointly(case, smaller, cut.keep, FORMS[form], bits)
                before = cut.seconds
            yield _row(case, rounded, form, bits, before + time.process_time() - start)
        if form != OURS or ratio not in options.fitted:
            continue
        for source, images in case.images.items():
            start = time.process_time()
            rows = kept_rows(case.graph, cut.keep)
            fitted = refit(case.graph, restored, images, outputs=rows)
            taken = seconds + time.process_time() - start
            yield _row(case, fitted, _fit_name(images, source), 32, taken)


def measure_masks(case: Case) -> Iterator[dict[str, Any]]:
    """Yield the rows of masked networks, which keep their shapes."""
    kinds = {
        "unstructured": mask_smallest(case.folded, 0.5),
        "2:4": mask_n_of_m(case.folded),
    }
    for name, masks in kinds.items():
        masked = apply_masks(case.folded, masks.keep)
        zeros = sum(int((~mask).sum()) for mask in masks.keep.values())
        left = 1 - zeros / count_params(case.folded)
        common = {"pruning": name, "ratio": 0.5, "params": left, "macs": 1.0}
        yield common | _row(case, masked, "plain", 32, 0.0)
        start = time.process_time()
        fixed = round_jointly(case, masked, {}, FORMS[OURS], 8)
        yield common | _row(case, fixed, "udfc, fixes alone", 8, time.process_time() - start)
        for source, images in case.images.items():
            start = time.process_time()
            fitted = refit(case.folded, masked, images, outputs={}, masks=masks.keep)
            seconds = time.process_time() - start
            yield common | _row(case, fitted, _fit_name(images, source), 32, seconds)


def round_nearest(folded: Graph, bits: int) -> Graph:
    """Return the network with weights rounded to nearest."""
    return _rounded(folded, rtn, rtn.Options(), bits, QuantizerSupplies())


def round_jointly(
    case: Case, folded: Graph, keep: Mapping[str, Tensor], form: dict[str, Any], bits: int
) -> Graph:
    """Return the pruned network restored and rounded in one closed form."""
    supplies = QuantizerSupplies(unpruned=Pruned(case.graph, keep))
    return _rounded(folded, udfc, udfc.Options(**form), bits, supplies)


def _rounded(
    folded: Graph, plugin: Any, options: Any, bits: int, supplies: QuantizerSupplies
) -> Graph:
    """Quantize the weights of all layers; activations stay in float and need no images."""
    target = plugins.load("target", "ort").TARGET
    plan = make_plan(folded, target, Bits(bits, 32), [], ends=None)
    image = CalibSet(torch.zeros(1, *folded.image.size), None, "none")
    rng = torch.Generator().manual_seed(0)
    state = plugin.quantize(folded, image, plan, options, rng=rng, device=CPU, supplies=supplies)
    return simulated(folded, state, integer=False)


def _row(case: Case, graph: Graph, method: str, bits: int, seconds: float) -> dict[str, Any]:
    return {
        "method": method,
        "bits": bits,
        "images": len(case.labels),
        "top1": case.top1(graph),
        "seconds": seconds,
    }


def _fit_name(images: Tensor, source: str) -> str:
    return f"least squares, {len(images)} {source}"


COLUMNS: Columns = (
    ("net", lambda r: r["net"]),
    ("pruning", lambda r: r["pruning"]),
    ("ratio", lambda r: f"{100 * r['ratio']:.0f} %"),
    ("method", lambda r: r["method"]),
    ("W", lambda r: "float" if r["bits"] == 32 else str(r["bits"])),
    ("top-1", lambda r: f"{r['top1']:.2f}"),
    ("drop", lambda r: f"{r['float'] - r['top1']:.2f}"),
    ("params", lambda r: f"{r['params']:.3f}"),
    ("MACs", lambda r: f"{r['macs']:.3f}"),
    ("speed-up", lambda r: _speed(r, 1.0)),
    ("x MACs", lambda r: _speed(r, r["macs"])),
    ("CPU s", lambda r: f"{r['seconds']:.2f}"),
)


def _speed(row: dict[str, Any], factor: float) -> str:
    if "speedup" not in row:
        return ""
    return f"{factor * row['speedup']:.2f} ({factor * row['speedup_best']:.2f})"


def render(rows: list[dict[str, Any]], command: str, options: argparse.Namespace) -> str:
    """Return the Markdown table with its command."""
    made = {f"{r['net']}: {r['made']:.0f} s" for r in rows if r["made"]}
    floats = {f"{r['net']}: {r['float']:.2f} on {r['images']} images" for r in rows}
    setting = (
        f"Batch of the timing: {options.batch}. Threads: {torch.get_num_threads()}. "
        f"Float top-1: {'; '.join(sorted(floats))}. "
        f"Synthetic images made in: {'; '.join(sorted(made)) or 'none made'}."
    )
    return render_table(COLUMNS, rows, command, f"{LEGEND} {setting}")


if __name__ == "__main__":
    sys.exit(main())
