"""BRECQ (Li et al. 2021): rounding learned block by block, activation steps in a second pass.

As its released script runs it: squared error without Fisher weighting (an option here), the first
layer rounded to nearest, the second pass on float inputs. Its 8-bit input of the second layer is a
matter of the plan: `--layer NAME=w4a8`.

Unlike the paper, as all settings of the loop (see `reconstruct.Published`): activation steps of 8
bits and more stay as calibrated; biases start corrected; a quarter of the images (some 256 of
many) judges, and by it, what is best is kept per unit and in the end (`keep_best`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dfqc.compiler.quantize import _check, reconstruct


class Options(reconstruct.Published):
    """Published settings of BRECQ."""

    order: Literal["joint", "weights-first"] = "weights-first"
    inputs: Literal["quantized", "float", "mixed"] = "quantized"
    drop: float = Field(0.0, ge=0, lt=1)
    round_weight: float = Field(0.01, ge=0)
    skip_first: bool = True


# Fewer iterations at higher rates; the schedules keep their proportions.
PRESETS: dict[str, dict[str, object]] = {
    "quick": {"iterations": 250, "act_iterations": 60, "lr_rounding": 1e-2},
    "standard": {"iterations": 1500, "act_iterations": 400, "lr_rounding": 3e-3},
    "max": {},
}
count_passes, count_bytes = reconstruct.count_passes, reconstruct.count_bytes
quantize = reconstruct.named("brecq")
check_given = _check.check_given("brecq")
check_graph = _check.check_graph("brecq")
