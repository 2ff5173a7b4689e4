"""Where OpenVINO wants quantizers: as on integer kernels, but none inside of what it fuses.

In: folded graph and layer plans. Out: quantizers and layer inputs, as `placement` gives them.

OpenVINO's CPU plug-in computes a residual add, and float operations such as a hard-swish, within
the kernel of the convolution in front. A quantizer between the two is not kept there: the kernel
adds the convolution's sum unrounded, so that the file would say one thing and the engine compute
another. (Measured with 2026.4 on networks with residual adds, W8A8 and W4A4: outputs 1e-3 from the
file's own meaning with the quantizer, 1e-7 without.) Without it the kernel still does the addition,
if the engine is kept from taking it away first: see `backends/openvino.py`. Nor does a narrow
quantizer read a wide one: see `_emit_covered`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from dfqc.compiler.graph import Graph
from dfqc.compiler.operators import ADD, join_inputs, output_end
from dfqc.compiler.placement import STREAM_BITS, Placer, Request
from dfqc.compiler.spec import LayerPlan, TargetSpec

_aten = torch.ops.aten
_POOLS = (_aten.mean.dim, _aten.avg_pool2d.default, _aten.adaptive_avg_pool2d.default)
# What a convolution's kernel, or one pass behind it, computes in float and rounds once at its end.
_FLOAT = (
    _aten.elu.default,
    _aten.gelu.default,
    _aten.hardsigmoid.default,
    _aten.hardswish.default,
    _aten.leaky_relu.default,
    _aten.mish.default,
    _aten.mul.Tensor,
    _aten.sigmoid.default,
    _aten.silu.default,
    _aten.tanh.default,
)


class FusedPlacer(Placer):
    """Leaves bare what a convolution's kernel hands on without rounding it."""

    def __init__(self, graph: Graph, target: TargetSpec, layers: Mapping[str, LayerPlan]) -> None:
        super().__init__(graph, target, layers)
        self.bare = self._find_bare()

    def _find_bare(self) -> set[fx.Node]:
        """Return, for every residual add, the convolution whose kernel does the addition.

        It has no other reader. Of two, the later one: the other's output is there by then.
        """
        bare = set()
        for node in self.nodes:
            parts = join_inputs(node) if node.target is ADD else []
            convs = [part for part in parts if self._is_bare_conv(part)]
            if len(parts) == 2 and convs:
                bare.add(max(convs, key=self.nodes.index))
        return bare

    def _is_bare_conv(self, node: fx.Node) -> bool:
        return self._act_bits(node) is not None and self._is_conv(node) and len(node.users) == 1

    def _writes_codes(self, node: fx.Node) -> bool:
        """Report whether a layer's output is quantized: not where float operations read it."""
        if node in self.bare or not super()._writes_codes(node):
            return False
        users = list(output_end(node).users)
        in_float = [user.target in _FLOAT for user in users]
        fuses = [user.target in _POOLS or self._act_bits(user) is not None for user in users]
        return not any(in_float) or not all(f or g for f, g in zip(in_float, fuses, strict=True))

    def _emit_covered(self, node: fx.Node) -> None:
        """Emit one quantizer per width, all on the tensor itself.

        Behind one another, values of the wide grid can lie halfway between two of the narrow one,
        and the engine's float product does not round them as a division does.
        """
        narrow = {
            bits: tuple(names)
            for bits, names in self.requests.get(node, Request()).by_bits.items()
            if bits != STREAM_BITS
        }
        apart = {name for names in narrow.values() for name in names}
        rest = tuple(user.name for user in node.users if user.name not in apart)
        if not rest or len(self._wanted(node)) == 1:
            super()._emit_covered(node)
            return
        base = self._emit(node, STREAM_BITS, rest)
        for bits, names in sorted(narrow.items(), reverse=True):
            self._emit(node, bits, names)
        self._tie(node, self.quantizers[base])

    def _cover_join(self, node: fx.Node) -> None:
        """Give the other branch of a fused add, and its output, integers; other joins as ever."""
        parts = join_inputs(node)
        others = [part for part in parts if part not in self.bare]
        if len(others) == len(parts):
            super()._cover_join(node)
            return
        self.covered[output_end(node)] = None
        for part in others:
            self._request(part, STREAM_BITS, node.name)
