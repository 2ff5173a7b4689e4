"""Genie-M (Jeon et al. 2023): weight step, rounding and activation step learned together.

The codes below the weights are frozen at floor(w / s0), so that the step has a gradient of its own;
elements are dropped as in QDrop. Weights are on the target's grids: symmetric ones with the fixed
zero point 0 from 4 bits on (what TensorRT and ONNX Runtime take), shifted ones per channel below.

Unlike the paper, as all settings of the loop (see `reconstruct.Published`): activation grids of 8
bits and more are neither learned nor dropped; biases start corrected; a quarter of the images
(some 256 of many) judges, and by it, what is best is kept per unit and in the end (`keep_best`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dfqc.compiler.quantize import _check, reconstruct


class Options(reconstruct.Published):
    """Published settings of Genie-M."""

    inputs: Literal["quantized", "float", "mixed"] = "mixed"
    drop: float = Field(0.5, ge=0, lt=1)
    round_weight: float = Field(1.0, ge=0)
    lr_weight_scale: float = Field(1e-4, ge=0)
    lr_act_scale: float = Field(4e-5, ge=0)


# Fewer iterations at higher rates; the schedules keep their proportions.
PRESETS: dict[str, dict[str, object]] = {
    "quick": {
        "iterations": 250,
        "lr_rounding": 1e-2,
        "lr_weight_scale": 1e-3,
        "lr_act_scale": 4e-4,
    },
    "standard": {
        "iterations": 1500,
        "lr_rounding": 3e-3,
        "lr_weight_scale": 3e-4,
        "lr_act_scale": 1.2e-4,
    },
    "max": {},
}
count_passes, count_bytes = reconstruct.count_passes, reconstruct.count_bytes
quantize = reconstruct.named("genie-m")
check_given = _check.check_given("genie-m")
check_graph = _check.check_graph("genie-m")
