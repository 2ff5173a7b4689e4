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
from _nets import Net, list_nets, zoo_of

NETS = (
    *("resnet20_cifar10", "resnet56_cifar10"),
    *("mobilenet_v1_025_224", "tiny_darknet_imagenet"),
)
METHODS = ("noise", "pink", "zeroq", "deepinversion", "mixmix-1", "mixmix", "genie", "real")
BITS = ("w4a8", "w4a4")
LEGEND = (
    "`BN own` and `BN others`: mean distance to the batch-norm statistics of the network itself "
    "and of the others with the same classes (0 is a match; relative to the layer's spread). "
    "`top-1 others`: percentage of the images that the others put into the class of their label "
    "(of real images: of the true class). `mixmix-1` has no other network (m' = 1) and data "
    "mixing; `mixmix` has all of them as its zoo, so for it they are no strangers. W4A8, W4A4: "
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
                    print(line(rows[-1]), flush=True)
    table = render(rows, " ".join(["python", "benchmarks/synthesis.py", *sys.argv[1:]]))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".md").write_text(table, encoding="utf-8")
        text = json.dumps(rows, indent=1)
        options.output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print("\n" + table)
    return 0


def measure(
    net: Net, method: str, seed: int, options: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """Make the images of one row and judge them."""
    zoo = zoo_of(net)
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
    labeled = method in ("deepinversion", "mixmix-1", "mixmix", "real")
    return {
        "net": net.name,
        "method": method,
        "seed": seed,
        "images": options.samples,
        "bn_own": _judge.distance(net, file),
        "bn_others": statistics.mean(_judge.distance(other, file) for other in zoo),
        "top1_own": _judge.top1(net, file) if labeled else None,
        "top1_others": statistics.mean(_judge.top1(o, file) for o in zoo) if labeled else None,
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


def write_member(net: Net, scratch: Path) -> Path:
    """Write the recipe that names a network of the zoo with its normalization."""
    keys = {"model": net.flags[0]}
    keys |= {k.removeprefix("--"): v for k, v in zip(net.flags[1::2], net.flags[2::2], strict=True)}
    path = scratch / f"{net.name}.yaml"
    lines = [f"{key}: {json.dumps(value)}" for key, value in keys.items() if key != "resize"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


COLUMNS = (
    ("net", lambda r: r["net"]),
    ("method", lambda r: r["method"]),
    ("seed", lambda r: str(r["seed"])),
    ("images", lambda r: str(r["images"])),
    ("BN own", lambda r: f"{r['bn_own']:.3f}"),
    ("BN others", lambda r: f"{r['bn_others']:.3f}"),
    ("top-1 own", lambda r: show(r["top1_own"])),
    ("top-1 others", lambda r: show(r["top1_others"])),
    ("W4A8", lambda r: f"{r['w4a8']:.2f}"),
    ("W4A4", lambda r: f"{r['w4a4']:.2f}"),
    ("s", lambda r: f"{r['seconds']:.1f}"),
    ("peak MB", lambda r: f"{r['peak_rss_bytes'] / 1e6:.0f}"),
)


def show(value: float | None) -> str:
    """Return a percentage, or that there is none."""
    return "–" if value is None else f"{value:.1f}"


def line(row: dict[str, Any]) -> str:
    """Return one row of the table."""
    return "| " + " | ".join(cell(row) for _, cell in COLUMNS) + " |"


def render(rows: list[dict[str, Any]], command: str) -> str:
    """Return the Markdown table with its command."""
    head = [f"Command: `{command}`", "", LEGEND, ""]
    names = "| " + " | ".join(name for name, _ in COLUMNS) + " |"
    return "\n".join([*head, names, "|" + " --- |" * len(COLUMNS), *map(line, rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
