"""Quantization vocabulary without torch: bits, schemes, layer rules, targets and the plan.

In: text such as `w4a8` and `layer4.*=w8a8`. Out: frozen values that the simulation, the QDQ
writer and the report read alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dfqc.compiler.errors import UnsupportedError, UsageError

# Weights of this many bits and fewer may shift their codes per channel (see `QScheme`): shifted,
# they still fit the four bits that they are stored in.
OFFSET_BITS = 3
FLOAT_BITS = (16, 32)  # activation "bits" that mean: not quantized
MAX_BITS = 8
MIN_BITS = 2


@dataclass(frozen=True)
class QScheme:
    """An integer grid. `axis` None is per tensor; otherwise one scale per index of that axis.

    An asymmetric grid per channel lets every channel choose its own `levels` consecutive codes
    around zero. Its zero point stays 0 in the file: the codes are stored less the zero point, in
    a container wide enough for all of them (`quant_min` to `quant_max`).
    """

    bits: int
    signed: bool
    symmetric: bool
    axis: int | None = None

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(f"bits must be {MIN_BITS}..{MAX_BITS}, got {self.bits}")
        if self.axis is not None and not self.symmetric and not self.signed:
            raise UsageError("per-channel schemes are signed here, got an unsigned asymmetric one")

    @property
    def levels(self) -> int:
        """Number of codes that one tensor, or one channel, can use."""
        return 1 << self.bits

    @property
    def per_channel_offset(self) -> bool:
        """Report whether every channel chooses where around zero its codes lie."""
        return self.axis is not None and not self.symmetric

    @property
    def quant_min(self) -> int:
        """Smallest code."""
        if self.per_channel_offset:
            return 1 - self.levels
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def quant_max(self) -> int:
        """Largest code."""
        if self.per_channel_offset:
            return self.levels - 1
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


@dataclass(frozen=True)
class Bits:
    """Weight and activation bits of a layer; 16 and 32 mean: left in floating point."""

    weight: int
    act: int

    def __str__(self) -> str:
        """Return the field's spelling, for example `w4a8`."""
        return f"w{self.weight}a{self.act}"

    @property
    def is_float(self) -> bool:
        """True if the layer is not quantized at all."""
        return self.weight in FLOAT_BITS

    @property
    def weight_only(self) -> bool:
        """True if weights are quantized and activations are not."""
        return not self.is_float and self.act in FLOAT_BITS


def parse_bits(text: str, *, where: str = "--bits") -> Bits:
    """Read `w4a8`: weights 2..8, activations 2..8, or 16/32 (weight-only); `w32a32` is float."""
    match = re.fullmatch(r"w(\d+)a(\d+)", text.strip().lower())
    if not match:
        raise UsageError(f"{where}: got {text!r}, expected wNaM, for example w8a8, w4a4 or w4a16")
    bits = Bits(int(match[1]), int(match[2]))
    known = range(MIN_BITS, MAX_BITS + 1)
    if bits.weight not in known and bits.weight not in FLOAT_BITS:
        raise UsageError(f"{where}: weight bits must be 2..8 (or 32: float), got {bits.weight}")
    if bits.act not in known and bits.act not in FLOAT_BITS:
        raise UsageError(f"{where}: activation bits must be 2..8, 16 or 32, got {bits.act}")
    if bits.is_float and bits.act not in FLOAT_BITS:
        raise UsageError(
            f"{where}: {bits} quantizes activations of a float layer; use w32a32 to leave it out"
        )
    return bits


@dataclass(frozen=True)
class Rule:
    """`pattern=bits`: a glob on module paths, or a regular expression after `re:`."""

    pattern: str
    bits: Bits

    def matches(self, name: str) -> bool:
        """Report whether this rule speaks about the layer `name`."""
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.pattern)


def parse_rule(text: str) -> Rule:
    """Read `layer4.*=w8a8` or `re:.*head.*=w32a32`."""
    pattern, sep, bits = text.rpartition("=")
    if not sep or not pattern:
        raise UsageError(f"--layer: got {text!r}, expected PATTERN=wNaM, for example 'fc=w8a8'")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise UsageError(f"--layer: {pattern!r} is no regular expression: {error}") from error
    return Rule(pattern, parse_bits(bits, where=f"--layer {pattern!r}"))


def resolve_bits(
    names: Iterable[str], default: Bits, rules: Iterable[Rule], *, ends: Bits | None
) -> dict[str, Bits]:
    """Give every layer its bits: default, then the ends (first and last layer), then the rules.

    The last matching rule wins. A rule that matches no layer is an error with the nearest names.
    """
    layers = list(names)
    bits = dict.fromkeys(layers, default)
    if ends is not None and layers:
        for name in (layers[0], layers[-1]):
            bits[name] = ends
    for rule in rules:
        hits = [name for name in layers if rule.matches(name)]
        if not hits:
            near = difflib.get_close_matches(rule.pattern.removeprefix("re:"), layers, 3, 0.3)
            raise UsageError(
                f"--layer {rule.pattern!r} matches no layer; nearest: "
                f"{', '.join(near or layers[:3]) or 'none'} (dfqc plan MODEL lists them all)"
            )
        bits.update(dict.fromkeys(hits, rule.bits))
    return bits


def default_ends(bits: Bits) -> Bits:
    """Return the bits of the first and last layer where nobody chose them.

    8 bits, but never narrower than the rest, and weight-only in a weight-only plan.
    """
    if bits.is_float:
        return bits
    return Bits(max(8, bits.weight), max(8, bits.act))


