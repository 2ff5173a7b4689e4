"""Activations of many images, by rows: in memory up to a bound, in a file beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class Budget:
    """What all caches together may hold in memory, in bytes; None: everything."""

    limit: int | None = None
    used: int = 0
    spilled: int = 0  # bytes that went to disk, for the record
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def allocate(self, rows: int, shape: Sequence[int], dtype: torch.dtype) -> Cache:
        """Return an empty cache of `rows` times `shape`, in memory if it still fits."""
        size = rows * torch.Size(shape).numel() * dtype.itemsize
        if self.limit is None or self.used + size <= self.limit:
            self.used += size
            return Cache(torch.empty(rows, *shape, dtype=dtype), self, size, None)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="dfqc-cache-")
        self.spilled += size
        path = Path(tempfile.mkstemp(dir=self._folder.name)[1])
        flat = torch.from_file(
            str(path), shared=True, size=rows * torch.Size(shape).numel(), dtype=dtype
        )
        return Cache(flat.view(rows, *shape), self, 0, path)

    def close(self) -> None:
        """Delete the files."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


@dataclass
class Cache:
    """One activation of all images, (rows, ...)."""

    rows: Tensor
    budget: Budget
    in_memory: int
    path: Path | None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def read(self, index: Tensor | slice, device: torch.device) -> Tensor:
        """Return some rows as float32 on `device`."""
        return self.rows[index].to(device, torch.float32)

    def free(self) -> None:
        """Give the memory or the file back."""
        self.budget.used -= self.in_memory
        self.in_memory = 0
        self.rows = self.rows[:0].clone()
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class Source(Protocol):
    """What has rows to read."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def read(self, index: Tensor | slice, device: torch.device) -> Tensor:
        """Return some rows as float32."""
        ...


def fill(
    budget: Budget,
    function: Callable[[Tensor], Tensor],
    source: Source,
    *,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Cache:
    """Return a cache of `function` applied to all rows of `source`, batch by batch."""
    made: Cache | None = None
    with torch.no_grad():
        for start in range(0, len(source), batch):
            value = function(source.read(slice(start, start + batch), device))
            if made is None:
                made = budget.allocate(len(source), value.shape[1:], dtype)
            made.rows[start : start + len(value)] = value.to("cpu", dtype)
    assert made is not None
    return made
