"""Accuracy, size, speed and cost of `dfqc build` on real networks: one table, one command.

Every row is one run of the command line in its own process, judged on real labelled images:
synthetic calibration images (zeroq), noise, and real images as the ceiling.

    python benchmarks/accuracy.py --output benchmarks/results/baseline
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _nets import Net, list_nets
from _tables import Columns, render_table, table_line, write_results

BITS = ("w8a8", "w4a8", "w4a4")
SOURCES = ("zeroq", "noise", "real")
MADE = ("zeroq", "noise", "genie", "deepinversion", "mixmix")
LEGEND = (
    "Top-1 in percent on real images, by the engine. `s` is the wall clock of the whole command; "
    "stages shared with an earlier row come from the cache (the stage table lists what was "
    "computed). Speed-up: median latency float / compressed on the same engine, interleaved, batch "
    "and threads as in the JSON file."
)
STAGES = (
    *(
        "trace",
        "equalize",
        "prune",
        "plan",
        "data",
        "synthesize",
        "holdout",
        "refit",
        "fold",
        "quantize",
        "correct",
    ),
    *("float", "lower", "verify", "evaluate", "bench"),
)


def main() -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", help="names of the assets' networks; default: all")
    parser.add_argument("--bits", nargs="+", default=list(BITS))
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=(*MADE, "real"))
    parser.add_argument("--real-images", type=int, default=256)
    parser.add_argument("--effort", default="quick", choices=("quick", "standard", "max"))
    parser.add_argument("--quick", action="store_true", help="ResNet-20 at w8a8 and w4a8 only")
    parser.add_argument("--avg-bits", nargs="+", default=[""], help="a row each; '': none")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="more build flags")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    if options.quick:
        options.nets, options.bits = ["resnet20_cifar10"], ["w8a8", "w4a8"]
    rows = []
    with tempfile.TemporaryDirectory(prefix="dfqc-bench-") as scratch:
        for net in list_nets(options.nets):
            for source in options.sources:
                for bits, average in itertools.product(options.bits, options.avg_bits):
                    rows.append(measure(net, bits, source, options, Path(scratch), average))
                    print(table_line(COLUMNS, rows[-1]), flush=True)
    table = render(rows, " ".join(["python", "benchmarks/accuracy.py", *sys.argv[1:]]))
    write_results(rows, table, options.output)
    return 0


def measure(
    net: Net,
    bits: str,
    source: str,
    options: argparse.Namespace,
    scratch: Path,
    average: str = "",
) -> dict[str, Any]:
    """Build once, cold for what differs from the last row, and return the row."""
    flags = ["--calib-data", str(net.real), "--samples", str(options.real_images)]
    if source != "real":
        flags = ["--synth", source]
    command = [
        *(sys.executable, "-P", "-m", "dfqc.compiler", "build", *net.flags, "--bits", bits),
        *(*flags, "--effort", options.effort, "--eval-data", str(net.test), "--seed", "0"),
        *("--cache-dir", str(scratch / "cache"), "-o", str(scratch / "package"), "--json"),
        *(("--avg-bits", average) if average else ()),
        *options.extra,
    ]
    start = time.time()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.time() - start
    manifest = json.loads(done.stdout or "{}")
    if "metrics" not in manifest:
        raise SystemExit(f"{net.name} {bits} {source}: exit {done.returncode}: {done.stdout}")
    metrics, size, parity = manifest["metrics"], manifest["size"], manifest["parity"]
    kernels = [row["executed"] for row in manifest["layers"] if row["op"] == "Conv2d"]
    return {
        "net": net.name,
        "bits": f"{bits}, {average} on average" if average else bits,
        "calibration": source + (" (in sample)" if source == "real" and net.in_sample else ""),
        "images": metrics["top1"]["images"],
        "float": metrics["top1"]["float"],
        "top1": metrics["top1"]["engine"],
        "agreement_heldout": metrics["agreement"]["engine"],
        "sqnr_db": metrics["sqnr_db"],
        "parity_agreement": parity["eval_agreement"],
        "model_bytes": size["model_bytes"],
        "ideal_ratio": size["model_bytes"] / size["ideal_bytes"],
        "integer_convs": f"{sum('QLinear' in k for k in kernels)}/{len(kernels)}",
        "speedup": metrics["latency_ms"]["speedup"],
        "latency": metrics["latency_ms"],
        "seconds": seconds,
        "stages": {
            row["name"]: {k: row[k] for k in ("seconds", "cached", "peak_rss_bytes")}
            for row in manifest["stages"]
        },
        "peak_rss_bytes": max(row["peak_rss_bytes"] or 0 for row in manifest["stages"]),
        "exit": done.returncode,
        "environment": manifest["environment"],
    }


COLUMNS: Columns = (
    ("net", lambda r: r["net"]),
    ("bits", lambda r: r["bits"]),
    ("calibration", lambda r: r["calibration"]),
    ("images", lambda r: str(r["images"])),
    ("float", lambda r: f"{r['float']:.2f}"),
    ("top-1", lambda r: f"{r['top1']:.2f}"),
    ("drop", lambda r: f"{r['float'] - r['top1']:.2f}"),
    ("held-out agreement", lambda r: f"{r['agreement_heldout']:.1f}"),
    ("SQNR dB", lambda r: f"{r['sqnr_db']:.1f}"),
    ("sim = engine %", lambda r: f"{r['parity_agreement']:.2f}"),
    ("kB", lambda r: f"{r['model_bytes'] / 1e3:.0f}"),
    ("x ideal", lambda r: f"{r['ideal_ratio']:.3f}"),
    ("integer convs", lambda r: r["integer_convs"]),
    ("speed-up", lambda r: f"{r['speedup']:.2f}"),
    ("s", lambda r: f"{r['seconds']:.0f}"),
    ("peak MB", lambda r: f"{r['peak_rss_bytes'] / 1e6:.0f}"),
)


def render(rows: list[dict[str, Any]], command: str) -> str:
    """Return the Markdown table with its command, and the seconds per stage of cold rows."""
    env = rows[0]["environment"]
    legend = f"Environment: `{json.dumps(env, sort_keys=True)}`\n\n{LEGEND}"
    table = render_table(COLUMNS, rows, command, legend)
    stage_head = [
        "",
        "Seconds / peak resident MB per stage (blank: from the cache)",
        "",
        "| net | bits | calibration | " + " | ".join(STAGES) + " |",
        "|" + " --- |" * (len(STAGES) + 3),
    ]
    stages = [
        "| "
        + " | ".join([r["net"], r["bits"], r["calibration"], *(_time(r, s) for s in STAGES)])
        + " |"
        for r in rows
    ]
    return table + "\n".join([*stage_head, *stages]) + "\n"


def _time(row: dict[str, Any], stage: str) -> str:
    record = row["stages"].get(stage)
    if not record or record["cached"]:
        return ""
    return f"{record['seconds']:.1f} / {(record['peak_rss_bytes'] or 0) / 1e6:.0f}"


if __name__ == "__main__":
    sys.exit(main())
