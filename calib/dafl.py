"""DAFL (Chen et al. 2019): a net in, images out of a generator that the net takes for photos.

The generator is trained against the net alone: for sure answers, all classes, large activations,
and, other than published, for the batch norms' statistics (`bn_weight` 0 leaves them out).
`dfqc distill --method dafl` trains it beside a student and shows that what it makes meanwhile;
`--method mix` lets a zoo judge the images, which it also mixes: MixMix's objective (Li et al. 2021,
eq. 9) on top. The student's loss reads the images without gradient, so that one backward pass for
both, as published, and two, as here, are the same; two need less memory. Its pixels are clipped to
those that an image can have, but for what a student is shown at `max`, which is as published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dfqc.calib import _augment, _bns, _dafl
from dfqc.calib._pixels import ImageOptions, finish, pixel_map
from dfqc.compiler.contracts import CalibSet, Progress, Supplies, silent
from dfqc.compiler.errors import UnsupportedError
from dfqc.compiler.graph import Graph, layer_nodes
from dfqc.compiler.mixing_zoo import count_outputs
from dfqc.compiler.steps import Steps

NEEDS_BN = True
NEEDS_CLASSES = True
USES_ZOO = True
CARRIES = False

# Changes to the defaults of `Options`, which are as published but for `bn_weight`.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"iterations": 60, "lr": 1e-3, "train_batch": 64},
    "standard": {"iterations": 200, "lr": 1e-3, "train_batch": 128},
    "max": {"batch_size": 1024},
}


class Options(ImageOptions):
    """How the generator is trained.

    `iterations`: of the generator where it makes a calibration set; beside a student it takes as
    many as that. `train_batch`: images of one iteration.
    `one_hot`, `information`, `activation`: weights of DAFL's losses; `bn_weight`: of the batch
    norms' (each layer relative to its variance).
    `models`: nets of a zoo that judge one batch beside the model itself, by the classes that the
    model sees; `mix`: share of the iterations in which they see mixed images.
    """

    iterations: int = Field(120, ge=1)
    train_batch: int = Field(1024, ge=2)
    channels: int = Field(_dafl.CHANNELS, ge=2)
    lr: float = Field(0.02, gt=0)
    one_hot: float = Field(0.05, ge=0)
    information: float = Field(5.0, ge=0)
    activation: float = Field(0.01, ge=0)
    bn_weight: float = Field(1.0, ge=0)
    models: int = Field(2, ge=0)
    mix: float = Field(0.0, ge=0, le=1)


def count_passes(options: Options, size: tuple[int, int, int], nets: int) -> float:
    """Return the forward-and-backward passes per image of a batch."""
    return options.iterations * options.train_batch / options.batch_size


def count_bytes(options: Options, size: tuple[int, int, int], count: int) -> int:
    """Return the bytes of the generator, its gradients and Adam's moments, and of its images."""
    weights = _dafl.count_weights(size, options.channels)
    return 16 * weights + 4 * (5 * count + 20 * options.train_batch) * math.prod(size)


class _View(NamedTuple):
    """Images as judges see them; `share` of each is an image of the class in `others`."""

    images: Tensor
    labels: Tensor | None = None  # None: those that the judge itself sees
    others: Tensor | None = None
    share: Tensor | None = None


class Source:
    """An `ImageSource`: every draw trains the generator on the images that it returns.

    Attributes:
        loss: of the last draw.
    """

    def __init__(
        self,
        graph: Graph,
        zoo: Sequence[Graph],
        options: Options,
        *,
        rng: torch.Generator,
        device: torch.device,
    ) -> None:
        self.options, self.rng, self.device = options, rng, device
        self.judges = [_Judge(net, options, device) for net in (graph, *zoo)]
        generator = _dafl.Generator(graph.image.size, rng, channels=options.channels)
        self.generator = generator.to(device)
        self.adam = torch.optim.Adam(self.generator.parameters(), lr=options.lr)
        self.pixels = pixel_map(graph.image, device)
        self.loss = math.nan

    def draw(self, count: int) -> Tensor:
        """Take one training step of the generator and return its images."""
        z = self._make(count)
        read = z.detach().requires_grad_()
        view, judges = self._look(read)
        self.loss, grad = 0.0, torch.zeros_like(read)
        for judge in judges:  # one net's activations at a time
            loss = judge(view) / len(judges)
            grad += torch.autograd.grad(loss, read, retain_graph=judge is not judges[-1])[0]
            self.loss += float(loss.detach())
        self.adam.zero_grad()
        z.backward(grad)
        self.adam.step()
        return finish(z, self.pixels, self.options).to(self.device)

    def show(self, count: int) -> Tensor:
        """Return new z of the generator as it is, without gradient."""
        with torch.no_grad():
            return self._make(count)

    def state(self) -> dict[str, Tensor]:
        """Return the generator's weights and Adam's moments, by name."""
        tensors = {f"generator/{k}": v for k, v in self.generator.state_dict().items()}
        for place, state in self.adam.state_dict()["state"].items():
            tensors |= {f"adam/{place}/{name}": torch.as_tensor(v) for name, v in state.items()}
        return tensors

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        cut = len("generator/")
        self.generator.load_state_dict(
            {k[cut:]: v for k, v in state.items() if k.startswith("generator/")}
        )
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("adam/"):
                _, place, name = key.split("/")
                moments.setdefault(int(place), {})[name] = value.clone()
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": moments, "param_groups": groups})

    def _make(self, count: int) -> Tensor:
        latents = torch.randn(count, _dafl.LATENT, generator=self.rng, device=self.rng.device)
        z: Tensor = self.generator(latents.to(self.device))
        return z

    def _look(self, z: Tensor) -> tuple[_View, list[_Judge]]:
        """Return what is judged this time, perhaps mixed, and by whom."""
        own, *zoo = self.judges
        chosen = torch.randperm(len(zoo), generator=self.rng, device=self.rng.device).tolist()
        judges = [own, *(zoo[i] for i in chosen[: self.options.models])]
        mixes = self.options.mix and self._chance() < self.options.mix
        if len(judges) == 1 and not mixes:
            return _View(z), judges
        with torch.no_grad():
            labels = own.answer(z).argmax(1)
        if not mixes:
            return _View(z, labels), judges
        order = torch.randperm(len(z), generator=self.rng, device=self.rng.device).to(z.device)
        height, width = z.shape[2:]
        boxes = _augment.draw_boxes(len(z), (height, width), self.rng).to(z.device)
        mixed, share = _augment.mix(z, order, boxes)
        return _View(mixed, labels, labels[order], share), judges

    def _chance(self) -> float:
        return float(torch.rand((), generator=self.rng, device=self.rng.device))


