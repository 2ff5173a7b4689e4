"""A recipe and a graph in; what is removed and set to zero, and how it is restored, out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from dfqc.compiler.errors import UsageError
from dfqc.compiler.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from dfqc.compiler.channels import Group
    from dfqc.compiler.graph import Graph
    from dfqc.compiler.passes.prune import Curve, Decision


def choose_channels(recipe: Recipe, graph: Graph) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the channels that stay, and what is said of the choice."""
    from dfqc.compiler.channels import find_groups

    decision = decide(recipe, graph)
    groups = {group.name: group for group in find_groups(graph)}
    if not decision.keep:
        raise UsageError(_why_nothing_goes(recipe, [groups[name] for name in decision.ratios]))
    rows = [
        {
            "name": name,
            "channels_before": groups[name].size,
            "channels_after": len(decision.keep.get(name, range(groups[name].size))),
            "layers": [*groups[name].producers, *groups[name].through],
        }
        for name in decision.ratios
    ]
    left = [{"name": name, "reason": reason} for name, reason in decision.left.items()]
    method = next((n for n in ("params", "macs") if getattr(recipe, n)), "layers")
    if recipe.prune:
        method = "uniform" if recipe.prune_by == "uniform" else "channels"
    return dict(decision.keep), {
        "method": method,
        "criterion": _criterion(recipe),
        "groups": rows,
        "left": left,
    }


def _why_nothing_goes(recipe: Recipe, groups: Sequence[Group]) -> str:
    for name in ("params", "macs"):
        if part := getattr(recipe, name):
            return (
                f"prune: no layer loses a channel: the model keeps --{name} {part:g} as it is; ask "
                "for less"
            )
    widest = max(group.size for group in groups)
    slices = max(group.slices for group in groups)
    grouped = f", equally many of each of up to {slices} groups of a convolution" * (slices > 1)
    return (
        f"prune: no layer loses a channel: the widest group that can be pruned has {widest}, and "
        f"kept channels are multiples of {recipe.channel_multiple}{grouped}; ask for more, or "
        "lower --channel-multiple"
    )


def decide(recipe: Recipe, graph: Graph, curves: Mapping[str, Curve] | None = None) -> Decision:
    """Return which channels go, perhaps none.

    `curves` (`rank_once`) spare the ranking where several amounts are tried on one graph.
    """
    from dfqc.compiler.passes import prune as pruning

    assert recipe.prune != "auto"  # the amount is chosen before
    by_error = _shared_by_error(recipe)
    options = pruning.Options(
        ratio=None if by_error else recipe.prune,
        channels=recipe.prune if recipe.prune_by == "error" else None,
        params=recipe.params,
        macs=recipe.macs,
        layers=recipe.pruned_layers,
        criterion=_criterion(recipe),
        multiple=recipe.channel_multiple,
        residual=recipe.prune_residual,
    )
    return pruning.choose(graph, options, curves)


def rank_once(recipe: Recipe, graph: Graph) -> dict[str, Curve]:
    """Return the order of all channels that may go to a budget, for several parts of them."""
    from dfqc.compiler.channels import find_groups
    from dfqc.compiler.passes import prune as pruning

    groups = [g for g in find_groups(graph) if g.prunable]
    groups = [g for g in groups if recipe.prune_residual or not g.residual]
    asked = recipe.model_copy(update={"prune_by": "error"})
    options = pruning.Options(criterion=_criterion(asked))
    return pruning.rank(graph, groups, options)


def _shared_by_error(recipe: Recipe) -> bool:
    return recipe.prune_by == "error" or bool(recipe.params or recipe.macs)


def _criterion(recipe: Recipe) -> Any:
    """Return what `auto` stands for: the restored error knows what a channel costs elsewhere."""
    if recipe.prune_criterion != "auto":
        return recipe.prune_criterion
    return "moments" if _shared_by_error(recipe) else "l2"


