"""Steps and biases of a whole network, tuned together: a quantized state in, a better one out.

Units are fitted one by one to inner tensors; what is left over adds up until the output. With all
codes frozen, the scales of weights and activations and the biases are few numbers, and can follow
the divergence of the outputs (Hinton et al. 2015, eq. 1-2) without fitting single images.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfqc.compiler.contracts import Progress, QuantState
from dfqc.compiler.quantize import _output
from dfqc.compiler.quantize._layers import UnitLayers
from dfqc.compiler.quantize._learned import LearnedGrid
from dfqc.compiler.quantize._rounding import FlexRounding
from dfqc.compiler.quantize._stream import Stream
from dfqc.compiler.quantize._train import TrainOptions, UnitData, train_unit
from dfqc.compiler.quantize._units import UnitState
from dfqc.compiler.quantize._walker import Network
from dfqc.compiler.spec import MAX_BITS

if TYPE_CHECKING:
    from dfqc.compiler.quantize._passes import Run

_SEED = 77_003  # after those of all units


def tune(
    run: Run,
    state: QuantState,
    stream: Stream,
    *,
    seconds: float | None,
    limit: int,
    progress: Progress,
) -> tuple[UnitState, dict[str, Any]]:
    """Return the tuned scales and biases with the codes they belong to, and notes on how.

    Args:
        run: the network and the options of the reconstruction.
        state: the assembled units.
        stream: the calibration images, at the network's input.
        seconds: time for it.
        limit: bytes that a batch's activations may take.
        progress: called per iteration.
    """
    options = run.options
    network = Network(run.graph, state, run.device, run.targets, relative=True)
    entry, exit = network.ends()
    names = tuple(n for n, layer in state.plan.layers.items() if layer.weight is not None)
    layers = UnitLayers.put(
        *(network, names, FlexRounding), method=options.weights, from_codes=True, relative=True
    )
    region = network.region(entry, exit)
    target = stream.rows(run.targets.region(entry, exit), stream.exact)
    train = TrainOptions.model_validate(
        {
            "rounding": "flex",
            "iterations": options.tune_iterations,
            "batch_size": options.batch_size,
            "inputs": "quantized",
            "drop": 0.0,
            "error_weight": 0.0,
            "round_weight": 0.0,
            "lr_rounding": options.tune_rounding,
            "lr_weight_scale": options.tune_rate,
            "lr_act_scale": options.tune_rate,
            "lr_bias": options.tune_rate,
            "relative": True,
        }
    )

    def divergence(output: Tensor, index: Tensor) -> Tensor:
        wanted = target.read(index, run.device)
        return _output.divergence(wanted, output, options.tune_temperature)

    trained = train_unit(
        *(region, layers.trained(), _narrow(network)),
        UnitData(stream.exact, stream.exact, target),
        train,
        rng=torch.Generator(run.device).manual_seed(run.seed + _SEED),
        device=run.device,
        seconds=seconds,
        progress=progress,
        penalty=divergence,
        limit=limit,
    )
    target.free()
    return layers.state(list(state.plan.quantizers)), dataclasses.asdict(trained)


def _narrow(network: Network) -> list[LearnedGrid]:
    """Return the grids below 8 bits, each once."""
    return [g for g in dict.fromkeys(network.grids.values()) if g.scheme.bits < MAX_BITS]
