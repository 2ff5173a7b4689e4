"""The zoo of a synthesizer that mixes features: names and files in, traced models out.

A member is `timm:NAME`, `torchvision:NAME`, a model file, `FILE@ARCH` for a state_dict, or a recipe
(`.yaml`, also one of an earlier package) whose keys say what the flags say of the main model.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from dfqc.compiler._identity import is_zoo, model_digest
from dfqc.compiler.artifact import digest_of
from dfqc.compiler.errors import UsageError
from dfqc.compiler.recipe import Recipe, make_recipe

if TYPE_CHECKING:
    from dfqc.compiler.graph import Graph

log = logging.getLogger("dfqc.zoo")


def digest_zoo(recipe: Recipe) -> tuple[str, ...]:
    """Return what each member is, by content; loads no framework.

    Raises:
        UsageError: a member that is no model and no recipe.
        LoadError: a file that cannot be read.
    """
    return tuple(
        digest_of(
            {
                "model": model_digest(m.model, m.arch, m.pretrained, m.seed),
                "mean": m.mean,
                "std": m.std,
            }
        )
        for m in _members(recipe)
    )


def load_zoo(recipe: Recipe, graph: Graph) -> list[Graph]:
    """Load and trace the members at the input size of `graph`, each with its own normalization.

    A file that does not say how its images are normalized takes them as `graph` does: models of
    one data set usually agree.

    Raises:
        UsageError: a member with another number of classes.
        LoadError: a member that cannot be loaded, or does not run at this input size.
        UnsupportedError: a member that cannot be captured.
    """
    classes = count_outputs(graph)
    zoo = []
    for text, member in zip(recipe.zoo, _members(recipe), strict=True):
        traced = _trace(member, graph)
        found = count_outputs(traced)
        if found != classes:
            raise UsageError(
                f"--zoo {text}: has {found} outputs and {recipe.model} has {classes}; the models "
                "of a zoo need the same classes in the same order: leave it out"
            )
        zoo.append(traced)
    return zoo


def count_outputs(graph: Graph) -> int | None:
    """Return the number of classes, None for a model whose output is not (n, classes)."""
    from dfqc.compiler.graph import node_shapes

    result = next(n for n in graph.module.graph.nodes if n.op == "output").args[0]
    shape = node_shapes(graph).get(getattr(result, "name", ""), ())
    return shape[-1] if len(shape) == 2 else None


def _members(recipe: Recipe) -> list[Recipe]:
    return [_read_member(text, recipe) for text in recipe.zoo]


def _read_member(text: str, recipe: Recipe) -> Recipe:
    if Path(text).suffix in (".yaml", ".yml"):
        return make_recipe({}, Path(text))
    model, _, arch = (text, "", "") if is_zoo(text) else text.partition("@")
    if not model:
        raise UsageError(
            f"--zoo: got {text!r}, expected timm:NAME, torchvision:NAME, FILE, FILE@ARCH or a "
            "recipe (.yaml), separated by commas"
        )
    return make_recipe({"model": model, "arch": arch or None, "unsafe_load": recipe.unsafe_load})


def _trace(member: Recipe, graph: Graph) -> Graph:
    from dfqc.compiler import frontend
    from dfqc.compiler.loading import ImageOverrides, load_model

    loaded = load_model(
        member.model,
        arch=member.arch,
        unsafe_load=member.unsafe_load,
        pretrained=member.pretrained,
        image=ImageOverrides(graph.image.size, member.mean, member.std, None),
        seed=member.seed,
    )
    traced = frontend.trace(loaded)
    if member.input_size and member.input_size != graph.image.size:
        log.warning(
            "--zoo %s: is made for images of %s and sees those of %s",
            *(member.model, member.input_size, graph.image.size),
        )
    if not traced.image.assumed:
        return traced
    log.warning("--zoo %s: normalization not given, taken from the main model", member.model)
    return dataclasses.replace(traced, image=graph.image)