def make_sparse(recipe: Recipe, graph: Graph) -> tuple[Graph, Mapping[str, Tensor], dict[str, Any]]:
    """Set weights to zero; mean and variance of the outputs are put back unless asked not to."""
    from dfqc.compiler.passes import sparsity
    from dfqc.compiler.passes.fold import fold
    from dfqc.compiler.passes.restore import Restorer

    folded, asked = fold(graph), recipe.zeros
    if isinstance(asked, tuple):
        masks = sparsity.mask_n_of_m(folded, *asked)
    else:
        masks = sparsity.mask_smallest(folded, cast(float, asked))
    if not masks.keep:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in masks.left.items())
        raise UsageError(f"--sparsity {recipe.sparsity}: no layer can be made sparse: {reasons}")
    missed: list[str] = []
    if recipe.restore != "none":

        def zeroed(path: str, layer: Any, outputs: Any) -> Tensor | None:
            mask = masks.keep.get(path)
            return None if mask is None else layer.weight.detach().cpu().double() * mask

        restorer = Restorer(graph, {}, restoring(recipe), round_layer=zeroed)
        graph, missed = restorer.run(), restorer.not_restored()
    graph = sparsity.apply_masks(graph, masks.keep)
    total = sum(mask.numel() for mask in masks.keep.values())
    zeros = total - sum(int(mask.sum()) for mask in masks.keep.values())
    left = [{"name": name, "reason": reason} for name, reason in masks.left.items()]
    about = {"pattern": recipe.sparsity, "layers": list(masks.keep), "left": left}
    return graph, masks.keep, about | {"fraction": zeros / total, "not_restored": missed}


def restoring(recipe: Recipe) -> Any:
    """Return the options of the restoration: `none` leaves mean and variance wrong, too."""
    from dfqc.compiler.passes.restore import Options

    fixes = recipe.restore != "none"
    return Options.model_validate(
        {"method": recipe.restore, "mean_fix": fixes, "variance_fix": fixes}
    )


def quantizer_overrides(recipe: Recipe) -> dict[str, Any]:
    """Return the quantizer's options; what restores by itself does it in the way asked for."""
    given = dict(recipe.quantizer_option)
    if recipe.quantizer != "udfc":
        return given
    fixes = recipe.restore != "none"
    return {"method": recipe.restore, "mean_fix": fixes, "variance_fix": fixes} | given


def count_widths(before: Graph, after: Graph) -> dict[str, list[int]]:
    """Return every layer's output channels, before and after."""
    from dfqc.compiler.graph import layer_nodes

    def width(graph: Graph, path: str) -> int:
        layer = cast(Any, graph.module.get_submodule(path))
        return int(getattr(layer, "out_channels", None) or layer.out_features)

    paths = dict.fromkeys(path for path, _ in layer_nodes(before))
    return {path: [width(before, path), width(after, path)] for path in paths}


def find_kept_outputs(graph: Graph, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, per layer that lost outputs, which of the original's are left."""
    import torch
    from torch import nn

    from dfqc.compiler.channels import remove
    from dfqc.compiler.graph import copy_graph, layer_nodes

    numbered, found = copy_graph(graph), {}
    numbered.module.double()  # holds every number exactly
    layers = {
        path: layer
        for path, _ in layer_nodes(numbered)
        if isinstance(layer := numbered.module.get_submodule(path), (nn.Conv2d, nn.Linear))
    }
    for layer in layers.values():
        rows = torch.arange(len(layer.weight), dtype=torch.float64)
        rows = rows.view(-1, *[1] * (layer.weight.dim() - 1))
        layer.weight = nn.Parameter(rows.expand_as(layer.weight).clone(), requires_grad=False)
    cut = remove(numbered, keep)
    for path, layer in layers.items():
        left = cast(Any, cut.module.get_submodule(path)).weight.flatten(1)[:, 0].long()
        if len(left) < len(layer.weight):
            found[path] = left
    return found
