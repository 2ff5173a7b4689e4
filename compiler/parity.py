"""Layer-wise parity: the simulation and the engine on the same images in, a report out.

Layers are compared one by one: the simulation reads the *engine's* codes as its input at every
quantizer, so that one layer's rounding difference is not blamed on the layers behind it. Both
sides round the same real number, in another order of float operations: a code may differ where
that number lies on a rounding boundary, and then by one. That is the tolerance: one step of the
tensor's own scale, on few of its values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from dfqc.compiler.contracts import Lowered, Progress, QuantState, Runner, silent
from dfqc.compiler.evaluate import MIN_AGREEMENT, agrees
from dfqc.compiler.graph import Graph
from dfqc.compiler.simulate import FakeQuantize, TorchRunner, quantizer_target, simulated

MAX_STEPS = 1  # of a tensor's own scale
MAX_SHARE = 0.02  # of a tensor's values; average pools of few codes tie most often
OUTPUT_TOLERANCE = 1e-4  # of the largest output, when both sides read the same codes


@dataclass(frozen=True)
class LayerParity:
    """Comparison of one quantizer's codes when both sides read the same inputs."""

    quantizer: str
    scale: float
    max_steps: int
    share: float  # of the codes that differ

    @property
    def passed(self) -> bool:
        """Report whether the difference is rounding on a boundary."""
        return self.max_steps <= MAX_STEPS and self.share <= MAX_SHARE


@dataclass(frozen=True)
class ParityReport:
    """Everything the manifest and the report say about simulation against engine."""

    max_abs: float  # largest difference of the outputs, networks run on their own
    argmax_agreement: float  # percent of the images, or of their positions
    images: int
    output_error: float  # largest output difference relative to its size, inputs shared
    layers: tuple[LayerParity, ...]
    layer_images: int

    @property
    def worst_layer(self) -> str:
        """Name of the quantizer with the largest share of different codes."""
        if not self.layers:
            return ""
        return max(self.layers, key=lambda row: (row.max_steps, row.share)).quantizer

    @property
    def passed(self) -> bool:
        """Report whether simulation and engine are the same network."""
        return (
            all(row.passed for row in self.layers)
            and self.output_error <= OUTPUT_TOLERANCE
            and agrees(self.argmax_agreement, self.images)
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        return {
            "max_abs": self.max_abs,
            "argmax_agreement": self.argmax_agreement,
            "worst_layer": self.worst_layer,
            "images": self.images,
            "output_error": self.output_error,
            "layer_images": self.layer_images,
            "tolerance": {
                "steps": MAX_STEPS,
                "share": MAX_SHARE,
                "output": OUTPUT_TOLERANCE,
                "argmax_agreement": MIN_AGREEMENT,
            },
            "layers": [dataclasses.asdict(row) | {"passed": row.passed} for row in self.layers],
            "passed": self.passed,
        }


def check_parity(
    graph: Graph,
    state: QuantState,
    lowered: Lowered,
    runner: Runner,
    images: Tensor,
    *,
    layer_images: int = 16,
    batch: int = 32,
    progress: Progress = silent,
) -> ParityReport:
    """Compare the simulation with an opened engine on `images` (n, c, h, w).

    Args:
        graph: folded graph.
        state: what was lowered.
        lowered: the name map of the model that `runner` runs.
        runner: the engine.
        images: normalized float32 images.
        layer_images: how many of them are compared layer by layer.
        batch: images per call.
        progress: called per batch.
    """
    simulation = simulated(graph, state)
    few = images[:layer_images].contiguous()
    rows, output_error = _compare_layers(simulation, state, lowered, runner, few)
    reference, largest, equal = TorchRunner(simulation), 0.0, 0.0
    for start in range(0, len(images), batch):
        chunk = images[start : start + batch].contiguous().numpy()
        ours, theirs = reference.infer(chunk), runner.infer(chunk)
        largest = max(largest, float(np.abs(ours - theirs).max()))
        # A mean, because an output may have positions behind its classes.
        equal += len(chunk) * float((ours.argmax(1) == theirs.argmax(1)).mean())
        progress(start + len(chunk), len(images), "parity")
    agreement = 100.0 * equal / max(len(images), 1)
    return ParityReport(largest, agreement, len(images), output_error, rows, len(few))


def _compare_layers(
    simulation: Graph, state: QuantState, lowered: Lowered, runner: Runner, images: Tensor
) -> tuple[tuple[LayerParity, ...], float]:
    engine = runner.codes(images.numpy(), list(lowered.taps.values()))
    codes = {name: engine[value] for name, value in lowered.taps.items()}
    walker = _ForcedWalker(simulation.module, codes)
    with torch.inference_mode():
        output = walker.run(images)
    expected = torch.from_numpy(np.ascontiguousarray(engine["output"]))
    size = expected.abs().max().clamp_min(1e-12)
    error = float((output - expected).abs().max() / size)
    rows = tuple(
        LayerParity(name, state.acts[name].scale, *walker.differences[name])
        for name in state.plan.quantizers
        if name in lowered.taps
    )
    return rows, error


class _ForcedWalker(fx.Interpreter):
    """Runs the simulation, comparing each quantizer with the engine and going on with its codes."""

    def __init__(self, module: fx.GraphModule, codes: Mapping[str, np.ndarray]) -> None:
        super().__init__(module)
        self.codes = {quantizer_target(name): (name, value) for name, value in codes.items()}
        self.differences: dict[str, tuple[int, float]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, FakeQuantize) or target not in self.codes:
            return super().call_module(target, args, kwargs)
        name, engine = self.codes[target]
        ours = module.codes(args[0])
        theirs = torch.from_numpy(engine.astype(np.float32)).reshape(ours.shape)
        distance = (ours - theirs).abs()
        share = float((distance > 0).double().mean())
        self.differences[name] = (int(distance.max()), share)
        return (theirs - module.zero_point) * module.scale
