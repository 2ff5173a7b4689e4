"""QDrop (Wei et al. 2022): rounding and activation steps learned together, elements dropped.

Half of the elements of a unit's input, and of every activation grid in it, stay unquantized while
it is trained. LSQ's factor on the gradient of a step is left out: Adam divides it out again.

Unlike the paper, as all settings of the loop (see `reconstruct.Published`): activation grids of 8
bits and more are neither learned nor dropped; biases start corrected; a quarter of the images
(some 256 of many) judges, and by it, what is best is kept per unit and in the end (`keep_best`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dfqc.compiler.quantize import _check, reconstruct


class Options(reconstruct.Published):
    """Published settings of QDrop."""

    inputs: Literal["quantized", "float", "mixed"] = "mixed"
    drop: float = Field(0.5, ge=0, lt=1)
    round_weight: float = Field(0.01, ge=0)
    lr_act_scale: float = Field(4e-5, ge=0)


# Fewer iterations at higher rates; the schedules keep their proportions.
PRESETS: dict[str, dict[str, object]] = {
    "quick": {"iterations": 250, "lr_rounding": 1e-2, "lr_act_scale": 4e-4},
    "standard": {"iterations": 1500, "lr_rounding": 3e-3, "lr_act_scale": 1.2e-4},
    "max": {},
}
count_passes, count_bytes = reconstruct.count_passes, reconstruct.count_bytes
quantize = reconstruct.named("qdrop")
check_given = _check.check_given("qdrop")
check_graph = _check.check_graph("qdrop")
