"""Every quantizer on real networks, with synthetic and with real images: one table, one command.

Images, held-out images and graphs are those of `dfqc build`; each method then runs in this process
with the bias correction that a build puts behind it, and is judged on real labelled images by the
simulation (which the engine repeats: see the parity column of `accuracy.py`).

    python benchmarks/reconstruction.py resnet20_cifar10 --bits w4a4 w3a3 w2a4 -o OUT
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _nets import Net, list_nets, write_member, zoo_of
from _tables import Columns, render_table, save_results, table_line, write_results
from torch import Tensor

from dfqc.compiler import machine, plugins
from dfqc.compiler.contracts import CalibSet, QuantizerSupplies, QuantState
from dfqc.compiler.dataset import open_dataset
from dfqc.compiler.graph import Graph, has_batch_norm
from dfqc.compiler.job import make_job
from dfqc.compiler.options import plugin_options
from dfqc.compiler.passes import bias
from dfqc.compiler.pipeline import make_driver, open_store
from dfqc.compiler.plan import make_plan
from dfqc.compiler.recipe import make_recipe
from dfqc.compiler.simulate import simulated
from dfqc.compiler.spec import Plan, default_ends, parse_bits
from dfqc.compiler.stages_calib import count_fitting

CPU = torch.device("cpu")
BITS = ("w8a8", "w4a8", "w4a4", "w3a3", "w2a4")
PUBLISHED = "genie-m, published"  # 20,000 iterations per unit, whatever --effort is
NOTHING = "gptq, nothing"  # no image anywhere: the biases too are corrected by batch norms alone
_NO_IMAGES = CalibSet(torch.empty(0), None, "none")
ALONE = {"compete": False}  # what the method learned, not what is ready without it
# label -> quantizer and its options beside those of the effort
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "squant": ("squant", {}),
    "gptq, no images": ("gptq", {"hessian": "bn"}),
    NOTHING: ("gptq", {"hessian": "bn", "acts": "bn"}),
    "gptq": ("gptq", {}),
    "adaround": ("adaround", ALONE),
    "brecq": ("brecq", ALONE),
    "qdrop": ("qdrop", ALONE),
    "genie-m": ("genie-m", ALONE),
    "reconstruct": ("reconstruct", {}),
    "a quarter undecided": ("reconstruct", {"undecided": 0.25}),
    PUBLISHED: ("genie-m", ALONE),
}
LEGEND = (
    "Top-1 in percent on real images, by the simulation. `agreement`: with the float network. `s`: "
    "wall clock of the quantizer and the bias correction (images not counted). `MB`: peak resident "
    "memory meanwhile, the interpreter and the test images included. `kept`: what won on the "
    "held-out images. Ends `w8a8`: 8-bit first and last layer; `same`: k bits everywhere."
)


@dataclass(frozen=True)
class Case:
    """A network with the images that a build would calibrate and judge it with."""

    net: Net
    graph: Graph
    unfolded: Graph
    calib: CalibSet
    held_out: Tensor
    fitting: int  # how many of them look like the network's data
    seconds: float  # for making the calibration images


def main() -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", help="names of the assets' networks; default: all")
    parser.add_argument("--bits", nargs="+", default=list(BITS))
    parser.add_argument("--ends", nargs="+", default=["w8a8"], choices=("w8a8", "same"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS)[:-2], choices=list(METHODS))
    parser.add_argument("--sources", nargs="+", default=["genie", "real"])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--real-images", type=int, default=1024)
    parser.add_argument("--effort", default="quick", choices=("quick", "standard", "max"))
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="of the images and of the quantizer")
    parser.add_argument("-o", "--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    command = shlex.join(["python", "benchmarks/reconstruction.py", *sys.argv[1:]])
    for net in list_nets(options.nets):
        for source in options.sources:
            case = open_case(net, source, options)
            for row in measure(case, source, options):
                rows.append(row)
                print(table_line(COLUMNS, row), flush=True)
                save_results(rows, render(rows, command), options.output)  # a killed run's too
            del case
            gc.collect()
    write_results(rows, render(rows, command), options.output)
    return 0


def open_case(net: Net, source: str, options: argparse.Namespace) -> Case:
    """Run the stages of a build up to the held-out images."""
    flags = zip(net.flags[1::2], net.flags[2::2], strict=True)
    given: dict[str, Any] = {name[2:].replace("-", "_"): value for name, value in flags}
    given |= {"model": net.flags[0], "effort": options.effort, "samples": options.samples}
    given["seed"] = options.seed
    if source == "real":
        given |= {"calib_data": str(net.real), "samples": min(options.real_images, net.real_count)}
    else:
        given |= {"synth": source}
    with tempfile.TemporaryDirectory(prefix="dfqc-bench-") as scratch, open_store(scratch) as store:
        if source == "mixmix":
            zoo = [write_member(other, Path(scratch)) for other in zoo_of(net)]
            given["zoo"] = ",".join(map(str, zoo))
        job = make_job(make_recipe(given))
        driver = make_driver(job, store, last="fold")
        driver.run()
        seconds = next(r.seconds for r in driver.records if r.name == "synthesize")
        graph, unfolded, calib, held = (
            driver.value(n) for n in ("fold", "equalize", "synthesize", "holdout")
        )
    fitting = count_fitting(held, batch_norm=has_batch_norm(unfolded))
    return Case(net, graph, unfolded, calib, held.images, fitting, seconds)


def measure(case: Case, source: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row per convention, bits and method."""
    data = open_dataset(case.net.test, case.graph.image)
    batches = list(data.batches(250))[: -(-options.test_images // 250)]
    labels = torch.cat([torch.from_numpy(part) for _, part in batches])
    images = [torch.from_numpy(part) for part, _ in batches]
    exact = predict(case.graph, images)
    target = plugins.load("target", "ort").TARGET
    for ends in options.ends:
        for bits in options.bits:
            asked = parse_bits(bits)
            chosen = default_ends(asked) if ends == "w8a8" else None
            plan = make_plan(case.graph, target, asked, [], ends=chosen)
            for method in options.methods:
                if method == NOTHING and source != options.sources[0]:
                    continue  # the same once more
                calib = _NO_IMAGES if method == NOTHING else case.calib
                with machine.measured() as usage:
                    start = time.process_time()
                    state = quantize(
                        *(dataclasses.replace(case, calib=calib), plan, method),
                        effort=options.effort,
                        seed=options.seed,
                    )
                    cpu = time.process_time() - start
                found = predict(simulated(case.graph, state, integer=False), images)
                same = found.argmax(1) == exact.argmax(1)
                noise = (found - exact).double().square().sum()
                yield {
                    "net": case.net.name,
                    "calibration": "" if method == NOTHING else _describe(case, source),
                    "calibration_images": len(calib.images),
                    "synthesis_seconds": case.seconds,
                    "bits": bits,
                    "ends": ends,
                    "seed": options.seed,
                    "method": method,
                    "images": len(labels),
                    "float": 100 * float((exact.argmax(1) == labels).double().mean()),
                    "top1": 100 * float((found.argmax(1) == labels).double().mean()),
                    "agreement": 100 * float(same.double().mean()),
                    "sqnr_db": float(10 * torch.log10(exact.double().square().sum() / noise)),
                    "seconds": usage.seconds,
                    "cpu_seconds": cpu,
                    "peak_rss_bytes": usage.peak_rss_bytes,
                    "kept": state.info.get("kept", ""),
                    "bias_correction": state.info["bias_correction"]["method"],
                    "threads": torch.get_num_threads(),
                }


def quantize(case: Case, plan: Plan, method: str, *, effort: str, seed: int) -> QuantState:
    """Run one method with the bias correction of a build."""
    name, overrides = METHODS[method]
    plugin = plugins.load("quantizer", name)
    effort = "max" if method == PUBLISHED else effort
    state: QuantState = plugin.quantize(
        *(case.graph, case.calib, plan, plugin_options(plugin, name, effort, overrides)),
        rng=torch.Generator().manual_seed(seed),
        device=CPU,
        supplies=QuantizerSupplies(
            unfolded=case.unfolded, held_out=case.held_out, fitting=case.fitting
        ),
    )
    return bias.correct(
        *(case.graph, case.unfolded, state, case.calib),
        bias.Options.model_validate({"method": "analytic" if method == NOTHING else "auto"}),
        device=CPU,
        held_out=case.held_out,
    )


@torch.inference_mode()
def predict(graph: Graph, images: list[Tensor]) -> Tensor:
    """Return the outputs for all images, (n, classes)."""
    return torch.cat([graph.module(part) for part in images])


def _describe(case: Case, source: str) -> str:
    return f"{source} (in sample)" if source == "real" and case.net.in_sample else source


COLUMNS: Columns = (
    ("net", lambda r: r["net"]),
    ("calibration", lambda r: f"{r['calibration_images']} {r['calibration']}".strip()),
    ("bits", lambda r: r["bits"]),
    ("ends", lambda r: r["ends"]),
    ("method", lambda r: r["method"]),
    ("top-1", lambda r: f"{r['top1']:.2f}"),
    ("drop", lambda r: f"{r['float'] - r['top1']:.2f}"),
    ("agreement", lambda r: f"{r['agreement']:.2f}"),
    ("SQNR dB", lambda r: f"{r['sqnr_db']:.1f}"),
    ("s", lambda r: f"{r['seconds']:.0f}"),
    ("CPU s", lambda r: f"{r['cpu_seconds']:.0f}"),
    ("MB", lambda r: f"{r['peak_rss_bytes'] / 1e6:.0f}"),
    ("kept", lambda r: r["kept"]),
)


def render(rows: list[dict[str, Any]], command: str) -> str:
    """Return the Markdown table with its command."""
    made = {
        f"{r['net']}: {r['calibration_images']} {r['calibration']} {r['synthesis_seconds']:.0f} s"
        for r in rows
        if r["calibration"]
    }
    legend = f"{LEGEND} Threads: {rows[0]['threads']}. Images made in: {'; '.join(sorted(made))}."
    return render_table(COLUMNS, rows, command, legend)


if __name__ == "__main__":
    sys.exit(main())
