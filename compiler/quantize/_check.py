"""What a reconstruction's options exclude, or leave without effect: options in, errors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dfqc.compiler.errors import UsageError
from dfqc.compiler.quantize._units import read_spans

if TYPE_CHECKING:
    from dfqc.compiler.graph import Graph
    from dfqc.compiler.quantize.reconstruct import Options

# What must be chosen for some options to be read, and whether it is.
_READ_WITH: dict[str, tuple[tuple[str, ...], Callable[[Options], bool]]] = {
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
    "acts=percentile": (("percentile",), lambda options: options.acts == "percentile"),
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
        for needed, (names, is_chosen) in _READ_WITH.items():
            unread = [one for one in names if one in given]
            if unread and not is_chosen(options):
                them, are = ("it", "is") if len(unread) == 1 else ("them", "are")
                raise UsageError(
                    f"{name}: {', '.join(unread)} {are} read with {needed} only: leave {them} "
                    f"out, or give that"
                )

    return check


def check_graph(name: str) -> Callable[[Options, Graph], None]:
    """Return the check of the plug-in of that name whether its options fit a folded graph.

    The check raises `UsageError` for names of blocks that the graph does not have.
    """

    def check(options: Options, graph: Graph) -> None:
        try:
            read_spans(graph, options.join)
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
