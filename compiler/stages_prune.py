"""What the stages that make a model smaller do: a context in, the smaller graph out.

`prune` decides and restores without data, before anything is planned; `refit` fits the weights to
the calibration images, once there are some. Where nothing is asked both hand on nothing, and the
graph of the stage before serves.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dfqc.compiler.contracts import Pruned
from dfqc.compiler.driver import Context
from dfqc.compiler.errors import UsageError
from dfqc.compiler.job import Job
from dfqc.compiler.recipe import Recipe
from dfqc.compiler.stages import device_of
from dfqc.compiler.storage import FLOAT_MODEL, load_json, save_json

if TYPE_CHECKING:
    from torch import Tensor

    from dfqc.compiler.graph import Graph

log = logging.getLogger("dfqc.prune")

PRUNING, REFIT = "pruning.json", "refit.json"
_MASKS, _GRAPH = "masks.safetensors", "graph"
_LIVE_BYTES = 1 << 30  # of the largest activation of both networks while weights are fitted
_LEAST_IMAGES = 32
_JUDGE_STEP = 4  # every fourth calibration image judges and is not fitted to
_LEAST = 1e-12  # a divergence that is nothing


@dataclass(frozen=True)
class Cut:
    """What the prune stage hands on. Without pruning: no graph, nothing kept, nothing to say.

    Attributes:
        graph: smaller and restored, with its batch norms; None: the graph stays as it was.
        keep: channels that stay, by group.
        masks: weights that stay, by layer of the smaller graph.
        about: what the report says.
    """

    graph: Graph | None = None
    keep: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refit:
    """What the refit stage hands on: the fitted graph if it was kept, and the choice."""

    graph: Graph | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def prune(context: Context) -> Cut:
    """Remove channels, restore what they did, set weights to zero: what the recipe asks for."""
    from dfqc.compiler.graph import count_macs, count_params
    from dfqc.compiler.passes.restore import restore

    recipe: Recipe = context.settings.recipe
    original: Graph = context.value("equalize")
    if not recipe.shrinks:
        return Cut()
    graph, keep, masks = original, {}, {}
    about: dict[str, Any] = {"restored_by": recipe.restore, "method": None, "criterion": None}
    about |= {"groups": [], "left": [], "sparsity": None}
    if recipe.prunes:
        keep, found = _choose(recipe, original)
        graph = restore(original, keep, restoring(recipe))
        about |= found
    if recipe.zeros is not None:
        graph, masks, about["sparsity"] = _make_sparse(recipe, graph)
    about |= {
        "params_before": count_params(original),
        "params_after": count_params(graph),
        "macs_before": count_macs(original),
        "macs_after": count_macs(graph),
        "layers": _widths(original, graph),
    }
    return Cut(graph, keep, masks, about)


def verify_prune(cut: Cut) -> None:
    """Check the graph against the canonical dialect."""
    from dfqc.compiler.graph import verify

    if cut.graph is not None:
        verify(cut.graph, "prune")


def save_prune(cut: Cut, folder: Path) -> None:
    """Write the decision, and the graph if it is another one."""
    from safetensors.torch import save_file

    keep = {name: indices.tolist() for name, indices in cut.keep.items()}
    save_json({"keep": keep, "about": dict(cut.about)}, folder / PRUNING)
    _save_graph(cut.graph, folder)
    if cut.masks:
        save_file({name: mask.contiguous() for name, mask in cut.masks.items()}, folder / _MASKS)


def load_prune(folder: Path) -> Cut:
    """Read what `save_prune` wrote."""
    import torch
    from safetensors.torch import load_file

    stored = load_json(folder / PRUNING)
    keep = {name: torch.tensor(indices) for name, indices in stored["keep"].items()}
    masks = load_file(folder / _MASKS) if (folder / _MASKS).is_file() else {}
    return Cut(_load_graph(folder), keep, masks, stored["about"])


def refit(context: Context) -> Refit:
    """Fit the weights that are left to the calibration images, and keep the better network."""
    from dfqc.compiler.graph import has_batch_norm
    from dfqc.compiler.passes import _least_squares
    from dfqc.compiler.passes.bias import divergence
    from dfqc.compiler.stages_calib import count_fitting

    recipe: Recipe = context.settings.recipe
    if not recipe.refits:
        return Refit()
    original, cut, device = context.value("equalize"), context.value("prune"), device_of(context)
    restored: Graph = cut.graph
    calib, held_out = context.value("synthesize").images, context.value("holdout")
    learning, own = _split(calib)
    count = _count_images(recipe, original)
    fitted = _least_squares.refit(
        original,
        restored,
        learning[:count],
        outputs=_kept_outputs(original, cut.keep),
        masks=cut.masks,
        device=device,
        progress=context.progress(),
    )
    fitting = count_fitting(held_out, batch_norm=has_batch_norm(original))
    judges = [own, held_out.images[:fitting], held_out.images[fitting:]]
    scores: dict[str, float] = {}
    for name, graph in (("restored", restored), ("refit", fitted)):
        found = [divergence(original, graph, part, device=device) for part in judges if len(part)]
        scores[name] = math.prod(max(one, _LEAST) ** (1 / len(found)) for one in found)
    kept = min(scores, key=lambda name: scores[name])
    log.info("refit: kept %s of %s", kept, scores)
    about = {"kept": kept, "scores": scores, "images": len(learning[:count])}
    return Refit(fitted if kept == "refit" else None, about)


def save_refit(value: Refit, folder: Path) -> None:
    """Write the choice, and the graph if it was kept."""
    save_json(dict(value.about), folder / REFIT)
    _save_graph(value.graph, folder)


def load_refit(folder: Path) -> Refit:
    """Read what `save_refit` wrote."""
    return Refit(_load_graph(folder), load_json(folder / REFIT))


def pruned_graph(context: Context) -> Graph:
    """Return the unfolded graph as it is planned: pruned, or as the equalize stage left it."""
    graph: Graph = context.value("prune").graph or context.value("equalize")
    return graph


def unfolded_graph(context: Context) -> Graph:
    """Return the unfolded graph that is quantized."""
    graph: Graph = context.value("refit").graph or pruned_graph(context)
    return graph


def unpruned(context: Context) -> Pruned | None:
    """Return what was pruned, for quantizers that restore by themselves."""
    keep = context.value("prune").keep
    return Pruned(context.value("equalize"), keep) if keep else None


def export_pruned(context: Context) -> bytes | None:
    """Write the smaller model in float, where channels went: tells pruning from rounding."""
    if not context.value("prune").keep:
        return None
    job: Job = context.settings
    model: bytes = job.backend.lower_float(context.value("fold"))
    return model


def save_pruned(model: bytes | None, folder: Path) -> None:
    """Write the model; nothing where no channels went."""
    save_json({"pruned": model is not None}, folder / PRUNING)
    if model is not None:
        (folder / FLOAT_MODEL).write_bytes(model)


def load_pruned(folder: Path) -> bytes | None:
    """Read it."""
    path = folder / FLOAT_MODEL
    return path.read_bytes() if path.is_file() else None


def restoring(recipe: Recipe) -> Any:
    """Return the options of the restoration: `none` leaves mean and variance wrong, too."""
    from dfqc.compiler.passes.restore import Options

    fixes = recipe.restore != "none"
    return Options(method=recipe.restore, mean_fix=fixes, variance_fix=fixes)


def quantizer_overrides(recipe: Recipe) -> dict[str, Any]:
    """Return the quantizer's options; what restores by itself does it in the way asked for."""
    given = dict(recipe.quantizer_option)
    if recipe.quantizer != "udfc":
        return given
    fixes = recipe.restore != "none"
    return {"method": recipe.restore, "mean_fix": fixes, "variance_fix": fixes} | given


