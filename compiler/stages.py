"""What each stage up to the lowered model does: a context in, the stage's value out.

A stage function reads its inputs, calls one pure function of the compiler or of a plug-in, and
returns what that returned. torch is imported where it is used: a build that finds every stage in
the store never loads it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler import plugins
from dfqc.compiler.contracts import ImageSpec, QuantizerSupplies, QuantState
from dfqc.compiler.driver import Context
from dfqc.compiler.errors import EnvironmentFault, LoadError, UnsupportedError
from dfqc.compiler.job import Job
from dfqc.compiler.options import plugin_options
from dfqc.compiler.spec import Plan
from dfqc.compiler.storage import load_json, save_json

if TYPE_CHECKING:
    import torch

    from dfqc.compiler.graph import Graph

FACTS, DATA = "facts.json", "data.json"
# `variance` restores the variance of every channel, then its mean, both from batch norms.
_QUANTIZE_SHARE = 0.7  # of the time left; lowering, parity and measuring come after


def trace(context: Context) -> tuple[Graph, dict[str, Any]]:
    """Load the model and capture it; beside the graph, the facts that need no torch to read."""
    from dfqc.compiler import frontend
    from dfqc.compiler.loading import ImageOverrides, load_model

    recipe = context.settings.recipe
    image = ImageOverrides(recipe.input_size, recipe.mean, recipe.std, recipe.resize)
    loaded = load_model(
        recipe.model,
        arch=recipe.arch,
        unsafe_load=recipe.unsafe_load,
        pretrained=recipe.pretrained,
        image=image,
        seed=recipe.seed,
    )
    graph = frontend.trace(loaded)
    return graph, model_facts(graph) | {"sha256": loaded.sha256}


def save_trace(value: tuple[Graph, dict[str, Any]], folder: Path) -> None:
    """Write graph and facts."""
    from dfqc.compiler.frontend import save_graph

    save_graph(value[0], folder)
    save_json(value[1], folder / FACTS)


def load_trace(folder: Path) -> Graph:
    """Read the graph."""
    from dfqc.compiler.frontend import load_graph

    return load_graph(folder)


def verify_trace(value: tuple[Graph, dict[str, Any]]) -> None:
    """Check the graph against the canonical dialect."""
    from dfqc.compiler.graph import verify

    verify(value[0], "trace")


def equalize(context: Context) -> Graph:
    """Balance the channels of neighboring layers, where the recipe asks for it."""
    from dfqc.compiler.passes import equalize as equalizing

    graph: Graph = context.value("trace")
    options = equalizing.METHODS[context.settings.recipe.equalize]
    return graph if options is None else equalizing.equalize(graph, options)


def verify_equalize(graph: Graph) -> None:
    """Check the graph against the canonical dialect."""
    from dfqc.compiler.graph import verify

    verify(graph, "equalize")


def fold(context: Context) -> Graph:
    """Fold the batch norms."""
    from dfqc.compiler.passes.fold import fold as fold_graph
    from dfqc.compiler.stages_prune import unfolded_graph

    return fold_graph(unfolded_graph(context))


def verify_fold(graph: Graph) -> None:
    """Check the graph against the canonical dialect."""
    from dfqc.compiler.graph import verify

    verify(graph, "fold")


def plan(context: Context) -> Plan:
    """Decide what every layer and tensor gets."""
    from dfqc.compiler.passes.fold import fold as fold_graph
    from dfqc.compiler.plan import make_plan
    from dfqc.compiler.stages_prune import pruned_graph

    job: Job = context.settings
    recipe, graph = job.recipe, fold_graph(pruned_graph(context))
    decided = make_plan(
        graph,
        job.backend.TARGET,
        recipe.asked_bits,
        recipe.rules,
        ends=recipe.ends_bits,
    )
    if recipe.weight_limit is not None:
        from dfqc.compiler.stages_allocate import check_limit

        check_limit(job, graph, decided)
    return decided


def check_data(context: Context) -> dict[str, Any]:
    """Check what will calibrate and what will judge before they are needed; both fit the model."""
    from dfqc.compiler.dataset import check_labels, open_dataset

    recipe, facts = context.settings.recipe, load_json(context.path("trace", FACTS))
    image = image_spec(facts["image"])
    found: dict[str, Any] = {}
    require_batch_norm(recipe.synth, facts["batch_norm"])
    require_classes(recipe.synth, facts["classes"])
    if recipe.calib_data:
        calib = open_dataset(Path(recipe.calib_data), image, need_labels=False)
        if len(calib) < recipe.samples:
            raise LoadError(
                f"{recipe.calib_data}: holds {len(calib)} images and {recipe.samples} were asked "
                f"for; give more images or --samples {len(calib)}"
            )
        found["calib"] = {"available": len(calib)}
    if recipe.eval_data:
        if facts["classes"] is None:
            raise UnsupportedError(
                "--eval-data measures top-1, for which the model's output must be (n, classes); "
                "this model's has another shape: build without --eval-data"
            )
        labelled = open_dataset(Path(recipe.eval_data), image)
        check_labels(labelled, facts["classes"])
        found["eval"] = {"source": labelled.source, "images": len(labelled)}
    return found


def require_batch_norm(name: str, present: bool) -> None:
    """Refuse a synthesizer that has nothing to match, and name those that work (exit 4)."""
    if present or not plugins.load("synthesizer", name).NEEDS_BN:
        return
    names = plugins.available("synthesizer")
    needing = [n for n in names if plugins.load("synthesizer", n).NEEDS_BN]
    others = [n for n in names if n not in needing]
    raise UnsupportedError(
        f"--synth {name}: the model has no batch norm, whose statistics {name} matches; "
        f"synthesizers that need batch norms: {', '.join(needing)}; "
        f"that do not: {', '.join(others)}"
    )


def require_classes(name: str, classes: int | None) -> None:
    """Refuse a synthesizer that makes images of classes for a model without any (exit 4)."""
    if not plugins.load("synthesizer", name).NEEDS_CLASSES or (classes or 0) >= 2:
        return
    names = plugins.available("synthesizer")
    others = [n for n in names if not plugins.load("synthesizer", n).NEEDS_CLASSES]
    raise UnsupportedError(
        f"--synth {name}: makes images of classes, and the model's output is not (n, classes) with "
        f"at least two; "
        f"synthesizers without classes: {', '.join(others)}"
    )


def save_data(value: Mapping[str, Any], folder: Path) -> None:
    """Write what was found."""
    save_json(dict(value), folder / DATA)


def load_data(folder: Path) -> Any:
    """Read it."""
    return load_json(folder / DATA)


def image_spec(facts: Mapping[str, Any]) -> ImageSpec:
    """Rebuild the preprocessing from the facts of a trace."""
    tuples = {name: tuple(facts[name]) for name in ("size", "mean", "std")}
    return ImageSpec(**{**facts, **tuples})


def assumed_note(image: Mapping[str, Any]) -> str:
    """Say what was taken for preprocessing where nobody gave it; empty if somebody did."""
    if not image["assumed"]:
        return ""
    mean, std = (",".join(map(str, image[name])) for name in ("mean", "std"))
    size = "x".join(map(str, image["size"]))
    resize = image["resize"]
    how = f"to {resize} on the shorter side" if resize else "until they just cover the input"
    return (
        f"Preprocessing was assumed to be ImageNet's: mean {mean}, std {std}, input {size}, images "
        f"resized {how}; a model trained otherwise needs --mean, --std, --input-size and --resize"
    )


def quantize(context: Context) -> QuantState:
    """Choose weights' codes and activations' grids."""
    import torch

    from dfqc.compiler.graph import has_batch_norm
    from dfqc.compiler.pruning import quantizer_overrides
    from dfqc.compiler.stages_calib import count_fitting
    from dfqc.compiler.stages_prune import unfolded_graph, unpruned

    recipe, unfolded = context.settings.recipe, unfolded_graph(context)
    plugin = plugins.load("quantizer", recipe.quantizer)
    supplies = QuantizerSupplies(
        unfolded=unfolded,
        unpruned=unpruned(context),
        held_out=context.value("holdout").images,
        fitting=count_fitting(context.value("holdout"), batch_norm=has_batch_norm(unfolded)),
        memory_bytes=recipe.memory_bytes,
        seconds=context.share_of_time(_QUANTIZE_SHARE),
        checkpoint=context.checkpoint,
        scratch=context.scratch,
        bias_correction=recipe.bias_correction,
    )
    overrides = quantizer_overrides(recipe)
    options = plugin_options(plugin, recipe.quantizer, recipe.effort, overrides)
    device = device_of(context)
    state: QuantState = plugin.quantize(
        context.value("fold"),
        context.value("synthesize"),
        context.value("autotune"),
        options,
        rng=torch.Generator(device).manual_seed(context.seed()),
        device=device,
        progress=context.progress(),
        supplies=supplies,
    )
    return state


def correct(context: Context) -> QuantState:
    """Undo the mean error of every layer in its bias."""
    from dfqc.compiler.affine import half_scales
    from dfqc.compiler.passes import bias
    from dfqc.compiler.stages_prune import unfolded_graph

    recipe = context.settings.recipe
    state = bias.correct(
        context.value("fold"),
        unfolded_graph(context),
        context.value("quantize"),
        context.value("synthesize"),
        bias.options_of(recipe.bias_correction),
        device=device_of(context),
        held_out=context.value("holdout").images,
        memory_bytes=context.settings.recipe.memory_bytes,
        progress=context.progress(),
    )
    return half_scales(state) if recipe.trt_base == "fp16" else state


def model_facts(graph: Graph) -> dict[str, Any]:
    """What the plan, the estimate and the manifest say of a model."""
    from dfqc.compiler.graph import (
        blocks,
        count_macs,
        count_params,
        has_batch_norm,
        layer_nodes,
        node_shapes,
    )

    result = next(n for n in graph.module.graph.nodes if n.op == "output").args[0]
    shapes = node_shapes(graph)
    return {
        "params": count_params(graph),
        "macs": count_macs(graph),
        "blocks": len(blocks(graph)),
        "layers": len({name for name, _ in layer_nodes(graph)}),
        "activations": sum(math.prod(shape) for shape in shapes.values()),
        "classes": shapes[result.name][-1] if len(shapes.get(result.name, ())) == 2 else None,
        "batch_norm": has_batch_norm(graph),
        "image": dataclasses.asdict(graph.image),
    }


def device_of(context: Context) -> torch.device:
    """Return the device of the recipe; one that is not there is said at once (exit 8)."""
    import torch

    device = torch.device(context.settings.recipe.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault("--device cuda: torch finds no CUDA device here; use --device cpu")
    return device
