"""Layers of a network whose weights are learned: names in, learned modules in their place out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dfqc.compiler import affine
from dfqc.compiler.contracts import WeightGrid
from dfqc.compiler.quantize import rtn
from dfqc.compiler.quantize._rounding import (
    FlexRounding,
    Layer,
    LearnedRounding,
    SoftRounding,
    Units,
)
from dfqc.compiler.quantize._units import UnitState
from dfqc.compiler.quantize._walker import Network
from dfqc.compiler.spec import LayerPlan

Kind = type[SoftRounding] | type[FlexRounding]


@dataclass(frozen=True)
class UnitLayers:
    """The learned layers of a unit, by module path, in the network they were put into."""

    network: Network
    layers: Mapping[str, LearnedRounding]

    @staticmethod
    def put(
        network: Network,
        names: Sequence[str],
        kind: Kind,
        *,
        method: str,
        from_codes: bool,
        relative: bool,
    ) -> UnitLayers:
        """Put learned modules into `network` for the named layers.

        Args:
            network: its state gives grids, biases and codes to begin with.
            names: module paths.
            kind: how rounding is learned.
            method: range estimator of the weights, which decides where a shifted grid lies.
            from_codes: begin at the state's codes and not at the nearest ones.
            relative: learn scales and biases as parts of their own size.
        """
        made = {}
        for name in names:
            made[name] = _make(network, name, kind, method, from_codes, relative)
            network.put(name, made[name])
        return UnitLayers(network, made)

    def trained(self) -> list[LearnedRounding]:
        """Return the modules."""
        return list(self.layers.values())

    def state(self, acts: Sequence[str]) -> UnitState:
        """Return what was learned so far, with the named activation grids."""
        for name, learned in self.layers.items():
            _make_room(self.network, name, learned)
        biases = {name: learned.bias for name, learned in self.layers.items()}
        return UnitState(
            {name: learned.quantized() for name, learned in self.layers.items()},
            {n: b.detach().cpu().clone() for n, b in biases.items() if b is not None},
            {name: self.network.grids[name].qparams() for name in acts},
        )


def _make(
    network: Network, name: str, kind: Kind, method: str, from_codes: bool, relative: bool
) -> LearnedRounding:
    layer, device = network.plan.layers[name], network.device
    module, bias, least = network.original(name), network.state.biases.get(name), None
    if bias is not None:
        # A clone: corrected biases may come out of inference mode.
        module.bias = torch.nn.Parameter(bias.to(device).clone())
    if bias is not None and layer.input is not None:
        least = rtn.smallest_weight_scale(bias, network.grids[layer.input].qparams().scale)
    grid = network.start_grid(name, network.state, method)
    start = network.state.weights[name].codes.to(device) if from_codes else None
    units = _units(module, grid, network, layer) if relative else None
    return kind(module, grid, least, start, units)


def _make_room(network: Network, name: str, learned: LearnedRounding) -> None:
    """Raise scales where the learned bias would leave the int32 grid of the learned steps."""
    source, bias = network.plan.layers[name].input, learned.bias
    if source is not None and bias is not None:
        least = rtn.smallest_weight_scale(bias.detach(), network.grids[source].qparams().scale)
        learned.least = torch.maximum(learned.least, least)
        learned.hold_scale()


def _units(module: Layer, grid: WeightGrid, network: Network, layer: LayerPlan) -> Units:
    """Return what scales and biases of a layer are compared with while they are learned.

    A bias with what the inputs move the output by: their range times the weight's norm.
    """
    spread = 1.0
    if layer.input is not None:
        scheme = network.plan.quantizers[layer.input].scheme
        spread = network.grids[layer.input].qparams().scale * scheme.levels / 4
    norm = module.weight.detach().flatten(1).norm(dim=1).cpu()
    return Units(grid.scale, (norm * spread).clamp_min(affine.SMALLEST_SCALE))
