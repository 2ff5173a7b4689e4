"""A whole network that is trained on its grids: a folded graph and a start in, a `QuantState` out.

What it computes in every pass is what the simulation of its state computes. Batch norms are folded
into the layers before this, and so are frozen by construction.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, fx, nn

from dfqc.compiler import affine
from dfqc.compiler.contracts import QuantState, WeightGrid
from dfqc.compiler.graph import Graph, blocks, copy_graph
from dfqc.compiler.quantize._latent import ActGrid, LatentGrid, LatentWeight, MinMaxWeight, Tied
from dfqc.compiler.quantize._ranges import weight_grid
from dfqc.compiler.quantize._rounding import Layer, Units
from dfqc.compiler.simulate import insert_quantizers
from dfqc.compiler.spec import MAX_BITS, LayerPlan, QScheme


class StudentOptions(BaseModel):
    """How a student's weights and activations come to their grids."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_grid: Literal["learned", "minmax"] = Field(
        "learned", description="steps of weights: learned (LSQ), or spanning the weight as it is"
    )
    act_grid: ActGrid = Field(
        "learned", description="steps of activations: learned, as they begin, or following a mean"
    )
    latent: Literal["float", "codes"] = Field(
        "codes", description="begin at the float weights, or at those nearest that give the codes"
    )
    per_tensor: bool = Field(
        False, description="one step per weight, beginning at the float weights, and not one each"
    )
    relative: bool = Field(
        False, description="what is learned are multiples of steps, biases those of their layer"
    )


