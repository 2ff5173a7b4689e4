"""Options of column-wise rounding that exclude each other, or do not fit a network: errors out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import Graph, has_batch_norm
from dfqc.compiler.quantize._given import RANGES, ReadWith, refuse_unread

if TYPE_CHECKING:
    from dfqc.compiler.quantize.gptq import Options

_OF_IMAGES = ("asymmetric", "shift_damping", "images", "norms")  # options without meaning for `bn`
_READ_WITH: ReadWith = {
    "asymmetric=true": (("shift_damping",), lambda options: options.asymmetric),
    **RANGES,
}


def check_given(options: Options, given: Sequence[str]) -> None:
    """Refuse options that the others leave without effect: see `plugin_options`.

    Raises:
        UsageError: names them, and what to give instead.
    """
    check_options(options)
    refuse_unread("gptq", _READ_WITH, options, given)


def check_options(options: Options) -> None:
    """Refuse options of the images' Hessian where batch norms give it."""
    unused = [name for name in _OF_IMAGES if name in options.model_fields_set]
    if options.hessian == "bn" and unused:
        raise UsageError(
            f"gptq: hessian=bn sees no images and would not use {', '.join(unused)}: leave "
            f"{'it' if len(unused) == 1 else 'them'} out, or give hessian=images"
        )


def check_graph(options: Options, unfolded: Graph | None, *, synthetic: bool) -> None:
    """Refuse to take from batch norms what there is not, or what given images alone count for.

    Args:
        options: the chosen ones.
        unfolded: the model with its batch norms; None if only the folded one is known.
        synthetic: whether the images are made from the model.

    Raises:
        UsageError: names the option, and what to do.
    """
    known = unfolded is not None and has_batch_norm(unfolded)
    if options.hessian == "bn" and not known:
        raise UsageError(
            "gptq: hessian=bn needs the model with its batch norms, got none: give hessian=images"
        )
    if options.hessian == "bn" or not options.norms or (known and synthetic):
        return
    if options.norms != type(options).model_fields["norms"].default:
        why = "no batch norms are known" if synthetic else "given images count alone"
        raise UsageError(f"gptq: norms={options.norms:g} would not be used: {why}; leave it out")
