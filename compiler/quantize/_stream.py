"""Images on their way through float and quantized network: cached, or computed anew, by rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, fx

from dfqc.compiler.quantize._caches import Budget, Source, fill

CacheKind = Literal["float32", "float16", "recompute"]
Function = Callable[[Tensor], Tensor]


class Rows(Source, Protocol):
    """One activation of many images."""

    def free(self) -> None:
        """Give the memory back."""
        ...


@dataclass
class Recomputed:
    """Rows that are computed from other rows whenever they are read."""

    source: Rows
    function: Function

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def read(self, index: Tensor | slice, device: torch.device) -> Tensor:
        """Compute some rows."""
        with torch.no_grad():
            return self.function(self.source.read(index, device))

    def free(self) -> None:
        """Nothing is held."""


@dataclass
class Stream:
    """Where a set of images stands in the float network (`exact`) and in the quantized one.

    Behind the first unit both hold the images themselves.
    """

    images: Rows
    budget: Budget
    kind: CacheKind
    batch: int
    device: torch.device

    def __post_init__(self) -> None:
        """Begin at the network's input."""
        self.exact: Rows = self.images
        self.quantized: Rows = self.images

    def rows(self, function: Function, source: Rows) -> Rows:
        """Return `function` of all rows of `source`, kept or computed when it is read."""
        if self.kind == "recompute":
            return Recomputed(source, function)
        dtype = torch.float16 if self.kind == "float16" else torch.float32
        return fill(
            self.budget, function, source, batch=self.batch, device=self.device, dtype=dtype
        )

    def advance(self, exact: fx.GraphModule, quantized: fx.GraphModule) -> None:
        """Go on behind a block: both regions lead from where this stands to its end."""
        if self.kind == "recompute":
            # From the rows before: chains of functions, nothing is held but the images.
            self.exact = Recomputed(self.exact, exact)
            self.quantized = Recomputed(self.quantized, quantized)
            return
        ahead = self.rows(exact, self.exact)
        same = self.exact is self.quantized
        if not same:
            self._release(self.exact)
        behind = self.rows(quantized, self.quantized)
        self._release(self.quantized)
        self.exact, self.quantized = ahead, behind

    def _release(self, rows: Rows) -> None:
        if rows is not self.images:
            rows.free()
