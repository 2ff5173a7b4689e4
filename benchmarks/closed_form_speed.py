"""Seconds of the closed forms on networks of ImageNet's size: no learning, no accuracy.

Networks of torchvision with random weights (as fast as trained ones), 64 images of noise.

    python benchmarks/closed_form_speed.py resnet18 --threads 2 -o OUT
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import _peers
import torch
from _tables import Columns, render_table, table_line, write_results

from dfqc.backends import ort
from dfqc.compiler import machine, plugins
from dfqc.compiler.contracts import CalibSet, QuantizerSupplies
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.plan import make_plan
from dfqc.compiler.spec import default_ends, parse_bits

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "squant": {},
    "gptq": {},
    "gptq, no images": {"hessian": "bn"},
}
LEGEND = (
    "W4A8, 64 images of noise at 224 px for the ranges and the Hessian (`no images`: the Hessian "
    "from batch norms). `s`: wall clock of the quantizer. `MB`: peak resident memory meanwhile."
)
COLUMNS: Columns = (
    ("net", lambda r: r["net"]),
    ("method", lambda r: r["method"]),
    ("threads", lambda r: str(r["threads"])),
    ("s", lambda r: f"{r['seconds']:.1f}"),
    ("CPU s", lambda r: f"{r['cpu_seconds']:.1f}"),
    ("MB", lambda r: f"{r['peak_rss_bytes'] / 1e6:.0f}"),
)


def main() -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", default=["resnet18"], help="of torchvision")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-o", "--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for net in options.nets:
        for method in METHODS:
            rows.append(measure(net, method))
            print(table_line(COLUMNS, rows[-1]), flush=True)
    command = " ".join(["python", "benchmarks/closed_form_speed.py", *sys.argv[1:]])
    write_results(rows, render_table(COLUMNS, rows, command, LEGEND), options.output)
    return 0


def measure(net: str, method: str) -> dict[str, Any]:
    """Quantize once and return the row."""
    unfolded = _peers.random_network(net)
    graph, bits = fold(unfolded), parse_bits("w4a8")
    plan = make_plan(graph, ort.TARGET, bits, [], ends=default_ends(bits))
    images = torch.randn(64, *graph.image.size, generator=torch.Generator().manual_seed(0))
    plugin = plugins.load("quantizer", method.split(",")[0])
    with machine.measured() as usage:
        start = time.process_time()
        plugin.quantize(
            *(graph, CalibSet(images, None, "noise"), plan),
            plugin.Options.model_validate(METHODS[method]),
            rng=torch.Generator().manual_seed(0),
            device=torch.device("cpu"),
            supplies=QuantizerSupplies(unfolded=unfolded),
        )
        cpu = time.process_time() - start
    return {
        "net": net,
        "method": method,
        "threads": torch.get_num_threads(),
        "seconds": usage.seconds,
        "cpu_seconds": cpu,
        "peak_rss_bytes": usage.peak_rss_bytes,
    }


if __name__ == "__main__":
    sys.exit(main())
