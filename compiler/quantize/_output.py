"""Losses that follow a unit's output to the end of the network: float tail in, loss terms out.

PD-Quant's KL between the outputs (Liu et al. 2023) and BRECQ's Fisher weighting (Li et al. 2021,
eq. 10 with the gradient of that KL), both with the rest of the network in float.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from dfqc.compiler.quantize._caches import Budget, make_rows
from dfqc.compiler.quantize._stream import Rows
from dfqc.compiler.quantize._train import UnitData
from dfqc.compiler.quantize._units import Unit
from dfqc.compiler.quantize._walker import Network

if TYPE_CHECKING:
    from dfqc.compiler.quantize._passes import Run


@dataclass(frozen=True)
class Tail:
    """What a unit's loss gets from the rest of the network."""

    weighting: Rows | None
    penalty: Callable[[Tensor, Tensor], Tensor] | None


def make_tail(
    run: Run,
    unit: Unit,
    network: Network,
    region: fx.GraphModule,
    data: UnitData,
    budget: Budget,
) -> Tail:
    """Return the loss terms that the options ask for."""
    options = run.options
    result = next(n for n in run.graph.module.graph.nodes if n.op == "output").args[0]
    assert isinstance(result, fx.Node)
    if not (options.output_weight or options.weighting == "fisher"):
        return Tail(None, None)
    tail: nn.Module = nn.Identity()  # behind the last unit
    if unit.exit != result.name:
        tail = network.float_region(unit.exit, result.name)
    weighting = None
    if options.weighting == "fisher":
        weighting = _fisher_weights(region, tail, data, budget, options.pass_size, run.device)
    penalty = None
    if options.output_weight:
        penalty = _output_penalty(
            tail, data.target, options.output_weight, options.output_temperature, run.device
        )
    return Tail(weighting, penalty)


def _output_penalty(
    tail: nn.Module, target: Rows, weight: float, temperature: float, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return weight * KL(float output || output behind the unit), at a temperature."""

    def penalty(output: Tensor, index: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = tail(target.read(index, device))
        found = tail(output)
        return weight * divergence(wanted, found, temperature)

    return penalty


def divergence(wanted: Tensor, found: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean KL(softmax(wanted / T) || softmax(found / T)), classes on axis 1.

    Of an output with one number per image, the mean squared difference.
    """
    if wanted.dim() < 2 or wanted.shape[1] < 2:
        return (found - wanted).square().mean()
    exact = (wanted / temperature).log_softmax(1)
    terms = exact.exp() * (exact - (found / temperature).log_softmax(1))
    return terms.sum(1).mean()


def _fisher_weights(
    region: fx.GraphModule,
    tail: nn.Module,
    data: UnitData,
    budget: Budget,
    batch: int,
    device: torch.device,
) -> Rows:
    """Return |dKL/d(unit's output)| + 1 of every image, in half precision."""

    def weights(rows: slice) -> Tensor:
        with torch.no_grad():
            output = region(data.quantized.read(rows, device))
            wanted = tail(data.target.read(rows, device))
        output = output.detach().requires_grad_()
        with torch.enable_grad():
            loss = len(output) * divergence(wanted, tail(output))
        slope: Tensor = torch.autograd.grad(loss, output)[0]
        return slope.abs() + 1

    return make_rows(budget, weights, len(data.quantized), batch=batch, dtype=torch.float16)
