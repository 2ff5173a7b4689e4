"""The main job from nothing: train a small net on digits, compress it without data, measure it.

`make demo` runs this. Training data never reach the compiler: it gets the trained weights and,
only to measure accuracy, images the network has not seen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from digits_resnet import build
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
MEAN, STD = 0.3, 0.37  # of the digits' pixels
EPOCHS = 8


def main() -> int:
    """Train, build, print; return the exit code of `dfqc build`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a8"])
    parser.add_argument("-o", "--output", type=Path, default=None, help="keep the packages here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dfqc-demo-") as scratch:
        folder = options.output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        train(folder)
        code = 0
        for bits in options.bits:
            code = code or compress(folder, bits)
        if options.output:
            print(f"\npackages: {folder}/digits-*  (open report.html in any browser)")
        return code


def train(folder: Path) -> None:
    """Train on 1,297 digits; write weights.pt and the 500 digits that were held back."""
    torch.manual_seed(0)
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = images.repeat(4, axis=1).repeat(4, axis=2)[..., None]  # 8x8 -> 32x32, one channel
    order = np.random.default_rng(0).permutation(len(images))
    held, seen = order[:500], order[500:]
    np.savez(folder / "digits_test.npz", images=images[held], labels=digits.target[held])
    x = (torch.from_numpy(images[seen]).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    y = torch.from_numpy(digits.target[seen])
    model, start = build(), time.time()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    steps = EPOCHS * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for epoch in range(EPOCHS):
        loss = train_epoch(model, x, y, optimizer, schedule)
        print(f"training: epoch {epoch + 1}/{EPOCHS}, loss {loss:.3f}", file=sys.stderr)
    print(f"trained a ResNet on digits in {time.time() - start:.0f} s")
    torch.save(model.state_dict(), folder / "weights.pt")


def train_epoch(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Run one epoch and return its mean loss."""
    model.train()
    total = 0.0
    for batch in torch.randperm(len(x)).split(64):
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += float(loss.detach()) * len(batch)
    return total / len(x)


def compress(folder: Path, bits: str) -> int:
    """Run `dfqc build` as a user would, and print what its manifest says."""
    command = [
        str(Path(sys.executable).parent / "dfqc"),
        *("build", str(folder / "weights.pt"), "--arch", f"{HERE / 'digits_resnet.py'}:build"),
        *("--input-size", "1x32x32", "--mean", str(MEAN), "--std", str(STD), "--bits", bits),
        *("--target", "ort", "--effort", "quick", "--eval-data", str(folder / "digits_test.npz")),
        *("-o", str(folder / f"digits-{bits}"), "--json"),
    ]
    print(
        "\n$ "
        + " ".join(command[:2]).replace(str(Path(sys.executable).parent) + "/", "")
        + " "
        + " ".join(command[2:])
    )
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout.strip():
        return done.returncode or 1
    manifest = json.loads(done.stdout)
    if "metrics" not in manifest:
        print(done.stdout)
        return done.returncode or 1
    top1, size = manifest["metrics"]["top1"], manifest["size"]
    latency = manifest["metrics"]["latency_ms"]
    print(
        f"top-1     float {top1['float']:.2f} %   engine {top1['engine']:.2f} %"
        f"   ({top1['images']} unseen digits)"
    )
    print(
        f"size      float {size['float_bytes'] / 1e3:.0f} kB   model.onnx"
        f" {size['model_bytes'] / 1e3:.0f} kB   ({size['float_bytes'] / size['model_bytes']:.1f}x"
        " smaller)"
    )
    print(
        f"latency   float {latency['float']:.3f} ms   engine {latency['engine']:.3f} ms"
        f"   ({latency['speedup']:.2f}x, batch {latency['batch']}, {latency['threads']} threads)"
    )
    print(
        f"parity    {manifest['parity']['argmax_agreement']:.1f} % of predictions equal between"
        " simulation and engine"
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
