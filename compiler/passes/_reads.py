"""A layer and a group of channels that it reads in; the parts of its weight, one by one, out.

A dense layer reads all channels at once. Each group of a convolution reads its own, and only they
can stand in for one another there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfqc.compiler.channels import Group, Use

__all__ = ["Read", "split_reads"]


@dataclass(frozen=True)
class Read:
    """Part of a layer's weight, and which channels of the group it multiplies.

    Attributes:
        rows: the outputs.
        columns: the inputs, as the weight counts them.
        channels: of the group, int64, one run.
    """

    rows: slice
    columns: slice
    channels: Tensor

    def take(self, weight: Tensor) -> Tensor:
        """Return the part, (outputs, channels, taps)."""
        part = weight[self.rows, self.columns]
        return part.reshape(len(part), len(self.channels), -1)

    def put(self, weight: Tensor, part: Tensor) -> None:
        """Write the part back."""
        old = weight[self.rows, self.columns]
        weight[self.rows, self.columns] = part.reshape(old.shape)

    def inputs(self, use: Use) -> Tensor:
        """Return which of the layer's inputs the part multiplies."""
        places = use.offset + self.channels[:, None] * use.spread
        return (places + torch.arange(use.spread)).flatten()

    def holds(self, channel: int) -> bool:
        """Report whether a channel of the group is one of the part's."""
        return int(self.channels[0]) <= channel <= int(self.channels[-1])

    def kept(self, keep: Tensor) -> Tensor:
        """Return which of the part's channels are among `keep`, counted from its first."""
        return torch.isin(self.channels, keep).nonzero().flatten()


def split_reads(layer: nn.Conv2d | nn.Linear, group: Group, use: Use) -> list[Read]:
    """List the parts of a layer's weight that multiply a group's channels."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    count, rows = group.size // groups, len(layer.weight) // groups
    columns = slice(use.offset, use.offset + count * use.spread)
    return [
        Read(slice(i * rows, (i + 1) * rows), columns, torch.arange(i * count, (i + 1) * count))
        for i in range(groups)
    ]
