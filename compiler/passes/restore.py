"""Channels to keep in; the smaller graph out, in which users make up for what was removed.

Layer by layer in the order they run, without data: what a removed channel told its users is
rebuilt from the channels that stay, then the lost mean and variance of every output are put back
into the batch norm (or the bias) behind. The second moments come from weights and batch norms.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from dfqc.compiler.channels import Group, Use, find_groups, remove
from dfqc.compiler.covariance import InputModel
from dfqc.compiler.graph import Graph, copy_graph, layer_nodes, node_shapes
from dfqc.compiler.moments import Moments, input_moments
from dfqc.compiler.passes import _restoration as forms
from dfqc.compiler.passes._chains import Chain, Rows, find_chain, follow_chain
from dfqc.compiler.passes._outputs import (
    Fitted,
    Outputs,
    find_filters,
    find_outputs,
    predict_mean,
    predict_variance,
)
from dfqc.compiler.passes._patches import PatchMoments, gather_patches
from dfqc.compiler.passes._reads import Read, split_reads

log = logging.getLogger(__name__)

SCALE_RIDGE = 1e-6  # keeps channels that were rounded to zero solvable

# round_layer(path, layer, outputs): the rounded weight that the changed network goes on with,
# None to leave it as it is.
# What is done about producers that were only rounded: nothing, one factor per channel, or a fit of
# the users as for pruned channels.
Compensation: TypeAlias = Literal["none", "scales", "users"]
RoundLayer: TypeAlias = Callable[[str, nn.Conv2d | nn.Linear, Outputs], Tensor | None]


class Options(BaseModel):
    """Options of the restoration.

    `patches` fits every user on what its whole kernel sees; `moments` fits one factor per pair of
    channels, which is what `patches` does where its matrix would be larger than `largest`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["none", "merging", "lbyl", "weights", "moments", "patches"] = "patches"
    mean_fix: bool = Field(True, description="put the lost mean of an output back")
    variance_fix: bool = Field(True, description="give outputs the variance they had")
    inputs: InputModel = "spatial"
    ridge: float = Field(0.03, gt=0, description="of the moments, in parts of the mean variance")
    nonnegative: bool = Field(False, description="moments: no negative factors")
    bias_weight: float = Field(0.01, ge=0, description="weights: of the biases (alpha 1)")
    filter_ridge: float = Field(0.1, gt=0, description="weights: relative ridge (alpha 2)")
    lbyl_norm: float = Field(1e-5, ge=0, description="lbyl: lambda 1")
    lbyl_ridge: float = Field(1e-3, gt=0, description="lbyl: lambda 2")
    largest: int = Field(5000, ge=1, description="side of the largest matrix to build")


def restore(graph: Graph, keep: Mapping[str, Tensor], options: Options) -> Graph:
    """Return the graph without the channels that `keep` leaves out, its users restored.

    Args:
        graph: unfolded (batch norms say what the activations are like), left as it is.
        keep: sorted int64 indices of the channels that stay, by name of the group.
        options: which form, and which fixes.
    """
    return remove(Restorer(graph, keep, options).run(), keep)


