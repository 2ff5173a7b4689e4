"""Options that another choice leaves without effect: what a user gave in, errors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dfqc.compiler.errors import UsageError

# What must be chosen for some options to be read: their names, and whether it is.
ReadWith = Mapping[str, tuple[tuple[str, ...], Callable[[Any], bool]]]

RANGES: ReadWith = {
    "acts=percentile": (("percentile",), lambda options: options.acts == "percentile"),
}


def refuse_unread(name: str, read_with: ReadWith, options: Any, given: Sequence[str]) -> None:
    """Refuse what the plug-in of that name was given, and would not read.

    Args:
        name: of the plug-in.
        read_with: what its options depend on.
        options: the chosen ones.
        given: names of those that the user gave other values than their defaults.

    Raises:
        UsageError: names them, and what they are read with.
    """
    for needed, (names, is_chosen) in read_with.items():
        unread = [one for one in names if one in given]
        if unread and not is_chosen(options):
            them, are = ("it", "is") if len(unread) == 1 else ("them", "are")
            raise UsageError(
                f"{name}: {', '.join(unread)} {are} read with {needed} only: leave {them} "
                f"out, or give that"
            )


def check_given(name: str, read_with: ReadWith) -> Callable[[Any, Sequence[str]], None]:
    """Return the check of what a user gave to the plug-in of that name: see `plugin_options`."""

    def check(options: Any, given: Sequence[str]) -> None:
        refuse_unread(name, read_with, options, given)

    return check