class _Judge:
    """A net and its losses on z."""

    def __init__(self, graph: Graph, options: Options, device: torch.device) -> None:
        self.options = options
        self.teacher = _bns.BNTeacher(graph, device, logits=True, precision=options.precision)
        self.pixels = pixel_map(graph.image, device)
        self.features: list[Tensor] = []
        last = self.teacher.module.get_submodule(layer_nodes(graph)[-1][0])
        last.register_forward_pre_hook(lambda module, args: self.features.append(args[0]))

    def __call__(self, view: _View) -> Tensor:
        found, logits = self._run(view.images)
        options, features = self.options, self.features.pop().float()
        loss = options.one_hot * _classify(logits, view).mean()
        loss = loss + options.information * _dafl.information_loss(logits)
        loss = loss + options.activation * _dafl.activation_loss(features)
        if options.bn_weight:
            loss = loss + options.bn_weight * _bns.relative_loss(found, self.teacher.stored)
        return loss

    def answer(self, z: Tensor) -> Tensor:
        """Return the logits of z."""
        logits = self._run(z)[1]
        self.features.clear()
        return logits

    def _run(self, z: Tensor) -> tuple[list[_bns.Moments], Tensor]:
        found, logits = self.teacher(self.pixels.to_normalized(z))
        assert logits is not None
        return found, logits


def _classify(logits: Tensor, view: _View) -> Tensor:
    """Return the cross-entropy of each image; of a mixed one, with both classes by area."""
    if view.labels is None:
        return _dafl.one_hot_loss(logits)
    losses = F.cross_entropy(logits, view.labels, reduction="none")
    if view.others is None or view.share is None:
        return losses
    return losses.lerp(F.cross_entropy(logits, view.others, reduction="none"), view.share)


def open_source(
    graph: Graph,
    zoo: Sequence[Graph],
    options: Options,
    *,
    rng: torch.Generator,
    device: torch.device,
) -> Source:
    """Return the generator as a source of images for a training.

    Raises:
        UnsupportedError: a net has no batch norm with running statistics, or no classes.
    """
    for net in (graph, *zoo):
        if (count_outputs(net) or 0) < 2:
            raise UnsupportedError(
                f"{net.source}: its output is not one row of class scores per image, which DAFL's "
                "generator is trained for; distill with --method images"
            )
    return Source(graph, zoo, options, rng=rng, device=device)


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
    """Train a generator and return `count` of its images, labelled by the model's answers.

    Raises:
        UnsupportedError: the graph has no batch norm with running statistics, or no classes.
    """
    source = open_source(graph, supplies.zoo, options, rng=rng, device=device)
    steps = Steps(options.iterations, supplies.seconds)
    first = math.nan
    for step in steps:
        source.draw(options.train_batch)
        first = source.loss if step == 0 else first
        progress(min(step + 1, steps.total), steps.total, f"loss {source.loss:.3g}")
    progress(steps.done, steps.done, f"loss {source.loss:.3g}")
    images = finish(source.show(count), source.pixels, options)
    with torch.no_grad():
        own = source.judges[0]
        labels = own.answer(own.pixels.to_z(images.to(device))).argmax(1)
    info = {
        "first_loss": first,
        "loss": source.loss,
        "iterations": steps.done,
        "shortened": steps.shortened,
    }
    return CalibSet(images, labels.cpu(), "dafl", info)