class Restorer:
    """Changes a copy of a graph at its full size; what was removed is zero there."""

    def __init__(
        self,
        graph: Graph,
        keep: Mapping[str, Tensor],
        options: Options,
        *,
        round_layer: RoundLayer | None = None,
        compensate: Compensation = "none",
    ) -> None:
        """Prepare the copy.

        Args:
            graph: the original.
            keep: as for `restore`.
            options: as for `restore`.
            round_layer: decides the weight of each layer once it is restored.
            compensate: what users do about channels that were rounded.
        """
        self.original, self.work = graph, copy_graph(graph)
        self.keep, self.options = keep, options
        self.round_layer, self.compensate = round_layer, compensate
        # The original with the rounding errors of the layers done so far. What pruning changed is
        # left out: under an input model of independent channels a restored weight would look
        # unlike the original, although that is what it restores.
        self.noisy = graph if round_layer is None else copy_graph(graph)
        self.inputs, self.shapes = input_moments(graph), node_shapes(graph)
        self.uses: dict[str, list[tuple[Group, Use]]] = defaultdict(list)
        self.skipped: list[str] = []
        self.chains: dict[tuple[str, str], Chain | None] = {}
        for group in find_groups(graph):
            for use in group.users:
                self.uses[use.layer].append((group, use))

    @torch.no_grad()
    def run(self) -> Graph:
        """Change every layer in turn and return the copy."""
        for path in dict.fromkeys(path for path, _ in layer_nodes(self.original)):
            module = self.work.module.get_submodule(path)
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                self._change(path, module)
            elif any(group.name in self.keep for group, _ in self.uses[path]):
                self.skipped.append(path)
        if names := self.not_restored():
            log.warning(
                "restore: %d layers do not make up for the channels that they no longer read, "
                "because what lies between is not understood: %s",
                len(names),
                names,
            )
        return self.work

    def not_restored(self) -> list[str]:
        """Return the layers that `run` could not restore, or not with mean and variance; sorted."""
        return sorted(set(self.skipped))

    def _change(self, path: str, layer: nn.Conv2d | nn.Linear) -> None:
        exact = layer.weight.detach().cpu().double()
        maps = self.inputs.get(path)
        parts: list[Fitted] = []
        changed = exact.clone()
        for group, use in self.uses[path]:
            for read in split_reads(layer, group, use):
                self._change_part(changed, layer, group, use, read, parts)
        outputs = find_outputs(self.work, path)
        if not torch.equal(changed, exact):
            layer.weight = _parameter(changed, layer.weight)
            self._fix(path, layer, exact, changed, maps, outputs, parts)
        if self.round_layer is None:
            return
        rounded = self.round_layer(path, layer, outputs)
        if rounded is not None:
            restored = layer.weight.detach().cpu().double()
            layer.weight = _parameter(rounded, layer.weight)
            error = rounded.cpu().double() - restored
            noisy = self.noisy.module.get_submodule(path)
            noisy.weight = _parameter(exact + error, layer.weight)
            self._fix(path, layer, restored, restored + error, maps, outputs, [])

    def _change_part(
        self,
        weight: Tensor,
        layer: nn.Conv2d | nn.Linear,
        group: Group,
        use: Use,
        read: Read,
        parts: list[Fitted],
    ) -> None:
        """Restore part of the weight in place; what multiplies removed channels becomes zero."""
        keep = read.kept(self.keep.get(group.name, read.channels))
        whole = len(keep) == len(read.channels)
        if whole and self.compensate == "none":
            return
        block = read.take(weight)
        fits = not whole or self.compensate == "users"
        moments = self.patch_moments(layer, group, use, read, keep) if fits else None
        if moments is None and not whole and self.options.method != "none":
            self.skipped.append(use.layer)
        new = torch.zeros_like(block)
        new[:, keep] = self._restored(block, group, read, keep, moments)
        if self.compensate == "scales" and len(group.producers) == 1:
            new *= self._scales(group.producers[0])[read.channels, None]
        if moments is not None:
            parts.append(Fitted(moments, read, keep))
        read.put(weight, new)

    def patch_moments(
        self,
        layer: nn.Conv2d | nn.Linear,
        group: Group,
        use: Use,
        read: Read,
        keep: Tensor,
    ) -> PatchMoments | None:
        """Return the second moments of channels as one part of the user reads them.

        None where the chain to the user mixes channels, or what enters it is not known. `keep`
        counts from the part's first channel.
        """
        chain = self._chain(group, use.layer)
        if chain is None or use.layer not in self.inputs:
            return None
        kept = read.channels[keep]
        changed = self._is_changed(chain, kept)
        rows: tuple[Rows, ...] = (Rows(self.original, read.channels),)
        if changed:
            rows += (Rows(self.noisy, kept),)
        signal = follow_chain(chain, rows, self.inputs[chain.producer], self.options.inputs)
        maps = self.inputs[use.layer]
        columns, axis = read.inputs(use), -1 if isinstance(layer, nn.Linear) else 1
        own = Moments(*(one.index_select(axis, columns) for one in (maps.mean, maps.var)))
        every = torch.arange(len(read.channels))
        order = torch.cat([every, keep]) if changed else every
        limit = self.options.largest
        found = gather_patches(layer, use.spread, signal, own, order, limit=limit)
        return PatchMoments(*found, split=len(read.channels), keep=None if changed else keep)

    def _scales(self, producer: str) -> Tensor:
        """Return one factor per channel that makes rounded filters most like the original ones."""
        exact = find_filters(self.original, producer)
        rounded = find_filters(self.noisy, producer)
        return forms.match_scales(exact, rounded, self.options.bias_weight, SCALE_RIDGE)

    def _chain(self, group: Group, user: str) -> Chain | None:
        if len(group.producers) != 1 or group.producers[0] not in self.inputs:
            return None
        producer = self.original.module.get_submodule(group.producers[0])
        if not isinstance(producer, (nn.Conv2d, nn.Linear)):
            return None
        ends = (group.producers[0], user)
        if ends not in self.chains:
            self.chains[ends] = find_chain(self.original, self.shapes, *ends)
        return self.chains[ends]

    def _is_changed(self, chain: Chain, keep: Tensor) -> bool:
        """Report whether the channels that stay are made by other weights than they were."""
        if self.noisy is self.original:
            return False
        calls = [
            n for n in zip(chain.nodes, chain.offsets, strict=True) if n[0].op == "call_module"
        ]
        paths = [(chain.producer, 0), *((str(node.target), offset) for node, offset in calls)]
        return any(
            not torch.equal(
                cast(Tensor, self.original.module.get_submodule(p).weight)[keep + offset],
                cast(Tensor, self.noisy.module.get_submodule(p).weight)[keep + offset],
            )
            for p, offset in paths
            if isinstance(self.original.module.get_submodule(p), (nn.Conv2d, nn.Linear))
        )

    def _restored(
        self,
        block: Tensor,
        group: Group,
        read: Read,
        keep: Tensor,
        moments: PatchMoments | None,
    ) -> Tensor:
        """Return what the kept channels are multiplied by, (outputs, kept, taps)."""
        options = self.options
        if moments is None or options.method == "none":
            return block[:, keep]
        if options.method == "patches" and moments.near is not None:
            return forms.fit_patches(block, moments, keep, options.ridge)
        if options.method in ("patches", "moments"):
            return forms.fit_channels(
                block, moments, keep, options.ridge, nonnegative=options.nonnegative
            )
        gone = torch.ones(block.shape[1], dtype=torch.bool).index_fill(0, keep, value=False)
        removed = gone.nonzero().flatten()
        filters = find_filters(self.original, group.producers[0]).pick(read.channels)
        if options.method == "merging":
            factors = forms.merge_neighbors(filters, keep, removed)
        elif options.method == "lbyl":
            factors = forms.regress_filters_lbyl(
                filters, keep, removed, options.lbyl_norm, options.lbyl_ridge
            )
        else:
            factors = forms.regress_filters(
                filters, keep, removed, options.bias_weight, options.filter_ridge
            )
        return forms.combine_channels(block, keep, removed, factors)

    def _fix(
        self,
        path: str,
        layer: nn.Conv2d | nn.Linear,
        before: Tensor,
        after: Tensor,
        maps: Moments | None,
        outputs: Outputs,
        parts: list[Fitted],
    ) -> None:
        """Give the outputs of a changed weight the mean and the variance that they had."""
        if maps is None:
            self.skipped.append(path)
            return
        if self.options.mean_fix:
            outputs.shift_mean(predict_mean(layer, after - before, maps))
        if self.options.variance_fix:
            wanted, found = predict_variance(layer, before, after, maps, parts)
            outputs.scale_variance(wanted, found)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like).contiguous(), requires_grad=False)
