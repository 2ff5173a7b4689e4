"""Genie-D (Jeon et al. 2023): noise in, images out that a generator makes to match batch norms.

A generator and its latent vectors are trained together for every batch, on a copy of the model
whose strided convolutions swing (`_swing`). There are no labels. Other networks, too, find these
images more like those they know than ZeroQ's.

`max` is as published but for three things: pixels are clipped in the end, images of any size are
made, and on an accelerator the latents' rate hears of a loss up to nine iterations late. The
paper's code gives its latents the rate it names that of the generator and the other way round;
`latent_lr` and `generator_lr` are what it really does.

The defaults differ where that was measured to be better. For 64 images of a CIFAR ResNet-20, means
of two or three seeds; distances to batch norms (`calib_quality`), on the net itself and, behind the
slash, on a ResNet-56 that had no part in it:
- `generator_lr`, `beta1`, `beta2`, `channels`, `schedule`: 100 iterations (12 CPU seconds) give
  0.058 / 0.126; those published, with their schedule shrunk, 0.143 / 0.227 in 50 iterations and
  0.081 / 0.171 in 400 (58 seconds). ZeroQ at `quick` (5 seconds): 0.063 / 0.199.
- `squash`: after a short run the published tanh is saturated, and pixels end at 0.9 where real ones
  reach 2.4 and are clipped by the input's grid. Output SQNR at W8A8 is 20 to 25 dB; without the
  tanh it is 28 to 31.
- `clip_inside`: 0.066 / 0.143, instead of 0.088 / 0.154 if clipped in the end only; with gradients
  that pass the limits (straight-through) 0.072 / 0.144. This and what follows: `beta2` 0.99.
- `swing` is as published: without it, 0.056 / 0.154.
- `loss` is as published: `relative` gives the same, 0.063 / 0.141.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dfqc.calib import _bns
from dfqc.calib._generator import (
    CHANNELS,
    LATENT,
    Generator,
    Squash,
    count_outputs,
    count_weights,
)
from dfqc.calib._pixels import Z_HIGH, Z_LOW, ImageOptions, finish, pixel_map
from dfqc.calib._swing import swing_convolutions
from dfqc.compiler.contracts import CalibSet, Progress, Supplies, silent
from dfqc.compiler.graph import Graph, batch_norms, node_shapes
from dfqc.compiler.steps import Losses, Steps, anneal

NEEDS_BN = True
NEEDS_CLASSES = False
USES_ZOO = False
CARRIES = True

# Changes to the defaults of `Options`. Measured, in CPU seconds for 64 images: 12 and 25 on a CIFAR
# ResNet-20 (quick and standard); at quick, 28 on a ResNet-56 and about 110 on a 0.25 MobileNet at
# 224 pixels.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"iterations": 100},
    "standard": {"iterations": 200},
    "max": {
        "iterations": 4000,
        "batch_size": 128,
        "channels": CHANNELS,
        "squash": "tanh",
        "clip_inside": False,
        "generator_lr": 0.01,
        "beta1": 0.9,
        "beta2": 0.999,
        "schedule": "published",
    },
}

_DECAY = 0.95  # of the generator's rate (published)
_PLATEAU_DECAY, _LOWEST_LR = 0.1, 1e-4  # of the latents' rate (published)

# loss(z): of standardized pixels (n, c, h, w).
_Loss = Callable[[Tensor], Tensor]


class Options(ImageOptions):
    """How generator and latents are trained; rates are those of Adam.

    `generator`: `fresh` starts every batch from new weights, as published; `warm` all but the first
    from those of the batch before, with new latents and `warm_share` of the iterations. Half of
    them match the statistics as well as all do from new weights (ResNet-20, 256 images: 0.059 and
    0.056 for 0.056 and 0.054; transfer 0.117 and 0.120 for 0.125 and 0.123; equal SQNR at W4A8 and
    W4A4), but images are more alike: the correlation of one with that nearest to it is 0.55 for
    0.41 (photographs: 0.50), and the weights are stored with every batch.
    `channels`: behind the generator's first layer; published: 128.
    `squash`: what bounds the generator's pixels before they are standardized.
    `clip_inside`: match the statistics with the pixels that `clip` leaves; without `clip`, nothing.
    `schedule`: `anneal` holds both rates for half of the iterations and then lowers them linearly
    to 0. `published` multiplies the generator's by 0.95 every `interval`, and divides that of the
    latents by 10 when the loss has not fallen for more than an `interval`, down to 1e-4.
    `interval`: as a part of all iterations; the published one is 100 of 4000.
    `loss`: `std` averages over the channels of a layer, as published; `relative` weighs layers
    alike whatever their scale.
    """

    iterations: int = Field(200, ge=1)
    generator: Literal["fresh", "warm"] = "fresh"
    warm_share: float = Field(0.5, gt=0, le=1)
    channels: int = Field(32, ge=2)
    squash: Squash = "none"
    clip_inside: bool = True
    latent_lr: float = Field(0.1, gt=0)
    generator_lr: float = Field(0.003, gt=0)
    beta1: float = Field(0.5, ge=0, lt=1)
    beta2: float = Field(0.9, ge=0, lt=1)
    schedule: Literal["anneal", "published"] = "anneal"
    interval: float = Field(0.025, gt=0, le=1)
    loss: Literal["std", "relative"] = "std"
    swing: bool = True


def count_passes(options: Options, size: tuple[int, int, int], nets: int) -> float:
    """Return the forward-and-backward passes per image: those of a batch with a fresh generator."""
    return options.iterations


def count_carried(options: Options) -> float:
    """Return the work of a batch after the first, as a share of that one's."""
    return options.warm_share if options.generator == "warm" else 1.0


