"""A graph in; out, which channels every tensor carries along which axis, and what follows them.

Layers make atoms of channels, sums and products unite them. What is not understood freezes the
atoms that it reads: their channels stay, whatever else could be done with them.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, cast

from torch import fx, nn

from dfqc.compiler._aten import argument, data_nodes, is_pointwise, op_name
from dfqc.compiler._channel_axes import RULES
from dfqc.compiler._channel_spans import (
    Atoms,
    Layout,
    Site,
    Span,
    Trail,
    Use,
    Value,
    follow,
    join,
)
from dfqc.compiler.graph import LAYER_TYPES, Graph, node_shapes
from dfqc.compiler.passes._layers import Layer, count_calls

_GATES = ("mul", "div", "expand_as")  # two factors; other unions are sums
_BATCH = 13  # a batch that no other size in a network is likely to equal


def walk(graph: Graph) -> Walk:
    """Follow the channels through the graph."""
    found = Walk(graph)
    for node in graph.module.graph.nodes:
        found.visit(node)
    return found


class Walk:
    """What was found on the way, in the order the nodes run."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.atoms = Atoms()
        self.producers: list[tuple[int, str]] = []
        self.sites: list[tuple[int, Site]] = []
        self.uses: list[tuple[int, Use, Trail]] = []
        self._shapes = node_shapes(graph, _BATCH)
        self._calls = count_calls(graph)
        nodes = graph.module.graph.nodes
        self._reads = Counter(str(n.target) for n in nodes if n.op == "get_attr")
        self._data = set(data_nodes(graph.module.graph))
        self._values: dict[fx.Node, Value] = {}
        self._shared: dict[str, int] = {}

    def visit(self, node: fx.Node) -> None:
        """Follow the channels through one node."""
        if node.op == "placeholder":
            size = self._shapes[node.name][1]
            self._values[node] = self._frozen(1, size, "channels of the image")
        elif node.op == "output":
            self._freeze(node, "channels of the output")
        elif node.op == "call_module":
            module = self.graph.module.get_submodule(str(node.target))
            if isinstance(module, LAYER_TYPES):
                self._values[node] = self._visit_layer(node, module)
            else:
                self._values[node] = self._visit_norm(node)
        elif node in self._data:
            self._values[node] = self._visit_function(node)
        elif op_name(node).startswith("sym_size"):
            self._visit_size(node)

    def _visit_layer(self, node: fx.Node, layer: Layer) -> Value:
        path, shape = str(node.target), self._shapes[node.name]
        axis = len(shape) - 1 if isinstance(layer, nn.Linear) else 1
        size = shape[axis]
        x = self.layout(node.args[0])
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        if self._calls[path] > 1:
            reason = f"{path} is called {self._calls[path]} times"
            self._freeze(node, reason)
            if path not in self._shared:
                self._shared[path] = self._make(path, size)
                self.atoms.freeze(self._shared[path], reason)
            return Layout(axis, (Span(self._shared[path], 1, None),))
        if x is not None and x.axis != axis:
            self._freeze(node, f"{path} reads another axis than the channels'")
        elif x is not None:
            if 1 < groups == layer.in_channels:
                return self._pass_depthwise(node, layer, x)
            self._read(node, x, groups)
        atom = self._make(path, size)
        self.atoms.divide(atom, groups)
        return Layout(axis, (Span(atom, 1, ()),))

    def _read(self, node: fx.Node, x: Layout, groups: int) -> None:
        """Note what a layer reads; the groups of a convolution must go on reading equally much."""
        path = str(node.target)
        if groups > 1 and (len(x.spans) > 1 or self.atoms.sizes[x.spans[0].atom] % groups):
            self._freeze(node, f"{path} has groups that read parts of several maps")
            return
        for span, offset in self.offsets(x):
            self.uses.append((span.atom, Use(path, span.spread, offset), span.trail))
            self.sites.append((span.atom, Site("input", path, span.spread, offset)))
            self.atoms.divide(span.atom, groups)

    def _make(self, path: str, size: int) -> int:
        atom = self.atoms.add(size)
        self.producers.append((atom, path))
        self.sites.append((atom, Site("output", path)))
        return atom

    def _pass_depthwise(self, node: fx.Node, layer: Any, x: Layout) -> Layout:
        """Every channel goes through by itself, `widening` times."""
        widening = layer.out_channels // layer.in_channels
        self._note("through", node, x)
        spans = follow(x.spans, node)
        if widening > 1:  # no linear combination of single channels reads these
            spans = tuple(Span(s.atom, s.spread * widening, None) for s in spans)
        return Layout(x.axis, spans)

    def _visit_norm(self, node: fx.Node) -> Value:
        x, path = self.layout(node.args[0]), str(node.target)
        if x is None:
            return None
        if x.axis != 1 or self._calls[path] > 1:
            times = self._calls[path]
            what = "reads another axis than the channels'" if times == 1 else "is called twice"
            return self.lose(node, f"{path} {what}")
        self._note("norm", node, x)
        return Layout(x.axis, follow(x.spans, node))

    def _note(self, kind: Literal["through", "norm"], node: fx.Node, x: Layout) -> None:
        for span, offset in self.offsets(x):
            self.sites.append((span.atom, Site(kind, str(node.target), span.spread, offset)))
            if len(x.spans) > 1 or span.spread > 1:
                self.atoms.partial.add(self.atoms.find(span.atom))

    def _visit_size(self, node: fx.Node) -> None:
        """A channel count that the graph computes with would not follow a removal."""
        x = self.layout(node.args[0])
        if x is not None and argument(node, 1) % self.rank(node.args[0]) == x.axis:
            self._freeze(node, f"{node.name} computes with the number of channels")

    def _visit_function(self, node: fx.Node) -> Value:
        if node.target is operator.getitem:
            value = self._values.get(cast(fx.Node, node.args[0]))
            return value[cast(int, node.args[1])] if isinstance(value, list) else None
        if not any(self.layouts(node)):
            return None
        name = op_name(node)
        if name in RULES:
            return RULES[name](self, node)
        if is_pointwise(node):
            return self.combine(node)
        return self.lose(node, f"{node.name} mixes or moves channels")

    def concatenate(self, node: fx.Node) -> Value:
        """Put channel axes behind one another."""
        parts = [p for p in cast("list[Any]", node.args[0]) if isinstance(p, fx.Node)]
        axis = argument(node, 1) % self.rank(node)
        layouts = [self.layout(part) for part in parts]
        if all(one is None or one.axis != axis for one in layouts):
            return self.combine(node)
        spans: list[Span] = []
        for part, one in zip(parts, layouts, strict=True):
            if one is None or one.axis != axis:
                reason = f"{node.name} joins what is not followed"
                if one is not None:
                    self._freeze_spans(one.spans, reason)
                one = self._frozen(axis, self.shape(part)[axis], reason)
            spans.extend(one.spans)
        return Layout(axis, follow(spans, node))

    def combine(self, node: fx.Node) -> Value:
        """Broadcast; the channels of all tensors become those of one group."""
        rank = self.rank(node)
        followed: list[Layout] = []
        for source in node.all_input_nodes:
            x = self.layout(source)
            if x is None or source.name not in self._shapes:
                continue
            axis = x.axis + rank - self.rank(source)
            if self.shape(source)[x.axis] != self.shape(node)[axis]:
                self._freeze_spans(x.spans, f"{node.name} repeats a channel")
                continue
            followed.append(Layout(axis, x.spans))
        if len({one.axis for one in followed}) != 1:
            return self.lose(node, f"{node.name} combines different axes")
        result = followed[0]
        for other in followed[1:]:
            result = self._unite(node, result, other)
        for source in node.all_input_nodes:
            if self.layout(source) is None and source.name in self._shapes:
                self._meet(node, source, result)
        return Layout(result.axis, follow(result.spans, node))

    def _unite(self, node: fx.Node, a: Layout, b: Layout) -> Layout:
        sizes = [[(self.atoms.sizes[s.atom], s.spread) for s in one.spans] for one in (a, b)]
        if sizes[0] != sizes[1]:
            reason = f"{node.name} combines maps that are divided differently"
            self._freeze_spans((*a.spans, *b.spans), reason)
            return a
        spans = []
        for first, second in zip(a.spans, b.spans, strict=True):
            trail = join(first.trail, second.trail)
            if self.atoms.find(first.atom) != self.atoms.find(second.atom):
                self.atoms.unite(first.atom, second.atom)
                trail = None
                if op_name(node) not in _GATES:
                    self.atoms.residual.add(self.atoms.find(first.atom))
            spans.append(Span(first.atom, first.spread, trail))
        return Layout(a.axis, tuple(spans))

    def _meet(self, node: fx.Node, source: fx.Node, x: Layout) -> None:
        """Combine with a tensor without followed channels: a constant, or one that was lost."""
        shape = self.shape(source)
        axis = 0 if op_name(node) == "prelu" else x.axis - self.rank(node) + len(shape)
        if not shape or axis < 0 or shape[axis] == 1:
            return
        owned = source.op == "get_attr" and len(source.users) * self._reads[str(source.target)] == 1
        owner = str(source.target).rpartition(".")[0]
        if owned and not self._calls[owner] and (op_name(node) != "prelu" or x.axis == 1):
            for span, offset in self.offsets(x):
                site = Site("tensor", str(source.target), span.spread, offset, axis)
                self.sites.append((span.atom, site))
            return
        self._freeze_spans(x.spans, f"{node.name} combines with channels that are not followed")
        if op_name(node) not in _GATES:
            self.atoms.residual |= {self.atoms.find(s.atom) for s in x.spans}

    def _frozen(self, axis: int, size: int, reason: str) -> Layout:
        atom = self.atoms.add(size)
        self.atoms.freeze(atom, reason)
        return Layout(axis, (Span(atom, 1, None),))

    def lose(self, node: fx.Node, reason: str) -> Value:
        """Freeze what the node reads; its own channels are not followed."""
        self._freeze(node, reason)
        return None

    def _freeze(self, node: fx.Node, reason: str) -> None:
        for layout in self.layouts(node):
            self._freeze_spans(layout.spans, reason)

    def _freeze_spans(self, spans: Iterable[Span], reason: str) -> None:
        for span in spans:
            self.atoms.freeze(span.atom, reason)

    def layouts(self, node: fx.Node) -> list[Layout]:
        """List what is known of the channels that a node reads."""
        found: list[Layout] = []
        for source in node.all_input_nodes:
            value = self._values.get(source)
            found.extend(v for v in (value if isinstance(value, list) else [value]) if v)
        return found

    def layout(self, node: Any) -> Layout | None:
        """Return the channel axis of one tensor, None if it is not followed."""
        value = self._values.get(node) if isinstance(node, fx.Node) else None
        return value if isinstance(value, Layout) else None

    def offsets(self, layout: Layout) -> list[tuple[Span, int]]:
        """Pair every span with the position where it starts."""
        found, offset = [], 0
        for span in layout.spans:
            found.append((span, offset))
            offset += self.atoms.sizes[span.atom] * span.spread
        return found

    def shape(self, node: Any) -> tuple[int, ...]:
        """Return the shape of a tensor, for a batch of `_BATCH`."""
        return self._shapes[node.name]

    def rank(self, node: Any) -> int:
        """Return the number of axes of a tensor."""
        return len(self._shapes[node.name])
