"""Images of a training: a fixed set or a generator in, batch after batch out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class ImageSource(Protocol):
    """Gives images to train a student with.

    A synthesizer that can follow a training has `open_source(graph, zoo, options, *, rng, device)`
    beside `synthesize`; it returns one of these.
    """

    def draw(self, count: int) -> Tensor:
        """Return `count` normalized images (n, c, h, w) without gradient, on the source's device.

        A generator takes its own training step here.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs to go on from here, the random draws apart."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        ...


class Pool:
    """A fixed set of images, shown in random order, every image once before any comes again."""

    def __init__(self, images: Tensor, rng: torch.Generator) -> None:
        self.images, self.rng = images, rng
        self.order = torch.empty(0, dtype=torch.long)

    def draw(self, count: int) -> Tensor:
        """Return the next images; a set smaller than `count` is shown several times."""
        while len(self.order) < count:
            again = torch.randperm(len(self.images), generator=self.rng)
            self.order = torch.cat((self.order, again))
        chosen, self.order = self.order[:count], self.order[count:]
        return self.images[chosen.to(self.images.device)]

    def state(self) -> dict[str, Tensor]:
        """Return what is still to be shown in this round."""
        return {"order": self.order}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on in the middle of a round."""
        self.order = state["order"].clone()