def count_bytes(options: Options, size: tuple[int, int, int], count: int) -> int:
    """Return the bytes of the generator with its gradients and Adam's moments, and its outputs."""
    return 4 * (
        4 * count_weights(size, options.channels) + count * count_outputs(size, options.channels)
    )


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

    With `options.generator` "warm", `carry` is the state of the generator, by names of its own.

    Raises:
        UnsupportedError: the graph has no batch norm with running statistics.
    """
    loss_of = make_loss(graph, count, options, rng=rng, device=device)
    generator = Generator(graph.image.size, rng, channels=options.channels, squash=options.squash)
    warm = options.generator == "warm" and bool(supplies.carry)
    if warm:
        generator.load_state_dict(supplies.carry)
    latents = torch.randn(count, LATENT, generator=rng, device=rng.device)
    iterations = max(1, round(options.iterations * (options.warm_share if warm else 1)))
    steps = Steps(iterations, supplies.seconds)
    z, losses = _train(generator.to(device), latents.to(device), loss_of, options, steps, progress)
    info = {
        "first_loss": losses[0],
        "loss": losses[-1],
        "iterations": steps.done,
        "shortened": steps.shortened,
        "warm": warm,
    }
    carry = generator.state_dict() if options.generator == "warm" else {}
    images = finish(z, pixel_map(graph.image, device), options)
    return CalibSet(images, None, "genie", info, {name: v.cpu() for name, v in carry.items()})


def make_loss(
    graph: Graph, count: int, options: Options, *, rng: torch.Generator, device: torch.device
) -> _Loss:
    """Return the loss of a batch z (count, c, h, w); a new shift of every strided layer per call.

    The squared errors of mean and standard deviation: of every image and color against 0 and 1,
    summed over colors and averaged over images; and of every batch norm's input against what it
    stores, averaged over channels (`std`) and summed over layers. Variances have the divisor n - 1.
    """
    if options.swing:
        # From a seed, so that the shifts are drawn on the host and it never waits for a device.
        seed = int(torch.randint(2**63 - 1, (), generator=rng, device=rng.device))
        swung = swing_convolutions(graph, torch.Generator().manual_seed(seed))
    teacher = _bns.BNTeacher(swung if options.swing else graph, device, precision=options.precision)
    sizes = _sample_sizes(graph, count)
    weights = [_weight(stored, options) for stored in teacher.stored]
    pixels = pixel_map(graph.image, device)

    def loss_of(z: Tensor) -> Tensor:
        if options.clip and options.clip_inside:
            z = z.clamp(Z_LOW, Z_HIGH)
        found = [
            _unbias(moments, size)
            for moments, size in zip(teacher(pixels.to_normalized(z)).moments, sizes, strict=True)
        ]
        return _color_loss(z) + _bns.std_loss(found, teacher.stored, weights)

    return loss_of


def _color_loss(z: Tensor) -> Tensor:
    """Pull the mean and standard deviation of every image and color to 0 and 1."""
    found = _unbias(_bns.moments(z, per_image=True), z[0, 0].numel())
    wanted = _bns.Moments(torch.zeros_like(found.mean), torch.ones_like(found.var))
    return _bns.std_loss([found], [wanted])


def _weight(stored: _bns.Moments, options: Options) -> Tensor:
    if options.loss == "relative":
        return 1 / (stored.var.sum() + _bns.EPS)
    return stored.mean.new_tensor(1 / len(stored.mean))


def _sample_sizes(graph: Graph, count: int) -> list[int]:
    """Return how many values per channel each batch norm with statistics reads."""
    shapes = node_shapes(graph, count)
    inputs = [
        torch.Size(shapes[norm.input.name])
        for norm in batch_norms(graph)
        if norm.module.running_mean is not None
    ]
    return [shape.numel() // shape[1] for shape in inputs]


def _unbias(moments: _bns.Moments, size: int) -> _bns.Moments:
    return moments._replace(var=moments.var * (size / max(size - 1, 1)))


def _train(
    generator: Generator,
    latents: Tensor,
    loss_of: _Loss,
    options: Options,
    steps: Steps,
    progress: Progress,
) -> tuple[Tensor, list[float]]:
    """Train both; return z of the last pass, before its step, and the losses."""
    rates = _Rates(generator, latents.requires_grad_(), options)
    losses = Losses(steps, latents.device)
    for _ in steps:
        rates.plan(steps)
        z: Tensor = generator(latents)
        loss = loss_of(z)
        rates.descend(loss)
        if read := losses.add(loss):
            rates.learn_of(read)
            progress(steps.done + 1, steps.total, f"loss {read[-1]:.3g}")
    losses.read()
    return z.detach(), losses.values


class _Rates:
    """The two optimizers and what their learning rates do; see `Options`."""

    def __init__(self, generator: Generator, latents: Tensor, options: Options) -> None:
        betas = (options.beta1, options.beta2)
        self.options = options
        self.latents = Adam([latents], lr=options.latent_lr, betas=betas, fused=True)
        self.generator = Adam(
            generator.parameters(), lr=options.generator_lr, betas=betas, fused=True
        )
        self.plateau = ReduceLROnPlateau(self.latents, factor=_PLATEAU_DECAY, min_lr=_LOWEST_LR)

    def plan(self, steps: Steps) -> None:
        """Set the rates of the next iteration."""
        options = self.options
        if options.schedule == "anneal":
            factor = anneal(steps.fraction)
            _set_rate(self.latents, options.latent_lr * factor)
            _set_rate(self.generator, options.generator_lr * factor)
        else:
            interval = max(1, round(options.interval * steps.total))
            self.plateau.patience = interval
            _set_rate(self.generator, options.generator_lr * _DECAY ** (steps.done // interval))

    def learn_of(self, losses: list[float]) -> None:
        """Take the losses of the iterations since the last call."""
        if self.options.schedule == "published":
            for loss in losses:
                self.plateau.step(loss)

    def descend(self, loss: Tensor) -> None:
        """Make a step of both."""
        self.latents.zero_grad()
        self.generator.zero_grad()
        loss.backward()
        self.latents.step()
        self.generator.step()


def _set_rate(optimizer: Adam, rate: float) -> None:
    optimizer.param_groups[0]["lr"] = rate