class Student(nn.Module):
    """The quantized network of `graph`, every planned weight, step and bias trainable.

    In eval mode or not, it computes the same; without gradients it computes what
    `simulate.simulated(graph, student.state(), integer=False)` does.

    Args:
        graph: folded; it is copied.
        state: what to begin with: plan, codes, scales, biases, activation grids.
        options: kinds of grids.
        device: where it runs.
        exits: nodes whose outputs `features` returns; None: the ends of the graph's blocks.
    """

    def __init__(
        self,
        graph: Graph,
        state: QuantState,
        options: StudentOptions,
        *,
        device: torch.device,
        exits: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.start, self.options, self.plan, self.device = state, options, state.plan, device
        self.exits = tuple(block.exit for block in blocks(graph)) if exits is None else tuple(exits)
        self.network = copy_graph(graph).module.to(device)
        self.network.requires_grad_(False)
        self.grids: dict[str, LatentGrid] = {}
        insert_quantizers(self.network, self.plan, self._make_grid)
        self.layers = {
            layer.name: self._make_layer(layer)
            for layer in self.plan.layers.values()
            if layer.weight is not None
        }
        for name, module in self.layers.items():
            self.network.set_submodule(name, module)
        self._wide = (with_features(self.network, self.exits),)  # shares all modules
        for grid in self.narrow_grids():
            grid.ratio.requires_grad_(options.act_grid == "learned")
        for module in self.layers.values():
            module.scale_ratio.requires_grad_(options.weight_grid == "learned")
        self.hold()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images (n, c, h, w)."""
        logits: Tensor = self.network(x)
        return logits

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the logits and the outputs of the blocks, before any grid behind them."""
        (wide,) = self._wide
        found: tuple[Tensor, tuple[Tensor, ...]] = wide(x)
        return found

    def narrow_grids(self) -> list[LatentGrid]:
        """Return the activation grids that learn or follow, each once.

        Learned ones have fewer than 8 bits: wider ones lose nothing by calibration. The image's
        grid covers every valid pixel, and stays.
        """
        inputs = {n.name for n in self.network.graph.nodes if n.op == "placeholder"}
        quantizers = self.plan.quantizers
        own = [name for name, q in quantizers.items() if q.tied is None and q.source not in inputs]
        grids = [self.grids[name] for name in own]
        if self.options.act_grid == "learned":
            return [grid for grid in grids if grid.scheme.bits < MAX_BITS]
        return grids

    def parameter_groups(
        self,
        *,
        weights: float,
        weight_scales: float = 0.0,
        act_scales: float = 0.0,
        biases: float = 0.0,
        decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Return an optimizer's groups by name; a rate of 0 leaves a group out.

        Args:
            weights: rate of the latent weights.
            weight_scales: rate of the steps of weights, if they are learned.
            act_scales: rate of the steps of activations, if they are learned.
            biases: rate of the biases.
            decay: weight decay of the latent weights; nothing else decays.
        """
        layers = list(self.layers.values())
        members: tuple[tuple[str, float, list[nn.Parameter | None]], ...] = (
            ("weights", weights, [layer.latent for layer in layers]),
            ("weight_scales", weight_scales, [layer.scale_ratio for layer in layers]),
            ("act_scales", act_scales, [grid.ratio for grid in self.narrow_grids()]),
            ("biases", biases, [layer.bias_ratio for layer in layers]),
        )
        groups: list[dict[str, Any]] = []
        for name, rate, parameters in members:
            own = [p for p in parameters if p is not None and p.requires_grad]
            if rate > 0 and own:
                share = decay if name == "weights" else 0.0
                groups.append({"name": name, "params": own, "lr": rate, "weight_decay": share})
        return groups

    def observe(self, on: bool) -> None:
        """Switch on or off that activation grids follow what they see (`act_grid="ema"`)."""
        for grid in self.narrow_grids():
            grid.observe(on)

    def hold(self) -> None:
        """Keep all scales positive; after every step of an optimizer."""
        for layer in self.layers.values():
            layer.hold_scale()
        if self.options.act_grid == "learned":
            for grid in self.narrow_grids():
                grid.hold_scale()

    def state(self) -> QuantState:
        """Return what the student computes, as it is exported."""
        for layer in self.layers.values():
            layer.make_room()
        biases = {name: layer.bias for name, layer in self.layers.items()}
        acts = {name: grid.qparams() for name, grid in self.grids.items()}
        return dataclasses.replace(
            self.start,
            weights={name: layer.quantized() for name, layer in self.layers.items()},
            biases=dict(self.start.biases)
            | {n: b.detach().float().cpu().clone() for n, b in biases.items() if b is not None},
            acts={name: acts[name] for name in self.plan.quantizers},
        )

    def snapshot(self) -> dict[str, Tensor]:
        """Return everything that training changes, by name, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._changing().items()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Take back what `snapshot` returned."""
        with torch.no_grad():
            for name, value in self._changing().items():
                value.copy_(snapshot[name])
        for grid in self.grids.values():
            grid.settle()

    def _changing(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            found |= {f"weight/{name}": layer.latent, f"scale/{name}": layer.scale_ratio}
            found[f"least/{name}"] = layer.least
            if layer.bias_ratio is not None:
                found[f"bias/{name}"] = layer.bias_ratio
        for name, grid in self.grids.items():
            if self.plan.quantizers[name].tied is None:
                found |= {f"act/{name}": grid.ratio, f"zero/{name}": grid.zero}
                found[f"bounds/{name}"] = grid.bounds
        return found

    def _make_grid(self, quantizer: Any) -> nn.Module:
        if quantizer.tied is not None:
            self.grids[quantizer.name] = self.grids[quantizer.tied]
            return Tied(self.grids[quantizer.tied])
        grid = LatentGrid(
            *(self.start.acts[quantizer.name], quantizer.scheme, self.device),
            kind=self.options.act_grid,
            relative=self.options.relative,
        )
        self.grids[quantizer.name] = grid
        return grid

    def _make_layer(self, layer: LayerPlan) -> LatentWeight:
        """Return the trainable module of one layer."""
        module = copy.deepcopy(self.network.get_submodule(layer.name))
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        assert layer.weight is not None
        bias = self.start.biases.get(layer.name)
        if bias is not None:  # a clone: corrected biases may come out of inference mode
            module.bias = nn.Parameter(bias.to(self.device).clone())
        source = self.grids[layer.input] if layer.input is not None else None
        single = self.options.per_tensor or layer.weight.axis is None
        minmax = self.options.weight_grid == "minmax"
        grid = _start_grid(self.start, layer.name, module, layer.weight, single=single)
        units = self._units(module, grid, source)
        made = (
            MinMaxWeight(module, layer.weight, units, source, single=single)
            if minmax
            else LatentWeight(module, grid, units, source)
        )
        if self.options.latent == "codes" and not single:
            made.start_at(self.start.weights[layer.name].codes)
        return made.to(self.device)

    def _units(self, module: Layer, grid: WeightGrid, source: LatentGrid | None) -> Units:
        """Return what scales and biases are learned as multiples of; ones if not `relative`.

        For a bias, that is what the inputs move the output by: their range times the weight's norm.
        """
        channels = torch.ones(len(module.weight))
        if not self.options.relative:
            return Units(torch.ones_like(grid.scale), channels)
        spread = 1.0 if source is None else source.qparams().scale * source.scheme.levels / 4
        norm = module.weight.detach().flatten(1).norm(dim=1).cpu()
        return Units(grid.scale, (norm * spread).clamp_min(affine.SMALLEST_SCALE))


def with_features(module: fx.GraphModule, exits: Sequence[str]) -> fx.GraphModule:
    """Return a module that computes (output, outputs of the named nodes) on shared layers."""
    copied = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            inner = tuple(made[n] for n in made if n.name in exits)
            copied.output((made[node.args[0]], inner))
        else:
            made[node] = copied.node_copy(node, lambda n: made[n])
    return fx.GraphModule(module, copied)


def _start_grid(
    state: QuantState, name: str, module: Layer, scheme: QScheme, *, single: bool
) -> WeightGrid:
    """Return the grid of a layer's weight: the scales of the state, and where its codes lie."""
    weight = module.weight.detach().cpu()
    if single:
        flat = weight.reshape(1, -1)
        return weight_grid(flat, dataclasses.replace(scheme, axis=0), "mse")
    stored = state.weights[name]
    grid = weight_grid(weight, scheme, "mse")
    rows = stored.codes.float().flatten(1)
    low = torch.maximum(grid.low, rows.amax(1) - (grid.levels - 1))
    # A clone: what came out of inference mode cannot be learned from.
    return WeightGrid(stored.scale.clone(), torch.minimum(low, rows.amin(1)), grid.levels)
