"""Activations of many images, by rows: in memory up to a bound, in a file beyond it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dfqc.compiler.ownership import owned_name

log = logging.getLogger(__name__)


class TooLarge(ValueError):
    """A value does not fit into the type it is to be held as."""


@dataclass
class Budget:
    """What all caches together may hold in memory, in bytes; None: everything."""

    limit: int | None = None
    folder: Path | None = None  # where files go; None: the system's temporary folder
    used: int = 0
    spilled: int = 0  # bytes that went to disk, for the record
    widened: int = 0  # caches of float32 where float16 was to be, for the record
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def allocate(self, rows: int, shape: Sequence[int], dtype: torch.dtype) -> Cache | Spilled:
        """Return an empty cache of `rows` times `shape`, in memory if it still fits."""
        size = rows * torch.Size(shape).numel() * dtype.itemsize
        if self.limit is None or self.used + size <= self.limit:
            self.used += size
            return Cache(torch.empty(rows, *shape, dtype=dtype), self, size)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(
                prefix=f"{owned_name()}-cache-", dir=self.folder
            )
        self.spilled += size
        handle, name = tempfile.mkstemp(dir=self._folder.name)
        os.close(handle)
        return Spilled(Path(name), rows, tuple(shape), dtype)

    def close(self) -> None:
        """Delete the files."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


@dataclass
class Cache:
    """One activation of all images in memory, (rows, ...)."""

    rows: Tensor
    budget: Budget
    size: int = 0

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def write(self, start: int, values: Tensor) -> None:
        """Store rows from `start` on; `TooLarge` where they do not fit into float16."""
        self.rows[start : start + len(values)] = _stored(values, self.rows.dtype)

    def read(self, index: Tensor | slice, device: torch.device) -> Tensor:
        """Return some rows as float32 on `device`."""
        return self.rows[index].to(device, torch.float32)

    def free(self) -> None:
        """Give the memory back."""
        self.budget.used -= self.size
        self.size = 0
        self.rows = self.rows[:0].clone()


@dataclass
class Spilled:
    """One activation of all images in a file, read and written by rows.

    Not mapped into memory: pages of a mapping count as memory of the process.
    """

    path: Path
    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __len__(self) -> int:
        """Return the number of images."""
        return self.count

    def write(self, start: int, values: Tensor) -> None:
        """Store rows from `start` on; `TooLarge` where they do not fit into float16."""
        with self.path.open("r+b", buffering=0) as file:
            file.seek(start * self._row)
            file.write(_stored(values, self.dtype).contiguous().numpy().tobytes())

    def read(self, index: Tensor | slice, device: torch.device) -> Tensor:
        """Return some rows as float32 on `device`."""
        numbers = torch.arange(self.count)[index]
        values = torch.empty(len(numbers), *self.shape, dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file:
            for place, number in enumerate(numbers.tolist()):
                file.seek(number * self._row)
                data = bytearray(file.read(self._row))
                values[place] = torch.frombuffer(data, dtype=self.dtype).view(self.shape)
        return values.to(device, torch.float32)

    def free(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    @property
    def _row(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as they are kept: float16 makes infinities of what is beyond 65,504."""
    kept = values.to("cpu", dtype)
    if dtype == torch.float16 and kept.isinf().sum() > values.isinf().sum():
        most = float(values.nan_to_num(posinf=0.0, neginf=0.0).abs().max())
        raise TooLarge(f"values up to {most:.4g}, float16 ends at 65,504")
    return kept


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
) -> Cache | Spilled:
    """Return a cache of `function` applied to all rows of `source`, batch by batch."""

    def compute(rows: slice) -> Tensor:
        with torch.no_grad():
            return function(source.read(rows, device))

    return make_rows(budget, compute, len(source), batch=batch, dtype=dtype)


def make_rows(
    budget: Budget,
    compute: Callable[[slice], Tensor],
    count: int,
    *,
    batch: int,
    dtype: torch.dtype,
) -> Cache | Spilled:
    """Return a cache of what `compute` gives for all of `count` rows, batch by batch.

    Where values do not fit into float16, all are made again and held as float32.
    """
    made: Cache | Spilled | None = None
    try:
        for start in range(0, count, batch):
            value = compute(slice(start, start + batch))
            if made is None:
                made = budget.allocate(count, value.shape[1:], dtype)
            made.write(start, value)
    except TooLarge as error:
        assert made is not None
        made.free()
        log.warning("a cache is held as float32: %s", error)
        budget.widened += 1
        return make_rows(budget, compute, count, batch=batch, dtype=torch.float32)
    assert made is not None
    return made
