"""Distillation without data: what a student is worth, by method and by what was spent on it.

Every row is one `dfqc distill` in a process of its own, on one thread, with a schedule of its own
length; real images only judge the last state. CPU seconds count the images a row needed too, which
rows share (they come from the store; the first row that needed them says how long they took).

    python benchmarks/distill.py --steps 100 400 --output benchmarks/results/distill_resnet56
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _nets import Net, list_nets, write_member
from _tables import save_results

# Label, and the flags that make it. Features of equal shape and the teacher's own blocks are ours;
# without them it is plain distillation on synthetic images.
ROWS: dict[str, tuple[str, ...]] = {
    "images": (),
    "images, from random": ("--init", "random"),
    "images, no hints": ("--distill-option", "hint=0"),
    "images, from random, no hints": ("--init", "random", "--distill-option", "hint=0"),
    "dafl": ("--method", "dafl"),
    "dafl, from random, no hints": (
        *("--method", "dafl", "--init", "random", "--distill-option", "hint=0"),
    ),
    "mix": ("--method", "mix"),
}


def main() -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet56_cifar10")
    parser.add_argument("--student", default="resnet20_cifar10")
    parser.add_argument("--rows", nargs="+", default=["images"], choices=list(ROWS))
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 400])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--option", nargs="*", default=[], help="more NAME=VALUE of the training")
    parser.add_argument("--zoo", nargs="*", default=["resnet8_cifar10"], help="for mix")
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    teacher, student, *zoo = list_nets_in_order([options.teacher, options.student, *options.zoo])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache_dir or Path(folder) / "cache"
        for name in options.rows:
            for steps in options.steps:
                rows.append(measure(teacher, student, zoo, name, steps, cache, folder, options))
                print(describe([rows[-1]]).splitlines()[-1], flush=True)
                save_results(rows, report(rows), options.output)
    print("\n" + report(rows))
    return 0


def list_nets_in_order(names: list[str]) -> list[Net]:
    """Return the networks as they were named."""
    found = {net.name: net for net in list_nets(sorted(set(names)))}
    return [found[name] for name in names]


def measure(
    teacher: Net,
    student: Net,
    zoo: list[Net],
    name: str,
    steps: int,
    cache: Path,
    folder: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Distill once and return its row."""
    flags = [*ROWS[name], "--distill-option", f"precision={options.precision}"]
    flags += [word for text in options.option for word in ("--distill-option", text)]
    flags += ["--distill-option", f"steps={steps}", "--effort", "quick"]
    flags += ["--synth-option", f"precision={options.precision}"]
    if "dafl" not in name and name != "mix":
        flags += ["--samples", str(options.samples), "--synth-option", "batch_size=128"]
    if name == "mix":
        members = [str(write_member(net, Path(folder))) for net in zoo]
        flags += ["--zoo", ",".join(members)]
    command = [
        *(sys.executable, "-m", "dfqc.compiler", "distill", *teacher.flags, *flags),
        *("--student", architecture(student), "--eval-data", str(teacher.test)),
        *("--cache-dir", str(cache), "-o", f"{folder}/student.pt2", "--json"),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if not done.stdout or "curve" not in done.stdout:
        raise SystemExit(f"{name}: {done.stdout}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    made = json.loads(done.stdout)
    stages = {s["name"]: s["seconds"] for s in made["stages"]}
    return {
        "name": name,
        "steps": steps,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "wall_seconds": {k: stages[k] for k in ("synthesize", "holdout", "distill") if k in stages},
        "images_made_before": any(
            s["cached"] for s in made["stages"] if s["name"] in ("synthesize", "holdout")
        ),
        **{k: made[k] for k in ("top1", "agreement", "curve", "options", "images", "stopped")},
        **{kind: without_place(made[kind]) for kind in ("teacher", "student")},
    }


def without_place(network: dict[str, Any]) -> dict[str, Any]:
    """Return what is said of a network without where it lies here."""
    return {name: value for name, value in network.items() if name != "source"}


def architecture(net: Net) -> str:
    """Return the file and factory of a network."""
    return net.flags[net.flags.index("--arch") + 1]


def report(rows: list[dict[str, Any]]) -> str:
    """Return the table with the command that made it."""
    first = rows[0]
    words = list(sys.argv[1:])
    if "--cache-dir" in words:  # a place of this machine
        place = words.index("--cache-dir")
        del words[place : place + 2]
    words = [f'"{word}"' if " " in word else word for word in words]
    nets = " and ".join(
        f"{kind} {first[kind]['params']:,} parameters, {first[kind]['macs'] / 1e6:.1f} M "
        "multiply-adds"
        for kind in ("teacher", "student")
    )
    about = (
        f"{nets[0].upper()}{nets[1:]}. Top-1 of the last state on {first['top1']['images']} real "
        f"images, teacher {first['top1']['teacher']:.2f} %. One thread of a machine with other "
        "work: CPU seconds, loading and judging included."
    )
    return "\n".join(
        [
            f"Command: `python benchmarks/distill.py {' '.join(words)}`",
            "",
            about,
            "",
            describe(rows),
        ]
    )


def describe(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    header = ("method", "steps of 128", "images", "CPU s", "top-1", "of the teacher's", "agreement",
              "held-out synthetic", "stopped")  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        top1, agreement, images = row["top1"], row["agreement"], row["images"]
        made = images if isinstance(images, str) else f"{images['count']} {images['source']}"
        again = " + images" if row["images_made_before"] else ""
        cells = (
            *(row["name"], f"{row['steps']:,}", made, f"{row['cpu_seconds']:.0f}{again}"),
            *(f"{top1['student']:.2f}", f"{top1['share']:.1f} %"),
            *(f"{agreement['evaluation']:.2f} %", f"{agreement['held_out']:.1f} %"),
            row["stopped"] or "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
