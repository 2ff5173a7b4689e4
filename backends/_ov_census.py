"""Which kernel runs each layer in OpenVINO: a stored model and compiled nodes in, names out.

A compiled node lists the names of the nodes it was fused from, with suffixes for the parts that
OpenVINO had split them into: `conv1/WithoutBiases,Multiply_5749,conv1,relu.a8`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from onnx import ModelProto

from dfqc.compiler.errors import LoadError

MISSING = "not found in the compiled model"

_KERNELS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_ASIDE = ("Const", "Input", "Output")
# As OpenVINO spells them in names of primitives, and as the ledger does.
_PRECISIONS = {"i8": "int8", "u8": "int8", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}

Node = Mapping[str, str]


def kernels(
    stored: ModelProto, compiled: Sequence[Node], layers: Mapping[str, str]
) -> dict[str, str]:
    """Return the kernel of each layer, for example `Convolution brgconv_avx512 (int8)`.

    `layers` maps module paths to the values that the layers compute in `stored`. A layer without a
    trace in `compiled` is `MISSING`; a value that `stored` does not have is a `LoadError`.
    """
    # OpenVINO calls a node by its own name in the file, or by the value that it computes.
    names = {name: node.name for node in stored.graph.node for name in node.output}
    by_origin: dict[str, Node] = {}
    for node in compiled:
        if node["layerType"] in _KERNELS:
            for origin in node["originalLayersNames"].split(","):
                by_origin.setdefault(origin.partition("/")[0], node)
    found = {}
    for path, value in layers.items():
        if value not in names:
            raise LoadError(
                f"{path}: value {value!r} is computed by no node of the model; the name map and "
                "the model do not belong together"
            )
        hit = by_origin.get(value) or by_origin.get(names[value])
        found[path] = _label(hit) if hit else MISSING
    return found


def census(compiled: Sequence[Node]) -> Counter[str]:
    """Count the nodes that compute, by type and primitive: `Reduce jit_avx512 (int8)`."""
    return Counter(_label(node) for node in compiled if node["layerType"] not in _ASIDE)


def is_integer(kernel: str) -> bool:
    """Report whether a kernel name of `kernels` multiplies integers."""
    return kernel.endswith("(int8)")


def _label(node: Node) -> str:
    primitive, _, precision = node["primitiveType"].rpartition("_")
    return f"{node['layerType']} {primitive} ({_PRECISIONS.get(precision.lower(), precision)})"
