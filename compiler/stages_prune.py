"""What the stages that make a model smaller do: a context in, the smaller graph out.

`prune` decides and restores without data, before anything is planned; `refit` fits the weights to
the calibration images, once there are some. Where nothing is asked both hand on nothing, and the
graph of the stage before serves.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler.contracts import Pruned
from dfqc.compiler.driver import Context
from dfqc.compiler.job import Job
from dfqc.compiler.pruning import (
    choose_channels,
    count_widths,
    find_kept_outputs,
    make_sparse,
    restoring,
)
from dfqc.compiler.pruning_report import PRUNING, REFIT
from dfqc.compiler.recipe import Recipe
from dfqc.compiler.stages import device_of
from dfqc.compiler.stages_joint import choose_way, with_way
from dfqc.compiler.storage import FLOAT_MODEL, load_json, save_json

if TYPE_CHECKING:
    from torch import Tensor

    from dfqc.compiler.graph import Graph

log = logging.getLogger("dfqc.prune")

_MASKS, _GRAPH = "masks.safetensors", "graph"
_LIVE_BYTES = 1 << 30  # of the largest activation of both networks while weights are fitted
_LEAST_IMAGES = 32
# Measured on CIFAR-10 ResNets of which 30 % of the inner channels are gone, 48 synthetic images: a
# ResNet-20 (float 92.1, restored 84.3) is at 85.6 from the images alone, at 88.5 with copies that
# are mirrored and shifted and a ridge of 0.1 for 0.01; a ResNet-56 (restored 90.8) is at 91.9.
COPIES, RIDGE = 4, 0.1


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
    from dfqc.compiler.channels import remove
    from dfqc.compiler.graph import count_macs, count_params
    from dfqc.compiler.passes.restore import Restorer

    recipe: Recipe = context.settings.recipe
    original: Graph = context.value("equalize")
    if not recipe.shrinks:
        return Cut()
    graph = original
    keep: Mapping[str, Tensor] = {}
    masks: Mapping[str, Tensor] = {}
    about: dict[str, Any] = {"restored_by": recipe.restore, "method": None, "criterion": None}
    about |= {"groups": [], "left": [], "not_restored": [], "sparsity": None}
    if recipe.prune == "auto":
        way, about["budget"] = choose_way(context, original)
        recipe = with_way(recipe, way)
    if recipe.prunes:
        keep, found = choose_channels(recipe, original)
        restorer = Restorer(original, keep, restoring(recipe))
        graph = remove(restorer.run(), keep)
        about |= found
        if recipe.restore != "none":
            about["not_restored"] = restorer.not_restored()
    if recipe.zeros is not None:
        graph, masks, about["sparsity"] = make_sparse(recipe, graph)
        missed = about["sparsity"].pop("not_restored")
        about["not_restored"] = sorted({*about["not_restored"], *missed})
    about |= {
        "params_before": count_params(original),
        "params_after": count_params(graph),
        "macs_before": count_macs(original),
        "macs_after": count_macs(graph),
        "layers": count_widths(original, graph),
    }
    return Cut(graph if recipe.shrinks else None, keep, masks, about)


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
    """Fit the weights that are left to the calibration images, and keep the better network.

    Better is what is nearer to the original on images that nothing was fitted to: of the
    calibration set, and made to fit the batch norms in another way, by the ratios of the
    divergences. Noise has no say where there are others: for it the restored ResNet-56 is twice as
    good as the fitted one, which is better by a point on real images.
    """
    import torch

    from dfqc.compiler.graph import has_batch_norm, on_device
    from dfqc.compiler.judging import augmented, mean_divergence, split_judges
    from dfqc.compiler.passes import _least_squares
    from dfqc.compiler.passes.bias import divergence
    from dfqc.compiler.stages_calib import count_fitting

    recipe: Recipe = context.settings.recipe
    if not recipe.refits:
        return Refit()
    if context.value("prune").graph is None:
        log.log(
            logging.WARNING if recipe.refit == "on" else logging.INFO,
            "refit: no channel was removed, so nothing is fitted",
        )
        return Refit()
    original, cut, device = context.value("equalize"), context.value("prune"), device_of(context)
    restored: Graph = cut.graph
    calib, held_out = context.value("synthesize").images, context.value("holdout")
    learning, own = split_judges(calib)
    rng = torch.Generator().manual_seed(context.seed())
    learning = augmented(learning, COPIES, rng)[: _count_images(recipe, original)]
    fitted = _least_squares.refit(
        original,
        restored,
        learning,
        outputs=find_kept_outputs(original, cut.keep),
        masks=cut.masks,
        ridge=RIDGE,
        device=device,
        progress=context.progress(),
    )
    fitting = count_fitting(held_out, batch_norm=has_batch_norm(original))
    judges = [part for part in (own, held_out.images[:fitting]) if len(part)]
    scores: dict[str, float] = {}
    exact = on_device(context.value("trace"), device)  # the user's, also where that was equalized
    for name, graph in (("restored", restored), ("refit", fitted)):
        here = on_device(graph, device)
        scores[name] = mean_divergence(
            divergence(exact, here, part, device=device) for part in judges
        )
    kept = min(scores, key=lambda name: scores[name])
    log.info("refit: kept %s of %s", kept, scores)
    about = {"kept": kept, "scores": scores, "images": len(learning)}
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
    """Return the original of what was pruned or made sparse: what is to be reproduced."""
    cut: Cut = context.value("prune")
    return Pruned(context.value("equalize"), cut.keep) if cut.keep or cut.masks else None


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
