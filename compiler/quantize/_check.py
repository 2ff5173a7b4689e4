"""What a reconstruction's options exclude, or leave without effect: options in, errors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from dfqc.compiler.errors import UsageError
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.quantize._given import RANGES, ReadWith, refuse_unread
from dfqc.compiler.quantize._units import read_spans

if TYPE_CHECKING:
    from dfqc.compiler.graph import Graph
    from dfqc.compiler.quantize.reconstruct import Options


def _learns(options: Options) -> bool:
    """Report whether units learn anything."""
    return options.lr_rounding > 0 or _learns_sizes(options)


def _learns_sizes(options: Options) -> bool:
    """Report whether units learn what has a size of its own: scales or biases."""
    steps = options.lr_act_scale if options.order == "joint" else options.lr_act_second
    return max(options.lr_weight_scale, options.lr_bias, steps) > 0


# What must be chosen for some options to be read, and whether it is.
_READ_WITH: ReadWith = {
    "a rate (lr_rounding, lr_weight_scale, ...) above 0": (
        ("iterations", "inputs", "drop", "error_weight", "norm", "weighting", "output_weight"),
        _learns,
    ),
    "a rate of scales or biases (lr_weight_scale, lr_bias, ...) above 0": (
        ("relative", "step_share"),
        _learns_sizes,
    ),
    "rounding=soft": (
        ("round_weight", "warm_up", "power_start", "power_end"),
        lambda options: options.rounding == "soft",
    ),
    "round_weight above 0": (
        ("warm_up", "power_start", "power_end"),
        lambda options: options.round_weight > 0,
    ),
    "lr_rounding above 0": (
        ("round_weight", "warm_up", "power_start", "power_end", "undecided"),
        lambda options: options.lr_rounding > 0,
    ),
    "error_weight above 0": (("norm", "weighting"), lambda options: options.error_weight > 0),
    "order=weights-first": (
        ("act_iterations", "lr_act_second"),
        lambda options: options.order == "weights-first",
    ),
    "order=joint": (("lr_act_scale",), lambda options: options.order == "joint"),
    "order=joint, or inputs=mixed,": (  # weights alone read it for their inputs only
        ("drop",),
        lambda options: options.order == "joint" or options.inputs == "mixed",
    ),
    "output_weight above 0": (
        ("output_temperature",),
        lambda options: options.output_weight > 0,
    ),
    "tune_iterations above 0": (
        ("tune_rate", "tune_rounding", "tune_temperature"),
        lambda options: options.tune_iterations > 0,
    ),
    "tune_rate or tune_rounding above 0": (
        ("tune_temperature",),
        lambda options: options.tune_rate > 0 or options.tune_rounding > 0,
    ),
    "unit=block": (("least_layers", "join"), lambda options: options.unit == "block"),
    "keep_best=true": (("compete",), lambda options: options.keep_best),
    **RANGES,
}


def check_given(name: str) -> Callable[[Options, Sequence[str]], None]:
    """Return the check of what a user gave to the plug-in of that name: see `plugin_options`.

    The check raises `UsageError` for options that the others exclude, or leave without effect.
    """

    def check(options: Options, given: Sequence[str]) -> None:
        try:
            check_options(options)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        refuse_unread(name, _READ_WITH, options, given)

    return check


class _CheckGraph(Protocol):
    def __call__(self, options: Options, unfolded: Graph, *, synthetic: bool) -> None: ...


def check_graph(name: str) -> _CheckGraph:
    """Return the check of the plug-in of that name whether its options fit an unfolded graph.

    The check raises `UsageError` for names of blocks that the graph does not have.
    """

    def check(options: Options, unfolded: Graph, *, synthetic: bool) -> None:
        try:
            read_spans(fold(unfolded), options.join)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None

    return check


def check_options(options: Options) -> None:
    """Refuse options that exclude each other.

    Raises:
        UsageError: names them, and what to give instead.
    """
    if options.unit == "layer" and (options.output_weight or options.weighting != "none"):
        raise UsageError(
            "unit=layer: output_weight and weighting=fisher follow a unit's output to the end of "
            "the network, which needs unit=block"
        )
    if not options.error_weight and not options.output_weight and _learns(options):
        raise UsageError(
            "error_weight=0: leaves no error to learn from; give output_weight above 0, "
            "or leave it out"
        )
    if options.inputs == "mixed" and not options.drop:
        raise UsageError(
            "inputs=mixed: draws elements of the float input by the share drop, got drop=0; give a "
            "drop above 0, or inputs=quantized"
        )
    if options.unit == "layer" and options.merge > 1:
        raise UsageError("merge: takes blocks together, got unit=layer; use unit=block")
    if options.join and options.merge > 1:
        raise UsageError(
            f"join: names the blocks that are one unit, got merge={options.merge} beside it; give "
            "one of them"
        )
