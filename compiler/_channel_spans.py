"""Channels as data: atoms that layers make, spans of them along an axis, what shrinks with them.

An atom is a set of channels that one layer (or the image) makes. A tensor's channel axis is a
row of spans, one atom each; sums and products unite atoms. A frozen atom keeps its channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from torch import fx


@dataclass(frozen=True)
class Use:
    """A dense layer that reads a group's channels on its input axis.

    Channel c of the group is input channels `offset + c * spread` .. `+ spread - 1`: `spread` is
    above 1 behind a flattened map, `offset` above 0 inside a concatenation.
    """

    layer: str
    spread: int
    offset: int


@dataclass(frozen=True)
class Site:
    """Something that has an entry per channel, placed as in `Use`, and shrinks with the group.

    `target` is a module path; for `tensor` that of a parameter, for `size` the name of a node.
    `axis` is that of the tensor, or the position in the node's list of sizes.
    """

    kind: Literal["output", "input", "through", "norm", "tensor", "size"]
    target: str
    spread: int = 1
    offset: int = 0
    axis: int = 0


Trail: TypeAlias = "tuple[str, ...] | None"


class Span(NamedTuple):
    """One atom on a channel axis; `trail` names the nodes since its layer, None past a union."""

    atom: int
    spread: int
    trail: Trail


class Layout(NamedTuple):
    """The channel axis of a tensor and the spans along it."""

    axis: int
    spans: tuple[Span, ...]


Value: TypeAlias = "Layout | list[Layout | None] | None"  # None: channels are not followed


@dataclass
class Atoms:
    """Sets of channels, united where they must be removed together."""

    sizes: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    slices: list[int] = field(default_factory=list)  # equal runs that must stay of one length
    reasons: dict[int, str] = field(default_factory=dict)  # frozen, and why
    residual: set[int] = field(default_factory=set)
    partial: set[int] = field(default_factory=set)  # pass a norm or depthwise layer with others

    def add(self, size: int) -> int:
        """Return a new atom."""
        self.sizes.append(size)
        self.parents.append(len(self.parents))
        self.slices.append(1)
        return len(self.parents) - 1

    def find(self, atom: int) -> int:
        """Return what stands for all that `atom` was united with."""
        while self.parents[atom] != atom:
            self.parents[atom] = self.parents[self.parents[atom]]
            atom = self.parents[atom]
        return atom

    def freeze(self, atom: int, reason: str) -> None:
        """Keep all channels of the atom; the first reason counts."""
        self.reasons.setdefault(self.find(atom), reason)

    def divide(self, atom: int, count: int) -> None:
        """Let equally many channels go of each of `count` runs, which divide the atom's size."""
        atom = self.find(atom)
        self.slices[atom] = math.lcm(self.slices[atom], count)

    def unite(self, first: int, second: int) -> None:
        """Make one of two atoms of one size."""
        a, b = sorted((self.find(first), self.find(second)))
        if a == b:
            return
        self.parents[b] = a
        self.divide(a, self.slices[b])
        if b in self.reasons:
            self.reasons.setdefault(a, self.reasons.pop(b))
        for marked in (self.residual, self.partial):
            if b in marked:
                marked.add(a)


def follow(spans: Sequence[Span], node: fx.Node) -> tuple[Span, ...]:
    return tuple(s if s.trail is None else s._replace(trail=(*s.trail, node.name)) for s in spans)


def join(a: Trail, b: Trail) -> Trail:
    if a is None or b is None:
        return None
    return (*a, *(name for name in b if name not in a))
