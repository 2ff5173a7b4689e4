"""How long a build will take and how much memory it needs: recipe and model facts in, rows out.

One forward pass of the traced model is timed here and scaled: good to about a factor of two.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfqc.compiler import plugins
from dfqc.compiler.allocate import CHUNK_BYTES, WIDTHS, images_for
from dfqc.compiler.batches import split_evenly, synth_overrides
from dfqc.compiler.job import Job
from dfqc.compiler.options import plugin_options
from dfqc.compiler.pruning import quantizer_overrides
from dfqc.compiler.spec import MAX_BITS, Plan
from dfqc.compiler.stages_calib import HELD_OUT, MATCHED

if TYPE_CHECKING:
    from dfqc.compiler.graph import Graph
    from dfqc.compiler.recipe import Recipe

_BASE_BYTES = 450 << 20  # the interpreter with torch, ONNX and a runtime loaded
_BACKWARD = 3.0  # forward and backward pass, in forward passes
_KEPT = 1.3  # bytes that a backward pass keeps, in bytes of all outputs of a forward pass
_PROBE_IMAGES = 8
_QUANTIZER_BATCH = 64  # images per pass without gradients


@dataclass(frozen=True)
class Estimate:
    """What one stage will take."""

    stage: str
    seconds: float
    peak_bytes: int


def estimate(
    job: Job,
    graph: Graph,
    facts: Mapping[str, Any],
    data: Mapping[str, Any],
    narrow: float = 1.0,
    *,
    seconds_per_image: float | None = None,
    unpruned: Graph | None = None,
) -> list[Estimate]:
    """Return the stages that cost more than a moment, in order.

    Args:
        job: what will be built.
        graph: the traced model, pruned if it is.
        facts: what the trace stage says of it.
        data: what the data stage found.
        narrow: the share of the layers that get less than 8 bits.
        seconds_per_image: of a forward pass; measured here if it is not given.
        unpruned: the model before channels were removed, if any were.
    """
    recipe = job.recipe
    image = _seconds_per_image(graph) if seconds_per_image is None else seconds_per_image
    options = _options(job)
    sizes = split_evenly(recipe.samples, getattr(options, "batch_size", recipe.samples))
    size = sizes[0]
    passes = _BACKWARD * _passes(options, recipe.synth, facts, 1 + len(recipe.zoo), sizes)
    matched = _BACKWARD * MATCHED["iterations"] if facts["batch_norm"] else 0.0
    half = HELD_OUT // 2
    own = plugins.load("synthesizer", recipe.synth).count_bytes(
        options, tuple(facts["image"]["size"]), size
    )
    pixels = recipe.samples * 4 * _count(facts["image"]["size"])
    weights = 4 * facts["params"]
    activations = 4 * facts["activations"]
    labelled = data.get("eval", {}).get("images", 0)
    kept = int(_KEPT * activations)
    rows = [
        Estimate("synthesize", recipe.samples * passes * image, kept * size + own + 2 * pixels),
        Estimate("holdout", half * matched * image, kept * half),
        *_refit(recipe, image, activations),
        *_allocation(recipe, facts, image),
        *_autotune(recipe, facts, image),
        _quantization(recipe, graph, image, pixels, activations, narrow, unpruned),
        Estimate("correct", 3 * min(recipe.samples, 256) * image, pixels + 32 * activations),
        Estimate("float", 2.0 + weights / 50e6, 6 * weights),
        *([Estimate("pruned", 2.0 + weights / 50e6, 6 * weights)] if recipe.prunes else []),
        Estimate("lower", 2.0 + weights / 50e6, 6 * weights),
        Estimate("verify", 4 * HELD_OUT * image, 32 * activations),
        Estimate("evaluate", 4 * (HELD_OUT + labelled) * image, 64 * activations),
        Estimate("bench", 2.0 + 220 * recipe.batch * image, recipe.batch * activations),
    ]
    return [Estimate(r.stage, r.seconds, _BASE_BYTES + 2 * weights + r.peak_bytes) for r in rows]


def narrow_share(plan: Plan, free: Collection[str] = ()) -> float:
    """Return the share of the layers, or of the activations, that have less than 8 bits.

    Args:
        plan: what every layer gets.
        free: layers whose weight bits are chosen later; they may become narrow.
    """
    layers = [
        name in free or (layer.weight is not None and layer.weight.bits < MAX_BITS)
        for name, layer in plan.layers.items()
    ]
    acts = [one.scheme.bits < MAX_BITS for one in plan.quantizers.values()]
    return max((sum(part) / len(part) for part in (layers, acts) if part), default=0.0)


def _quantization(
    recipe: Recipe,
    graph: Graph,
    image: float,
    pixels: int,
    activations: int,
    narrow: float,
    unpruned: Graph | None,
) -> Estimate:
    """Return what the quantizer says of itself: passes of the network, and caches."""
    plugin = plugins.load("quantizer", recipe.quantizer)
    overrides = quantizer_overrides(recipe)
    options = plugin_options(plugin, recipe.quantizer, recipe.effort, overrides)
    seconds = plugin.count_passes(options, recipe.samples, narrow) * image
    kept = plugin.count_bytes(options, graph, recipe.samples, recipe.memory_bytes, unpruned)
    return Estimate("quantize", seconds, pixels + _QUANTIZER_BATCH * activations + kept)


def _refit(recipe: Recipe, image: float, activations: int) -> list[Estimate]:
    """Both networks node by node, a system per layer, and the judging of both results."""
    if not recipe.refits:
        return []
    passes = 6 * (recipe.samples + HELD_OUT)
    return [Estimate("refit", passes * image, min(recipe.samples * activations, 4 << 30))]


def _allocation(recipe: Recipe, facts: Mapping[str, Any], image: float) -> list[Estimate]:
    """Every layer's tail, half the network on average, once per candidate width."""
    if not recipe.measures_layers:
        return []
    widths = len(WIDTHS)
    count = min(recipe.samples, images_for(facts["macs"], facts["layers"], widths))
    passes = count * facts["layers"] * widths / 2
    lowering = 3 * (2.0 + facts["params"] / 12e6) if recipe.size else 0.0
    kept = 2 * min(CHUNK_BYTES, count * 4 * facts["activations"])
    return [Estimate("allocate", passes * image + lowering, kept + 5 * facts["params"])]


