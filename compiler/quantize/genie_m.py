"""Genie-M (Jeon et al. 2023): weight step, rounding and activation step learned together.

The codes below the weights are frozen at floor(w / s0), so that the step has a gradient of its own;
elements are dropped as in QDrop. Weights are on the target's grids: symmetric ones with the fixed
zero point 0 from 4 bits on (what TensorRT and ONNX Runtime take), shifted ones per channel below.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import ConfigDict, Field

from dfqc.compiler.contracts import CalibSet, Progress, QuantizerSupplies, QuantState, silent
from dfqc.compiler.graph import Graph
from dfqc.compiler.quantize import reconstruct
from dfqc.compiler.spec import Plan


class Options(reconstruct.Options):
    """Published settings of Genie-M."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounding: Literal["soft", "flex"] = "soft"
    skip_wide: bool = False
    relative: bool = False
    tune_iterations: int = Field(0, ge=0)
    least_layers: int = Field(1, ge=1)
    step_share: float = Field(0.0, ge=0, lt=1)
    start: Literal["closed", "nearest"] = "nearest"
    iterations: int = Field(20_000, ge=1, description="per block")
    inputs: Literal["quantized", "float", "mixed"] = "mixed"
    drop: float = Field(0.5, ge=0, lt=1)
    round_weight: float = Field(1.0, ge=0)
    lr_rounding: float = Field(1e-3, ge=0)
    lr_weight_scale: float = Field(1e-4, ge=0)
    lr_act_scale: float = Field(4e-5, ge=0)
    lr_bias: float = Field(0.0, ge=0)


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


def quantize(
    graph: Graph,
    calib: CalibSet,
    plan: Plan,
    options: Options,
    *,
    rng: torch.Generator,
    device: torch.device,
    progress: Progress = silent,
    supplies: QuantizerSupplies = QuantizerSupplies(),
) -> QuantState:
    """Run the reconstruction loop with these settings; see `reconstruct.quantize`."""
    return reconstruct.reconstruct(
        "genie-m", graph, calib, plan, options, rng, device, progress, supplies
    )
