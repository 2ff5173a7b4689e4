"""The losses of inversion: images, labels and nets in, gradients of the images out.

One net runs forward and backward at a time, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dfqc.calib import _augment, _bns, _priors
from dfqc.calib._inversion_options import InversionOptions, Settings
from dfqc.calib._pixels import PixelMap, pixel_map
from dfqc.compiler.graph import Graph

TERMS = ("classes", "norms", "prior")

_WEIGHTS_LR = 0.01  # of the learned weights of losses, which are logarithms
_LOSSES: Mapping[str, _bns.Loss] = {"var": _bns.var_loss, "relative": _bns.relative_loss}


class Method(NamedTuple):
    """A synthesizer's name, and what it has of MixMix.

    `mix` is the share of the iterations in which images are mixed.
    """

    name: str
    mix: float = 0.0
    learn_weights: bool = False


class _View(NamedTuple):
    """The images as nets see them in one iteration; `share` of image `order[i]` is in image i."""

    plain: Tensor  # jittered, not mixed
    mixed: Tensor
    order: Tensor | None = None
    share: Tensor | None = None


class Objective:
    """Losses of class and batch norms, averaged over nets, and priors of the images alone."""

    def __init__(
        self,
        nets: Sequence[Graph],
        labels: Tensor,
        options: InversionOptions,
        settings: Settings,
        method: Method,
        rng: torch.Generator,
    ) -> None:
        device = labels.device
        self.nets = [
            (
                _bns.BNTeacher(net, device, logits=True, precision=options.precision),
                pixel_map(net.image, device),
            )
            for net in nets
        ]
        self.labels, self.options, self.settings, self.method = labels, options, settings, method
        self.rng = rng
        seed = torch.randint(1 << 62, (), generator=rng, device=rng.device)
        self.host = torch.Generator().manual_seed(int(seed))
        # Kendall et al. 2018: the sum of exp(-a) L + a. Its minimum is at a = log L, so that no
        # loss outweighs the others by its scale.
        self.logs = torch.zeros(len(TERMS), device=device, requires_grad=True)
        self.learner = torch.optim.Adam([self.logs], lr=_WEIGHTS_LR)

    def backward(self, leaf: Tensor, pool: int) -> Tensor:
        """Add the gradient of `leaf` (n, c, h, w), seen at 1/pool of the resolution.

        Returns the weighted losses in the order of `TERMS`, without learned weights.
        """
        factors = (-self.logs.detach()).exp()
        view = self._look(F.avg_pool2d(leaf, pool) if pool > 1 else leaf)
        prior = self._prior(view.plain)
        read = view.mixed.detach().requires_grad_()
        terms = torch.zeros(len(TERMS), device=leaf.device)
        for teacher, pixels in self.nets:
            of_net = self._judge(teacher, pixels, read, view) / len(self.nets)
            (factors[:2] * of_net).sum().backward()
            terms[:2] += of_net.detach()
        terms[2] = prior.detach()
        torch.autograd.backward((view.mixed, factors[2] * prior), (read.grad, None))
        if self.method.learn_weights:
            self._learn(terms)
        return terms

    def _look(self, images: Tensor) -> _View:
        """Draw how the nets see the images this time."""
        settings, mix = self.settings, self.method.mix
        plain = _augment.jitter(images, settings.roll, settings.flip, self.host)
        if not mix or float(torch.rand((), generator=self.host)) >= mix:
            return _View(plain, plain)
        count, _, height, width = plain.shape
        order = torch.randperm(count, generator=self.rng, device=self.rng.device).to(plain.device)
        boxes = _augment.draw_boxes(count, (height, width), self.rng).to(plain.device)
        mixed, share = _augment.mix(plain, order, boxes)
        return _View(plain, mixed, order, share)

    def _judge(
        self, teacher: _bns.BNTeacher, pixels: PixelMap, images: Tensor, view: _View
    ) -> Tensor:
        """Return the losses of classes and of batch norms in one net, (2,)."""
        found, logits = teacher(pixels.to_normalized(images))
        assert logits is not None
        classes = F.cross_entropy(logits, self.labels, reduction="none")
        if view.order is not None and view.share is not None:
            others = F.cross_entropy(logits, self.labels[view.order], reduction="none")
            classes = classes.lerp(others, view.share)
        loss_of = _LOSSES[self.options.bn_loss]
        norms = loss_of(found, teacher.stored)
        if self.settings.first_bn != 1:
            first = loss_of(found[:1], teacher.stored[:1])
            norms = norms + (self.settings.first_bn - 1) * first
        return torch.stack(
            (self.options.classify * classes.mean(), self.settings.bn_weight * norms)
        )

    def _prior(self, images: Tensor) -> Tensor:
        tv, l2 = self.settings.tv, self.settings.l2
        prior = 0.0 * images.sum()  # keeps the graph where neither counts
        if tv:
            prior = prior + tv * _priors.total_variation(images)
        return prior + l2 * _priors.l2_norm(images) if l2 else prior

    def _learn(self, terms: Tensor) -> None:
        """Step the logarithms of the weights; a loss that is switched off keeps its weight."""
        self.learner.zero_grad()
        ((-self.logs).exp() * terms + self.logs * (terms > 0)).sum().backward()
        self.learner.step()
