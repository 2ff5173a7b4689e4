"""AdaRound (Nagel et al. 2020): rounding learned layer by layer; steps stay as calibrated.

Asymmetric reconstruction (eq. 25): each layer, with its activation function, reads what the
quantized layers before it give and is fitted to its float output.
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
    """Published settings of AdaRound."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["block", "layer"] = "layer"
    rounding: Literal["soft", "flex"] = "soft"
    skip_wide: bool = False
    relative: bool = False
    tune_iterations: int = Field(0, ge=0)
    least_layers: int = Field(1, ge=1)
    step_share: float = Field(0.0, ge=0, lt=1)
    start: Literal["closed", "nearest"] = "nearest"
    iterations: int = Field(10_000, ge=1, description="per layer")
    inputs: Literal["quantized", "float", "mixed"] = "quantized"
    drop: float = Field(0.0, ge=0, lt=1)
    round_weight: float = Field(0.01, ge=0)
    lr_weight_scale: float = Field(0.0, ge=0)
    lr_act_scale: float = Field(0.0, ge=0)
    lr_bias: float = Field(0.0, ge=0)
    lr_rounding: float = Field(1e-3, ge=0)


# Fewer iterations at higher rates; the schedules keep their proportions.
PRESETS: dict[str, dict[str, object]] = {
    "quick": {"iterations": 250, "lr_rounding": 1e-2},
    "standard": {"iterations": 1500, "lr_rounding": 3e-3},
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
        "adaround", graph, calib, plan, options, rng, device, progress, supplies
    )