@dataclass(frozen=True)
class TargetSpec:
    """What one target accepts and how it wants a quantized graph written.

    `placement` is `integer` (every quantized op has Q/DQ on inputs and output, so that integer
    kernels form), `fused` (the same, but for what the engine computes inside of a convolution) or
    `inputs` (Q/DQ on layer inputs and on the skip branch of residual adds only).
    `clip` says how a grid below 8 bits is kept: an integer Clip after Q, or a float Clip before.
    `bias` is `int32` (integer initializer) or `float32` (the same grid, stored as float).
    `requantize` is how its kernels come from an integer sum to codes, which decides the last bit:
    `once` (sum and bias in integers, times one float32) or `stepwise` (sum times its step, plus
    the float bias, in float32; codes by the ends of their range).
    """

    name: str
    description: str
    weight_bits: tuple[int, ...]
    act_bits: tuple[int, ...]
    integer_ops: tuple[str, ...]  # canonical layer types that have an integer kernel
    act_signed: bool
    act_symmetric: bool
    placement: str
    clip: str
    bias: str
    packed_int4: bool
    opset: int = 21
    ir_version: int = 10
    weight_only_ops: tuple[str, ...] | None = None  # layer types for it; None: `integer_ops`
    weight_only_note: str = ""  # how they run, said per layer
    block_int4: bool = False  # weight-only layers of up to 4 bits as INT4 in blocks
    bases: tuple[str, ...] = ("fp32",)  # what the rest of the network can be written in
    engine_file: str = ""  # what `dfqc engine` builds on the device; empty: the model itself runs
    requantize: str = "once"
    # Storage of values below 8 bits always runs on 8-bit kernels: said to the user per layer.
    kernel_note: str = ""

    def act_scheme(self, bits: int, *, nonnegative: bool = False) -> QScheme:
        """Return the grid of a per-tensor activation with `bits` bits.

        A symmetric signed target keeps all the codes of a non-negative tensor below 8 bits: 0..15
        fits a signed 8-bit tensor with zero point 0.
        """
        if self.act_symmetric and self.act_signed and nonnegative and bits < MAX_BITS:
            return QScheme(bits, signed=False, symmetric=True)
        return QScheme(bits, signed=self.act_signed, symmetric=self.act_symmetric)


def check_bits(bits: Bits, target: TargetSpec, *, where: str) -> None:
    """Refuse bits that the target cannot hold, before any work is done (exit 4)."""
    if bits.is_float:
        return
    if bits.weight not in target.weight_bits:
        raise UnsupportedError(
            f"{where}: {bits.weight}-bit weights are not supported by target '{target.name}'; "
            f"expected one of {_spans(target.weight_bits)}"
        )
    if bits.act not in target.act_bits:
        raise UnsupportedError(
            f"{where}: {bits.act}-bit activations are not supported by target '{target.name}'; "
            f"expected one of {_spans(target.act_bits)}"
        )


def check_base(base: str, target: TargetSpec) -> None:
    """Refuse a type of the unquantized rest that the target is not written in (exit 2)."""
    if base not in target.bases:
        raise UsageError(
            f"--trt-base {base}: target '{target.name}' is written in {', '.join(target.bases)}; "
            "it goes with --target trt"
        )


def _spans(values: tuple[int, ...]) -> str:
    return ", ".join(str(v) for v in values)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer gets: asked by the user, exported to the file, and why they differ."""

    name: str  # module path, the user's name
    node: str  # node name in the canonical graph
    op: str  # Conv2d, ConvTranspose2d, Linear
    asked: Bits
    exported: Bits
    weight: QScheme | None
    input: str | None  # name of the quantizer on its input; None: float input
    reason: str = ""


@dataclass(frozen=True)
class Quantizer:
    """A quantize-dequantize pair on an activation tensor.

    It sits on the output of node `source` and feeds the nodes in `consumers`. With `after`, it
    reads the output of that wider quantizer instead of the raw tensor. With `tied`, it repeats
    the grid of that quantizer behind an op that does not leave the grid (max pool, reshape).
    """

    name: str
    source: str
    scheme: QScheme
    consumers: tuple[str, ...]
    after: str | None = None
    tied: str | None = None


@dataclass(frozen=True)
class Plan:
    """Every decision of a build as data: layers by module path, quantizers by name."""

    target: str
    bits: Bits
    layers: Mapping[str, LayerPlan]
    quantizers: Mapping[str, Quantizer]
    requantize: str = "once"  # see `TargetSpec`

    def to_json(self) -> dict[str, Any]:
        """Return plain data; `plan_from_json` reads it back."""
        return {
            "target": self.target,
            "bits": str(self.bits),
            "requantize": self.requantize,
            "layers": [dataclasses.asdict(p) for p in self.layers.values()],
            "quantizers": [dataclasses.asdict(q) for q in self.quantizers.values()],
        }


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    """Rebuild a `Plan` from `Plan.to_json`."""
    layers = {}
    for raw in data["layers"]:
        fields = dict(raw)
        fields["asked"], fields["exported"] = Bits(**raw["asked"]), Bits(**raw["exported"])
        fields["weight"] = QScheme(**raw["weight"]) if raw["weight"] else None
        layers[raw["name"]] = LayerPlan(**fields)
    quantizers = {}
    for raw in data["quantizers"]:
        fields = dict(raw) | {
            "scheme": QScheme(**raw["scheme"]),
            "consumers": tuple(raw["consumers"]),
        }
        quantizers[raw["name"]] = Quantizer(**fields)
    bits = parse_bits(data["bits"])
    return Plan(data["target"], bits, layers, quantizers, data.get("requantize", "once"))
