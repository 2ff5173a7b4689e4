"""What every synthesizer's images are worth, and what they cost: one table, one command.

Rows are methods, real images and noise among them. Images are made by `dfqc synth` in a process of
its own, so that seconds and peak memory are those that a user sees.

    python benchmarks/synthesis.py --output benchmarks/results/synthesis
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _judge
from _nets import Net, judge_of, list_nets, write_member, zoo_of
from _tables import Columns, render_table, table_line, write_results

NETS = (
    *("resnet20_cifar10", "resnet56_cifar10"),
    *("mobilenet_v1_025_224", "tiny_darknet_imagenet"),
)
METHODS = ("noise", "pink", "zeroq", "deepinversion", "mixmix-1", "mixmix", "genie", "real")
BITS = ("w4a8", "w4a4")
LEGEND = (
    "`BN own` and `BN other`: mean distance to the batch-norm statistics of the network itself and "
    "of one that had no part in the images (0 is a match; relative to the layer's spread). "
    "`top-1 other`: percentage of the images that this one puts into the class of their label (of "
    "images without labels: into the class that the network itself sees). `mixmix-1` has no other "
    "network (m' = 1) and data mixing; `mixmix` has the rest of the networks with these classes. "
    "`*`: there are only two, so the judge is in its zoo. `real`: as many images drawn at random; "
    "on the ImageNet networks they are part of the test images. W4A8, W4A4: "
    "top-1 of the engine on real images, ranges and biases from these images, rounding to nearest, "
    "ends in 8 bits. `s` and `peak MB`: the stage that makes the images."
)


def main() -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", default=list(NETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--effort", default="quick", choices=("quick", "standard", "max"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="dfqc-synthesis-") as scratch:
        for net in list_nets(options.nets or list(NETS)):
            for method in options.methods:
                for seed in range(options.seeds):
                    rows.append(measure(net, method, seed, options, Path(scratch)))
                    print(table_line(COLUMNS, rows[-1]), flush=True)
    table = render(rows, " ".join(["python", "benchmarks/synthesis.py", *sys.argv[1:]]))
    write_results(rows, table, options.output)
    return 0


def measure(
    net: Net, method: str, seed: int, options: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """Make the images of one row and judge them."""
    judge, rest = judge_of(net), zoo_of(net)
    zoo = [other for other in rest if other != judge]
    file = scratch / f"{net.name}-{method}-{seed}.safetensors"
    flags = method_flags(net, method, zoo, scratch)
    command = [
        *(sys.executable, "-P", "-m", "dfqc.compiler", "synth", *net.flags, *flags),
        *("--effort", options.effort, "--samples", str(options.samples), "--seed", str(seed)),
        *("--device", options.device, "--cache-dir", str(scratch / "cache")),
        *("-o", str(file), "--json"),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    stage = next(s for s in json.loads(done.stdout)["stages"] if s["name"] == "synthesize")
    other = judge or zoo[0]
    return {
        "net": net.name,
        "method": method,
        "seed": seed,
        "images": options.samples,
        "bn_own": _judge.distance(net, file),
        "other": other.name,
        "bn_other": _judge.distance(other, file),
        "top1_other": _judge.top1(other, net, file),
        "judge_in_zoo": judge is None and method == "mixmix",
        **{bits: _judge.accuracy(net, file, bits) for bits in BITS},
        "seconds": stage["seconds"],
        "peak_rss_bytes": stage["peak_rss_bytes"],
    }


def method_flags(net: Net, method: str, zoo: Sequence[Net], scratch: Path) -> list[str]:
    """Return how `dfqc synth` is told of a method."""
    if method == "real":
        return ["--calib-data", str(net.real)]
    if method == "pink":
        return ["--synth", "noise", "--synth-option", "kind=pink"]
    if method == "mixmix":
        return ["--synth", "mixmix", "--zoo", ",".join(str(write_member(o, scratch)) for o in zoo)]
    return ["--synth", method.partition("-")[0]]


COLUMNS: Columns = (
    ("net", lambda r: r["net"]),
    ("method", lambda r: r["method"]),
    ("seed", lambda r: str(r["seed"])),
    ("images", lambda r: str(r["images"])),
    ("BN own", lambda r: f"{r['bn_own']:.3f}"),
    ("BN other", lambda r: f"{r['bn_other']:.3f}{star(r)}"),
    ("top-1 other", lambda r: f"{r['top1_other']:.1f}{star(r)}"),
    ("W4A8", lambda r: f"{r['w4a8']:.2f}"),
    ("W4A4", lambda r: f"{r['w4a4']:.2f}"),
    ("s", lambda r: f"{r['seconds']:.1f}"),
    ("peak MB", lambda r: f"{r['peak_rss_bytes'] / 1e6:.0f}"),
)


def star(row: dict[str, Any]) -> str:
    """Mark a judge that had a part in the images."""
    return " *" if row["judge_in_zoo"] else ""


def summarize(rows: list[dict[str, Any]]) -> list[str]:
    """Return mean and spread over the seeds, per network and method."""
    names = ("bn_own", "bn_other", "top1_other", *BITS, "seconds")
    lines = [
        "| net | method | seeds | " + " | ".join(names) + " |",
        "|" + " --- |" * (3 + len(names)),
    ]
    for net, method in dict.fromkeys((r["net"], r["method"]) for r in rows):
        mine = [r for r in rows if (r["net"], r["method"]) == (net, method)]
        cells = []
        for name in names:
            values = [r[name] for r in mine]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}")
        lines.append(f"| {net} | {method} | {len(mine)} | " + " | ".join(cells) + " |")
    return lines


def render(rows: list[dict[str, Any]], command: str) -> str:
    """Return the Markdown table with its command."""
    means = ["", "Mean and standard deviation over seeds", "", *summarize(rows)]
    return render_table(COLUMNS, rows, command, LEGEND) + "\n".join(means) + "\n"


if __name__ == "__main__":
    sys.exit(main())