def _autotune(recipe: Recipe, facts: Mapping[str, Any], image: float) -> list[Estimate]:
    """Two engines a trial, a trial for every few layers."""
    if not recipe.autotune:
        return []
    trials = 3 + facts["layers"]
    lowering = 2 * (1.0 + facts["params"] / 12e6)
    calls = 2 * (50 * recipe.batch + 8) * image
    return [Estimate("autotune", trials * (lowering + calls), 6 * 4 * facts["params"])]


def _options(job: Job) -> Any:
    recipe = job.recipe
    plugin = plugins.load("synthesizer", recipe.synth)
    return plugin_options(plugin, recipe.synth, recipe.effort, synth_overrides(recipe))


def _passes(
    options: Any, name: str, facts: Mapping[str, Any], nets: int, sizes: Sequence[int]
) -> float:
    """Return the passes per image, where batches have those `sizes`; later ones may do less."""
    plugin = plugins.load("synthesizer", name)
    if hasattr(options, "batch_size"):
        options = options.model_copy(update={"batch_size": sizes[0]})
    full = float(plugin.count_passes(options, tuple(facts["image"]["size"]), nets))
    later = plugin.count_carried(options) if plugin.CARRIES else 1.0
    return full * (1 + later * (len(sizes) - 1)) / len(sizes)


def _seconds_per_image(graph: Graph) -> float:
    """Time a forward pass of a small batch; the best of three is the least disturbed."""
    import torch

    images = torch.zeros(_PROBE_IMAGES, *graph.image.size)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(3):  # the first call also allocates
            start = time.perf_counter()
            graph.module(images)
            best = min(best, time.perf_counter() - start)
    return best / _PROBE_IMAGES


def _count(size: list[int]) -> int:
    return size[0] * size[1] * size[2]
