"""Precision of a training's layers: what was asked for and a device in, float32 or bfloat16 out.

Importing this file imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "float32", "bfloat16"]


def choose_precision(asked: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """Return the precision of convolutions and matrix products on `device`.

    `auto` is bfloat16 where an accelerator computes in it itself: what merely emulates it is
    slower. A CPU's speed in it depends on the network (0.60 to 1.25 of the time was measured, see
    `ImageOptions`), and its results are then others than those of the next machine: there it must
    be asked for.
    """
    if asked != "auto":
        return asked
    return "bfloat16" if device.type != "cpu" and _computes_bfloat16(device) else "float32"


def _computes_bfloat16(device: torch.device) -> bool:
    """Ask the device's part of torch, which need not know the question."""
    import torch

    part = getattr(torch, device.type, None)
    ask = getattr(part, "is_bf16_supported", None)
    if ask is None:
        return False
    try:
        return bool(ask(including_emulation=False))
    except TypeError:  # nothing is emulated there
        return bool(ask())
