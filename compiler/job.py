"""A recipe bound to what it names: digests of model and data, versions of runtime and target.

In: a checked recipe. Out: a `Job`, the settings that every stage and every cache key reads. Nothing
here loads torch: an unchanged build is recognized from digests alone.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler import plugins
from dfqc.compiler._identity import is_zoo, model_digest
from dfqc.compiler._imagefiles import find_images
from dfqc.compiler.artifact import digest_of
from dfqc.compiler.dataset import digest
from dfqc.compiler.errors import EnvironmentFault, UsageError
from dfqc.compiler.mixing_zoo import digest_zoo
from dfqc.compiler.package import MANIFEST

if TYPE_CHECKING:
    from dfqc.compiler.recipe import Recipe

log = logging.getLogger("dfqc.job")

# What does not change the model that comes out: checks and limits around it.
_AROUND = (
    *("eval-data", "max-drop", "min-speedup", "batch", "threads", "budget", "memory"),
    *("bake-preprocessing", "require-engine"),  # files beside the model
)


@dataclass(frozen=True)
class Job:
    """One build. Digests stand for the files; `runtime` is None where it cannot be used here."""

    recipe: Recipe
    model_digest: str
    calib_digest: str | None
    eval_digest: str | None
    runtime: str | None
    no_runtime: str  # why `runtime` is None
    output: Path
    zoo_digests: tuple[str, ...] = ()

    @property
    def backend(self) -> Any:
        """The target's plug-in."""
        return plugins.load("target", self.recipe.target)

    def recipe_digest(self) -> str:
        """SHA-256 of everything that determines the model, by content and not by place."""
        what = {k: v for k, v in self.recipe.saved().items() if k not in _AROUND}
        what |= {"model": self.model_digest, "arch": None, "calib-data": self.calib_digest}
        what |= {"zoo": self.zoo_digests}
        return digest_of(what)


def make_job(recipe: Recipe) -> Job:
    """Bind a recipe.

    Raises:
        LoadError: files that are missing or empty.
        EnvironmentFault: --autotune without the target's runtime.
    """
    usable, runtime = plugins.load("target", recipe.target).available()
    if recipe.autotune and not usable:
        raise EnvironmentFault(f"--autotune times engines, and there is none here: {runtime}")
    recipe = _fit_samples(recipe)
    return Job(
        recipe,
        _digest_model(recipe),
        digest(Path(recipe.calib_data)) if recipe.calib_data else None,
        digest(Path(recipe.eval_data)) if recipe.eval_data else None,
        runtime if usable else None,
        "" if usable else runtime,
        output_folder(recipe),
        digest_zoo(recipe),
    )


def output_folder(recipe: Recipe) -> Path:
    """Return -o, or `out/<model>-<bits>-<target>`; limits and pruning follow the bits."""
    if recipe.output:
        return Path(recipe.output)
    limit = (recipe.weight_limit or "").replace("--", "-").replace(" ", "")
    names = ("prune", "params", "macs", "sparsity")
    smaller = "".join(f"-{n}{v}".replace(":", "of") for n in names if (v := getattr(recipe, n)))
    return Path("out") / f"{model_name(recipe)}-{recipe.bits}{limit}{smaller}-{recipe.target}"


def model_name(recipe: Recipe) -> str:
    """Return a short name of the model for folders and engines."""
    if is_zoo(recipe.model):
        return recipe.model.partition(":")[2]
    return Path(recipe.model).stem


def check_output(folder: Path) -> None:
    """Refuse, before any work, a folder that cannot be written or holds something else.

    Raises:
        EnvironmentFault: the folder cannot be made or written.
        UsageError: it exists and is no package.
    """
    is_package = (folder / MANIFEST).is_file()
    if folder.exists() and not is_package and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder}: exists and is no package, so it is not overwritten; choose a new or "
            "empty folder, or an earlier package, with -o"
        )
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe = parent / f".{folder.name}.{os.getpid()}.probe"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise EnvironmentFault(
            f"the output folder {folder} cannot be written: {error.strerror or error}; "
            "choose another with -o"
        ) from error


def _fit_samples(recipe: Recipe) -> Recipe:
    """Take all of a data set that is smaller than the number of samples nobody asked for."""
    if not recipe.calib_data or "samples" in recipe.model_fields_set:
        return recipe
    count = len(find_images(Path(recipe.calib_data), need_labels=False)[1])
    if count >= recipe.samples:
        return recipe
    log.warning(
        "%s holds %d images: all of them calibrate (%d are usual; --samples says how many)",
        recipe.calib_data,
        count,
        recipe.samples,
    )
    return recipe.model_copy(update={"samples": count})


def _digest_model(recipe: Recipe) -> str:
    if not recipe.pretrained and not is_zoo(recipe.model):
        raise UsageError(
            f"--no-pretrained goes with timm:NAME and torchvision:NAME; {recipe.model} brings its "
            "own weights: leave the flag out"
        )
    if recipe.arch is not None and is_zoo(recipe.model):
        raise UsageError(
            f"--arch {recipe.arch} goes with a file of weights; {recipe.model} names its own"
        )
    return model_digest(recipe.model, recipe.arch, recipe.pretrained, recipe.seed)
