"""The bars of the main job, each measured now and printed with its limit.

    python benchmarks/bars.py --table benchmarks/results/baseline.json -o benchmarks/results/bars.md

Times are wall clock on this machine; sizes, accuracy, parity and kernels of all nets are read from
the table that `accuracy.py` wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _nets import list_nets

NET = "resnet20_cifar10"
LARGE = 1_000_000  # parameters from which the file must be within 5 % of the ideal
PARAMS = {"tiny_darknet_imagenet": 1_040_000}  # the others have fewer than a million
README = {  # float top-1 in the README of the nets
    "resnet20_cifar10": 91.60,
    "resnet56_cifar10": 92.94,
    "resnet8_cifar10": 87.12,
    "mobilenet_v2_035_probe_cifar10": 75.48,
    "simplenet_slim_cifar100": 63.48,
    "mobilenet_v1_025_224": 59.20,
    "tiny_darknet_imagenet": 66.00,
}
Row = tuple[str, str, str, bool]


def main() -> int:
    """Measure, print, and return 1 if a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, required=True, help="JSON file of accuracy.py")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows = [*timed_bars(), *table_bars(json.loads(options.table.read_text(encoding="utf-8")))]
    lines = ["| bar | measured | limit | |", "| --- | --- | --- | --- |"]
    lines += [f"| {n} | {v} | {limit} | {'ok' if ok else 'MISSED'} |" for n, v, limit, ok in rows]
    text = "\n".join([f"Command: `python benchmarks/bars.py {' '.join(sys.argv[1:])}`", "", *lines])
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0 if all(ok for *_, ok in rows) else 1


def timed_bars() -> list[Row]:
    """Time a cold build, a second one and `--help`; compare the bytes of two cold builds."""
    (net,) = list_nets([NET])
    with tempfile.TemporaryDirectory(prefix="dfqc-bars-") as scratch:
        folder = Path(scratch)
        flags = [*net.flags, "--bits", "w8a8", "--seed", "0"]
        cold = timed("build", *flags, "--cache-dir", str(folder / "a"), "-o", str(folder / "p"))
        first = digest(folder / "p" / "model.onnx")
        again = timed("build", *flags, "--cache-dir", str(folder / "a"), "-o", str(folder / "p"))
        timed("build", *flags, "--cache-dir", str(folder / "b"), "-o", str(folder / "q"))
        equal = digest(folder / "q" / "model.onnx") == first
    usage = min(timed("--help") for _ in range(5))
    return [
        ("ResNet-20 W8A8 zeroq build, cold", f"{cold:.1f} s", "< 60 s", cold < 60),
        ("the same build again", f"{again:.2f} s", "< 5 s", again < 5),
        ("dfqc --help, best of 5", f"{usage:.2f} s", "< 0.5 s", usage < 0.5),
        ("two cold builds, one seed", "equal bytes" if equal else "differ", "equal bytes", equal),
    ]


def timed(*words: str) -> float:
    """Run the command line in a new process and return its seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-P", "-m", "dfqc.compiler", *words]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table_bars(rows: list[dict[str, Any]]) -> list[Row]:
    """Check what the table holds for every net."""
    bars: list[Row] = []
    main = next(
        r for r in rows if (r["net"], r["bits"], r["calibration"]) == (NET, "w8a8", "zeroq")
    )
    drop = main["float"] - main["top1"]
    bars.append(("ResNet-20 W8A8 zeroq, drop of top-1", f"{drop:.2f}", "<= 0.2", drop <= 0.2))
    for net in dict.fromkeys(r["net"] for r in rows):
        own = [r for r in rows if r["net"] == net]
        gap = max(abs(r["float"] - README[net]) for r in own)
        bars.append((f"{net}: float top-1 as published", f"off by {gap:.2f}", "0", gap < 0.005))
        limit = 1.05 if PARAMS.get(net, 0) > LARGE else 1.20
        ratio = max(r["ideal_ratio"] for r in own if r["bits"].startswith("w4"))
        bars.append((f"{net}: W4 bytes / ideal", f"{ratio:.3f}", f"<= {limit}", ratio <= limit))
        integer = all(len(set(r["integer_convs"].split("/"))) == 1 for r in own)
        kernels = ", ".join(sorted({r["integer_convs"] for r in own}))
        bars.append((f"{net}: convolutions on integer kernels", kernels, "all", integer))
        parity = min(r["parity_agreement"] for r in own)
        name = f"{net}: simulation = engine, {own[0]['images']} real images"
        bars.append((name, f"{parity:.2f} %", ">= 99.9 %", parity >= 99.9))
    return bars


if __name__ == "__main__":
    sys.exit(main())
