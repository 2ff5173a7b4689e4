"""ZeroQ (Cai et al. 2020): noise in, images out whose inputs to every batch norm have its moments.

The images themselves are optimized; there are no labels and no generator. Published settings:
`statistic=per_image loss=std init=gaussian schedule=plateau iterations=500 lr=0.5 patience=0
clip=false`. The defaults differ where that was measured to be better, and `max` takes only the
number of iterations from there. Above all, moments are those
of the batch: asking every image for the moments of all classes together makes images that no
class resembles, and activations near the output stay below those of real images (CIFAR ResNet-20,
last block: at most 12 where real images reach 21), so that ranges calibrated on them clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dfqc.calib import _bns
from dfqc.calib._pixels import Z_HIGH, Z_LOW, ImageOptions, PixelMap, finish, pixel_map
from dfqc.calib.noise import draw
from dfqc.compiler.contracts import CalibSet, Progress, Supplies, silent
from dfqc.compiler.graph import Graph
from dfqc.compiler.steps import Losses, Steps

NEEDS_BN = True
NEEDS_CLASSES = False
USES_ZOO = False
CARRIES = False

# Changes to the defaults of `Options`. Measured, in CPU seconds: 18 and 35 for 256 images of a
# CIFAR ResNet-20 (quick and standard), 45 for 128 images of a 0.25 MobileNet at 224 pixels (quick).
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"iterations": 40},
    "standard": {"iterations": 80},
    "max": {"iterations": 500},
}

_LOSSES: Mapping[str, _bns.Loss] = {
    "relative": _bns.relative_loss,
    "std": _bns.std_loss,
    "kl": _bns.kl_loss,
}
_PLATEAU, _LOWEST_LR = 100, 1e-4  # published
_GAIN = 0.01  # a loss has fallen if it is this much below the lowest one before


class Options(ImageOptions):
    """How the images are optimized; step sizes are in standardized pixels (see `_pixels`).

    `statistic`: match the moments of the batch, or of every image by itself.
    `schedule`: `anneal` holds `lr` for half of the iterations and lowers it linearly to 0 in the
    other half; `plateau` divides it by 10 whenever the loss has not fallen for 100 iterations.
    `patience`: stop early when the loss is flat, that is, has not fallen by 1 % for that many
    iterations; 0 means never. `anneal` then lowers `lr` at once instead of at half time, and ends
    with that; `plateau` ends when `lr` is as low as it gets.
    `loss`: `relative` weighs layers alike, `std` is as published, `kl` is that of The Knowledge
    Within, which falls slowly: in a short run it hardly improves on pink noise.
    `clip` holds after every step. Published: no clipping.
    """

    iterations: int = Field(80, ge=1)
    lr: float = Field(0.2, gt=0)
    schedule: Literal["anneal", "plateau"] = "anneal"
    patience: int = Field(50, ge=0)
    statistic: Literal["batch", "per_image"] = "batch"
    loss: Literal["relative", "std", "kl"] = "relative"
    init: Literal["pink", "gaussian"] = "pink"


def count_passes(options: Options, size: tuple[int, int, int], nets: int) -> float:
    """Return the forward-and-backward passes per image."""
    return options.iterations


def count_bytes(options: Options, size: tuple[int, int, int], count: int) -> int:
    """Return the bytes of the images, their gradients and Adam's two moments."""
    return 16 * count * math.prod(size)


def synthesize(
    graph: Graph,
    count: int,
    options: Options,
    *,
    rng: torch.Generator,
    device: torch.device,
    progress: Progress = silent,
    supplies: Supplies = Supplies(),
) -> CalibSet:
    """Return one batch of `count` images; on a CPU, equal seeds give equal images.

    Raises:
        UnsupportedError: the graph has no batch norm with running statistics.
    """
    teacher = _bns.BNTeacher(
        graph,
        device,
        per_image=options.statistic == "per_image",
        precision=options.precision,
    )
    pixels = pixel_map(graph.image, device)
    z = draw(options.init, count, graph.image.size, rng).to(device)
    z = z.contiguous(memory_format=torch.channels_last)
    steps = Steps(options.iterations, supplies.seconds)
    losses = _optimize(z, teacher, pixels, options, steps, progress)
    info = {
        "first_loss": losses[0],
        "loss": losses[-1],
        "iterations": steps.done,
        "shortened": steps.shortened,
    }
    return CalibSet(finish(z, pixels, options), None, "zeroq", info)


