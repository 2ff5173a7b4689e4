"""Where quantizers sit: folded graph and layer plans in, quantizers and layer inputs out.

Three placements. `integer`: every op that has an integer kernel gets Q/DQ on its inputs and its
output (convolutions, residual adds, concats), so that the engine fuses them. `inputs`: layer
inputs, and the skip branch of a residual add, as TensorRT fuses best. `fused`: as `integer`, but
for what OpenVINO computes within the kernel of a convolution (see `placement_fused`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from dfqc.compiler.graph import Graph
from dfqc.compiler.operators import (
    ADD,
    MAX_POOL,
    is_nonnegative,
    is_spatial_zero_pad,
    join_inputs,
    output_end,
    stays_on_grid,
)
from dfqc.compiler.spec import LayerPlan, Quantizer, TargetSpec

STREAM_BITS = 8  # residual streams, concats and unfused activations: 4 bits there cost points


@dataclass
class Request:
    """Who wants a tensor quantized: bits -> consumer node names, in graph order."""

    by_bits: dict[int, list[str]] = field(default_factory=dict)

    def add(self, bits: int, consumer: str) -> None:
        """Note that `consumer` wants `bits`."""
        names = self.by_bits.setdefault(bits, [])
        if consumer not in names:
            names.append(consumer)


def place(
    graph: Graph, target: TargetSpec, layers: Mapping[str, LayerPlan]
) -> tuple[dict[str, Quantizer], dict[str, str]]:
    """Return the quantizers by name, and the input quantizer of each layer node."""
    if target.placement == "fused":
        from dfqc.compiler.placement_fused import FusedPlacer  # which builds upon this module

        return FusedPlacer(graph, target, layers).run()
    return Placer(graph, target, layers).run()


class Placer:
    """Places the quantizers of one graph; `run` once."""

    def __init__(self, graph: Graph, target: TargetSpec, layers: Mapping[str, LayerPlan]) -> None:
        self.nodes = list(graph.module.graph.nodes)
        self.target = target
        self.layers = {p.node: p for p in layers.values()}
        self.requests: dict[fx.Node, Request] = {}
        self.covered: dict[fx.Node, None] = {}  # every edge leaving these must be quantized
        self.quantizers: dict[str, Quantizer] = {}
        self.inputs: dict[str, str] = {}

    def run(self) -> tuple[dict[str, Quantizer], dict[str, str]]:
        """Return the quantizers by name, and the input quantizer of each layer node."""
        quantized = [n for n in self.nodes if self._act_bits(n) is not None]
        for node in quantized:
            source, consumer = self._layer_source(node)
            self._request(source, self._act_bits(node) or 0, consumer)
        if self.target.placement != "inputs":
            for node in quantized:
                if self._writes_codes(node):
                    self.covered[output_end(node)] = None
            for node in self.nodes:
                self._cover_join(node)
            for node in quantized:
                self._cover_pooled(self._layer_source(node)[0])
        else:
            for node in self.nodes:
                self._quantize_skip(node)
        for node in self.nodes:
            if node in self.covered:
                self._emit_covered(node)
            elif node in self.requests:
                self._emit_parallel(node)
        for node in quantized:
            self.inputs[node.name] = self._find_input(node)
        return self._in_order(), self.inputs

    def _writes_codes(self, node: fx.Node) -> bool:
        """Report whether a quantized layer's output is quantized whoever reads it."""
        return self.layers[node.name].op != "Linear"  # QGemm writes float itself

    def _act_bits(self, node: fx.Node) -> int | None:
        plan = self.layers.get(node.name)
        if plan is None or plan.exported.is_float or plan.exported.weight_only:
            return None
        return plan.exported.act

    def _layer_source(self, node: fx.Node) -> tuple[fx.Node, str]:
        """Return the tensor a layer reads and who reads it: a pad in front belongs to the conv."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if is_spatial_zero_pad(source) and self._absorbed(source):
            inner = source.args[0]
            assert isinstance(inner, fx.Node)
            return inner, source.name
        return source, node.name

    def _absorbed(self, pad: fx.Node) -> bool:
        """Report whether all readers of a pad are quantized convolutions with the same bits."""
        bits = {self._act_bits(user) for user in pad.users}
        ops = {self.layers[u.name].op for u in pad.users if u.name in self.layers}
        return len(bits) == 1 and None not in bits and ops == {"Conv2d"}

    def _request(self, source: fx.Node, bits: int, consumer: str) -> None:
        self.requests.setdefault(source, Request()).add(bits, consumer)

    def _cover_join(self, node: fx.Node) -> None:
        """Give adds and concats of quantized tensors integer inputs and outputs."""
        parts = join_inputs(node)
        if not parts or not all(self._on_grid(p) for p in parts):
            return
        self.covered[output_end(node)] = None
        for part in parts:
            self._request(part, STREAM_BITS, node.name)

    def _cover_pooled(self, source: fx.Node) -> None:
        """Quantize in front of a maximum pool, not behind it, where only integer layers read it.

        Rounding keeps the order of numbers: on one grid both give the same codes (its range is now
        that of what the pool reads). The pool then reads bytes, and what computes its input writes
        them (leaky ReLUs, in kernels of integers).
        """
        if source.target is not MAX_POOL or None in map(self._act_bits, source.users):
            return
        while source.target is MAX_POOL and len(source.all_input_nodes[0].users) == 1:
            source = source.all_input_nodes[0]
        if source.op == "call_function" and not stays_on_grid(source):
            self.covered[source] = None

    def _on_grid(self, node: fx.Node) -> bool:
        """Report whether `node` carries values of a covered tensor."""
        while node not in self.covered:
            if not stays_on_grid(node):
                return False
            before = node.args[0]
            if not isinstance(before, fx.Node):
                return False
            node = before
        return True

    def _quantize_skip(self, node: fx.Node) -> None:
        """Quantize the branch of an add that no convolution writes (the skip), for `inputs`."""
        if node.op != "call_function" or node.target is not ADD:
            return
        parts = join_inputs(node)
        # Only a convolution fuses with the add behind it.
        bare = [p for p in parts if self._act_bits(p) is not None and self._is_conv(p)]
        if len(parts) == 2 and bare:
            for part in parts:
                if part is not bare[0]:
                    self._request(part, STREAM_BITS, node.name)

    def _is_conv(self, node: fx.Node) -> bool:
        return self.layers[node.name].op == "Conv2d"

    def _wanted(self, node: fx.Node) -> set[int]:
        """Return the bit widths that the readers of `node` ask for; float readers ask for 8."""
        request = self.requests.get(node)
        wanted = set(request.by_bits) if request else set()
        asked = {name for names in request.by_bits.values() for name in names} if request else set()
        for user in node.users:
            if user.name in asked:
                continue
            if stays_on_grid(user) and user.users:
                wanted |= self._wanted(user)
            else:
                wanted.add(STREAM_BITS)
        return wanted

    def _emit_covered(self, node: fx.Node) -> None:
        """Emit one quantizer over every edge of `node`; narrower ones read its output."""
        users = tuple(u.name for u in node.users)
        wanted = self._wanted(node)
        if len(wanted) == 1:
            base = self._emit(node, wanted.pop(), users)
        else:
            base = self._emit(node, STREAM_BITS, users)
            request = self.requests.get(node, Request())
            for bits, consumers in sorted(request.by_bits.items(), reverse=True):
                if bits != STREAM_BITS:
                    self._emit(node, bits, tuple(consumers), after=base)
        self._tie(node, self.quantizers[base])

    def _tie(self, node: fx.Node, base: Quantizer) -> None:
        """Repeat the grid of `base` behind ops that stay on it, where a reader wants integers."""
        for user in node.users:
            if not stays_on_grid(user):
                continue
            request = self.requests.get(user)
            if request is not None and request.by_bits:
                self._emit_tied(user, base, request)
            self._tie(user, base)

    def _emit_tied(self, node: fx.Node, base: Quantizer, request: Request) -> None:
        """Emit the twin of `base` behind `node`; narrower ones read it, so `node` stays integer."""
        names = [name for readers in request.by_bits.values() for name in readers]
        twin = self._emit(node, base.scheme.bits, tuple(dict.fromkeys(names)), tied=base.name)
        for bits, consumers in sorted(request.by_bits.items(), reverse=True):
            if bits != base.scheme.bits:
                self._emit(node, bits, tuple(consumers), after=twin)
        request.by_bits.clear()

    def _emit_parallel(self, node: fx.Node) -> None:
        for bits, consumers in sorted(self.requests[node].by_bits.items(), reverse=True):
            self._emit(node, bits, tuple(consumers))

    def _emit(
        self,
        node: fx.Node,
        bits: int,
        consumers: tuple[str, ...],
        *,
        after: str | None = None,
        tied: str | None = None,
    ) -> str:
        name = f"{node.name}.a{bits}"
        scheme = self.target.act_scheme(bits, nonnegative=is_nonnegative(node))
        self.quantizers[name] = Quantizer(name, node.name, scheme, consumers, after, tied)
        return name

    def _find_input(self, node: fx.Node) -> str:
        """Return the quantizer that feeds a layer: the narrowest one that lists it."""
        source, consumer = self._layer_source(node)
        hits = [q for q in self.quantizers.values() if q.source == source.name]
        hits = [q for q in hits if consumer in q.consumers]
        return min(hits, key=lambda q: q.scheme.bits).name

    def _in_order(self) -> dict[str, Quantizer]:
        """Sort quantizers by the graph order of their source, wider first."""
        rank = {n.name: i for i, n in enumerate(self.nodes)}
        ordered = sorted(
            self.quantizers.values(), key=lambda q: (rank[q.source], q.after is not None)
        )
        return {q.name: q for q in ordered}
