"""BRECQ (Li et al. 2021): rounding learned block by block, activation steps in a second pass.

As its released script runs it: squared error without Fisher weighting (an option here), the first
layer rounded to nearest, the second pass on float inputs. Its 8-bit input of the second layer is a
matter of the plan: `--layer NAME=w4a8`.
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
    """Published settings of BRECQ."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounding: Literal["soft", "flex"] = "soft"
    skip_wide: bool = False
    relative: bool = False
    tune_iterations: int = Field(0, ge=0)
    least_layers: int = Field(1, ge=1)
    step_share: float = Field(0.0, ge=0, lt=1)
    start: Literal["closed", "nearest"] = "nearest"
    order: Literal["joint", "weights-first"] = "weights-first"
    iterations: int = Field(20_000, ge=1, description="per block")
    inputs: Literal["quantized", "float", "mixed"] = "quantized"
    drop: float = Field(0.0, ge=0, lt=1)
    round_weight: float = Field(0.01, ge=0)
    skip_first: bool = True
    lr_rounding: float = Field(1e-3, ge=0)
    lr_weight_scale: float = Field(0.0, ge=0)
    lr_act_scale: float = Field(0.0, ge=0)
    lr_bias: float = Field(0.0, ge=0)


# Fewer iterations at higher rates; the schedules keep their proportions.
PRESETS: dict[str, dict[str, object]] = {
    "quick": {"iterations": 250, "act_iterations": 60, "lr_rounding": 1e-2},
    "standard": {"iterations": 1500, "act_iterations": 400, "lr_rounding": 3e-3},
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
        "brecq", graph, calib, plan, options, rng, device, progress, supplies
    )
