"""AdaRound (Nagel et al. 2020): rounding learned layer by layer; steps stay as calibrated.

Asymmetric reconstruction (eq. 25): each layer, with its activation function, reads what the
quantized layers before it give and is fitted to its float output.

Unlike the paper, as all settings of the loop (see `reconstruct.Published`): the biases that it
starts from are corrected; a quarter of the images (some 256 of many) judges and is not trained on;
and by these, the start is kept for a layer, and for the network, where learning made it no better
(`keep_best`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dfqc.compiler.quantize import _check, reconstruct


class Options(reconstruct.Published):
    """Published settings of AdaRound."""

    unit: Literal["block", "layer"] = "layer"
    iterations: int = Field(10_000, ge=1, description="per layer")
    inputs: Literal["quantized", "float", "mixed"] = "quantized"
    drop: float = Field(0.0, ge=0, lt=1)
    round_weight: float = Field(0.01, ge=0)


# Fewer iterations at higher rates; the schedules keep their proportions.
PRESETS: dict[str, dict[str, object]] = {
    "quick": {"iterations": 250, "lr_rounding": 1e-2},
    "standard": {"iterations": 1500, "lr_rounding": 3e-3},
    "max": {},
}
count_passes, count_bytes = reconstruct.count_passes, reconstruct.count_bytes
quantize = reconstruct.named("adaround")
check_given = _check.check_given("adaround")
check_graph = _check.check_graph("adaround")