def _choose(recipe: Recipe, graph: Graph) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the channels that stay, and what is said of the choice."""
    from dfqc.compiler.channels import find_groups
    from dfqc.compiler.passes import prune as pruning

    by_error = recipe.prune_by == "error" or recipe.params or recipe.macs
    criterion = recipe.prune_criterion
    if criterion == "auto":
        criterion = "restored" if by_error else "l2"
    options = pruning.Options(
        ratio=None if by_error else recipe.prune,
        channels=recipe.prune if recipe.prune_by == "error" else None,
        params=recipe.params,
        macs=recipe.macs,
        layers=recipe.pruned_layers,
        criterion=criterion,
        multiple=recipe.channel_multiple,
        residual=recipe.prune_residual,
    )
    decision = pruning.choose(graph, options)
    groups = {group.name: group for group in find_groups(graph)}
    if not decision.keep:
        widest = max(groups[name].size for name in decision.ratios)
        raise UsageError(
            f"prune: no layer loses a channel: the widest group that can be pruned has {widest}, "
            f"and kept channels are multiples of {recipe.channel_multiple}; ask for more, or lower "
            "--channel-multiple"
        )
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
        "criterion": criterion,
        "groups": rows,
        "left": left,
    }


def _make_sparse(
    recipe: Recipe, graph: Graph
) -> tuple[Graph, Mapping[str, Tensor], dict[str, Any]]:
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
    if recipe.restore != "none":

        def zeroed(path: str, layer: Any, outputs: Any) -> Tensor | None:
            mask = masks.keep.get(path)
            return None if mask is None else layer.weight.detach().cpu().double() * mask

        graph = Restorer(graph, {}, restoring(recipe), round_layer=zeroed).run()
    graph = sparsity.apply_masks(graph, masks.keep)
    total = sum(mask.numel() for mask in masks.keep.values())
    zeros = total - sum(int(mask.sum()) for mask in masks.keep.values())
    left = [{"name": name, "reason": reason} for name, reason in masks.left.items()]
    about = {"pattern": recipe.sparsity, "layers": list(masks.keep), "left": left}
    return graph, masks.keep, about | {"fraction": zeros / total}


def _widths(before: Graph, after: Graph) -> dict[str, list[int]]:
    """Return every layer's output channels, before and after."""
    from dfqc.compiler.graph import layer_nodes

    def width(graph: Graph, path: str) -> int:
        layer = cast(Any, graph.module.get_submodule(path))
        return int(getattr(layer, "out_channels", None) or layer.out_features)

    paths = dict.fromkeys(path for path, _ in layer_nodes(before))
    return {path: [width(before, path), width(after, path)] for path in paths}


def _kept_outputs(graph: Graph, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def _split(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images to fit on, and every fourth, to judge by; few serve for both."""
    if len(images) < _JUDGE_STEP:
        return images, images
    judged = [index % _JUDGE_STEP == _JUDGE_STEP - 1 for index in range(len(images))]
    return images[[not one for one in judged]], images[judged]


def _count_images(recipe: Recipe, graph: Graph) -> int:
    """Return how many images are fitted on: all activations that are live are held at once."""
    from dfqc.compiler.graph import node_shapes

    largest = max(math.prod(shape) for shape in node_shapes(graph).values())
    room = min(_LIVE_BYTES, (recipe.memory_bytes or 8 * _LIVE_BYTES) // 8)
    return max(_LEAST_IMAGES, room // (2 * 4 * largest))


def _save_graph(graph: Graph | None, folder: Path) -> None:
    from dfqc.compiler.frontend import save_graph

    if graph is not None:
        save_graph(graph, folder / _GRAPH)


def _load_graph(folder: Path) -> Graph | None:
    from dfqc.compiler.frontend import load_graph

    return load_graph(folder / _GRAPH) if (folder / _GRAPH).is_dir() else None