def _optimize(
    z: Tensor,
    teacher: _bns.BNTeacher,
    pixels: PixelMap,
    options: Options,
    steps: Steps,
    progress: Progress,
) -> list[float]:
    """Optimize `z` in place; return the loss before every step."""
    per_image = options.statistic == "per_image"
    loss_of = _LOSSES[options.loss]
    stored = [_standard(z), *teacher.stored]
    leaf = z.detach().requires_grad_()  # shares the memory of z
    optimizer = torch.optim.Adam([leaf], lr=options.lr)
    schedule = (_Anneal if options.schedule == "anneal" else _Plateau)(optimizer, options, steps)
    losses = Losses(steps, z.device)
    for _ in steps:
        found = [_bns.moments(leaf, per_image=per_image)]
        found += teacher(pixels.to_normalized(leaf)).moments
        loss = loss_of(found, stored)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if options.clip:
            z.clamp_(Z_LOW, Z_HIGH)
        read = losses.add(loss)
        schedule.step(read)
        if read:
            progress(steps.done + 1, options.iterations, f"loss {read[-1]:.3g}")
    losses.read()
    if steps.done < options.iterations:
        progress(options.iterations, options.iterations, f"loss {losses.values[-1]:.3g}")
    return losses.values


def _standard(z: Tensor) -> _bns.Moments:
    """Return what the images' own moments are pulled to: those of z by its definition."""
    return _bns.Moments(z.new_zeros(z.shape[1]), z.new_ones(z.shape[1]))


class _Flatness:
    """Tells whether a loss has stopped falling."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.lowest = math.inf
        self.since = 0  # iterations

    def after(self, loss: float) -> bool:
        """Take the next loss; report whether it is flat now."""
        self.since += 1
        if loss < (1 - _GAIN) * self.lowest:
            self.lowest, self.since = loss, 0
        return 0 < self.patience <= self.since


class _Anneal:
    """Hold the learning rate, then lower it linearly to 0; see `Options`."""

    def __init__(self, optimizer: torch.optim.Optimizer, options: Options, steps: Steps) -> None:
        self.optimizer, self.steps, self.lr = optimizer, steps, options.lr
        self.flatness = _Flatness(options.patience)
        self.length: int | None = None  # of the fall, once it has begun early

    def step(self, losses: Sequence[float]) -> None:
        """Take the losses since the last call, and set the rate of the next iteration."""
        steps = self.steps
        half = steps.total // 2
        left = steps.left - 1  # behind the one that is just ending
        flat = [self.flatness.after(loss) for loss in losses]
        if any(flat) and self.length is None and left > half:
            self.length = half
            steps.end_in(half + 1)
            left = half
        length = half if self.length is None else self.length
        self.optimizer.param_groups[0]["lr"] = self.lr * min(1.0, left / (length + 1))


class _Plateau:
    """Lower the learning rate tenfold when the loss is flat, as published; see `Options`."""

    def __init__(self, optimizer: torch.optim.Optimizer, options: Options, steps: Steps) -> None:
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=_PLATEAU, min_lr=_LOWEST_LR
        )
        self.flatness = _Flatness(options.patience)
        self.steps = steps

    def step(self, losses: Sequence[float]) -> None:
        """Take the losses since the last call, set the rate, end where it is as low as it gets."""
        for loss in losses:
            self.schedule.step(loss)
            lowest = bool(self.schedule.get_last_lr()[0] <= _LOWEST_LR)
            if self.flatness.after(loss) and lowest:
                self.steps.end_in(1)
