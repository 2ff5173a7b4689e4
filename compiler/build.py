"""The verbs of the pipeline as functions: flags and a recipe file in, plain results out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler import plugins
from dfqc.compiler._calibfile import write_calib_file
from dfqc.compiler.allocate import free_layers
from dfqc.compiler.artifact import Store, default_root
from dfqc.compiler.contracts import Progress, silent
from dfqc.compiler.driver import Driver, StageRecord
from dfqc.compiler.errors import EnvironmentFault, UsageError
from dfqc.compiler.job import Job, check_output, make_job, model_name
from dfqc.compiler.options import plugin_options
from dfqc.compiler.pipeline import Build, make_driver, open_store
from dfqc.compiler.pruning import quantizer_overrides
from dfqc.compiler.recipe import Recipe, make_recipe
from dfqc.compiler.spec import plan_from_json
from dfqc.compiler.stages import DATA, FACTS, assumed_note
from dfqc.compiler.storage import INFO, PLAN, load_json
from dfqc.compiler.units import format_size

if TYPE_CHECKING:
    from dfqc.compiler.finish import EngineOptions

log = logging.getLogger("dfqc.build")


@dataclass(frozen=True)
class Listener:
    """Who is told what happens: bars of running stages, and stages that are finished."""

    reporter: Callable[[str], Progress] = lambda title: silent
    finished: Callable[[StageRecord], None] = lambda record: None


def run_build(
    flags: Mapping[str, Any], recipe_file: Path | None, listener: Listener = Listener()
) -> dict[str, Any]:
    """Build a package and return its manifest; `exit_code` says whether its gates passed."""
    from dfqc.compiler.contents import write_build
    from dfqc.compiler.finish import run_engine

    recipe = make_recipe(flags, recipe_file)
    job = make_job(recipe)
    check_output(job.output)
    with open_store(recipe.cache_dir) as store:
        stages = make_driver(job, store).explain()
        fresh = any(stage.status in ("miss", "waits") for stage in stages)
        if fresh:
            _check_options(recipe)
        driver = _drive(job, store, listener, check=fresh)
        manifest = write_build(Build(job, driver))
    if job.backend.TARGET.engine_file and job.runtime is not None and not manifest["exit_code"]:
        return run_engine(job.output, _engine_options(recipe), listener.reporter("engine"))
    return manifest


def _check_options(recipe: Recipe) -> tuple[Any, Any]:
    """Refuse wrong options of the quantizer, which it would read only after images were made.

    A build whose stages are all stored has been through this, and loads no torch for it.

    Returns:
        The plug-in and its options.
    """
    plugin = plugins.load("quantizer", recipe.quantizer)
    overrides = quantizer_overrides(recipe)
    return plugin, plugin_options(plugin, recipe.quantizer, recipe.effort, overrides)


def _check_graph(driver: Driver) -> None:
    """Refuse options of the quantizer that do not fit the network, once it is pruned.

    A quantizer whose options depend on the network, or on where images come from, says so in
    `check_graph(options, unfolded, synthetic=...)`.
    """
    recipe: Recipe = driver.settings.recipe
    if not quantizer_overrides(recipe):
        return
    plugin, options = _check_options(recipe)
    if hasattr(plugin, "check_graph"):
        unfolded = driver.value("prune").graph or driver.value("equalize")
        plugin.check_graph(options, unfolded, synthetic=not recipe.calib_data)


def _engine_options(recipe: Recipe) -> EngineOptions:
    """Return how the engine of a build is built: for the batch that is timed."""
    from dfqc.compiler.finish import EngineOptions

    folder = Path(recipe.cache_dir) if recipe.cache_dir else default_root()
    return EngineOptions(batches=(recipe.batch,), cache_dir=folder)


def run_plan(
    flags: Mapping[str, Any], recipe_file: Path | None, listener: Listener = Listener()
) -> dict[str, Any]:
    """Return each layer's fate, what the build will cost, and what the store already has."""
    from dfqc.compiler.estimate import estimate, narrow_share

    job = make_job(make_recipe(flags, recipe_file))
    recipe = job.recipe
    with open_store(recipe.cache_dir) as store:
        driver = _drive(job, store, listener, last="data", check=True)
        facts = load_json(driver.artifact("trace").file(FACTS))
        data = load_json(driver.artifact("data").file(DATA))
        plan = load_json(driver.artifact("plan").file(PLAN))
        cut = driver.value("prune")
        graph = cut.graph or driver.value("trace")
        unpruned = driver.value("equalize") if cut.keep else None
        free = _free(job, plan)
        narrow = narrow_share(plan_from_json(plan), free)
        stages = [dataclasses.asdict(e) for e in make_driver(job, store).explain()]
        stored = {row["name"] for row in stages if row["status"] == "hit"}
        costs = [
            dataclasses.asdict(row) | {"stored": row.stage in stored}
            for row in estimate(job, graph, facts, data, narrow, unpruned=unpruned)
        ]
    for layer in plan["layers"]:
        if layer["name"] in free:
            parts = (f"weight bits chosen later under {recipe.weight_limit}", layer["reason"])
            layer["reason"] = "; ".join(part for part in parts if part)
    high = max(costs, key=lambda row: row["peak_bytes"])
    limit = recipe.memory_bytes
    if limit is not None and high["peak_bytes"] > limit:
        log.warning(
            "stage %s is estimated to need %s, and --memory is %s: the build may end there with "
            "exit code 8",
            *(high["stage"], format_size(high["peak_bytes"]), format_size(limit)),
        )
    return {
        "model": {"source": recipe.model, **facts},
        "target": recipe.target,
        "runtime": job.runtime,
        "bits": recipe.bits,
        "weight_limit": recipe.weight_limit,
        "pruning": dict(cut.about) or None,
        "chosen_later": list(free),
        "layers": plan["layers"],
        "quantizers": plan["quantizers"],
        "estimate": costs,
        "seconds": sum(row["seconds"] for row in costs if not row["stored"]),
        "peak_bytes": high["peak_bytes"],
        "stages": stages,
    }


def run_synth(
    flags: Mapping[str, Any],
    recipe_file: Path | None,
    listener: Listener = Listener(),
    *,
    compare: Path | None = None,
) -> dict[str, Any]:
    """Make calibration images only, and write them to a file.

    `.safetensors` holds them as the model reads them, `.npz` as 8-bit pixels; `--calib-data` takes
    both. `compare` is a path of images among which the nearest neighbors are searched.
    """
    from dfqc.compiler.dataset import digest

    recipe = make_recipe(flags, recipe_file)
    if compare:
        digest(compare)  # a path that cannot be read is said before the images are made
    target = Path(recipe.output or f"out/{model_name(recipe)}-{recipe.synth}.safetensors")
    if target.suffix not in (".safetensors", ".npz"):
        raise UsageError(f"-o {target}: expected a file ending in .safetensors or .npz")
    job = make_job(recipe)
    with open_store(recipe.cache_dir) as store:
        _make_folder(target)
        driver = _drive(job, store, listener, last="synthesize")
        artifact = driver.artifact("synthesize")
        if target.suffix == ".npz":
            _write_pixels(driver, target)
        else:
            write_calib_file(driver.value("synthesize"), driver.value("trace").image, target)
        about = load_json(artifact.file(INFO))
        compared = _compare(driver, compare, target, listener) if compare else None
    return {
        "file": str(target),
        "method": about["source"],
        "images": about["images"],
        "asked": about["info"]["asked"],
        "score": about["info"]["score"]["bn_distance"],
        "quality": about["info"]["score"],
        "compare": compared,
        "stages": [dataclasses.asdict(record) for record in driver.records],
    }


def _free(job: Job, plan: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the layers whose weight bits the build will choose."""
    recipe = job.recipe
    if recipe.weight_limit is None:
        return ()
    return free_layers(plan_from_json(plan), recipe.rules, ends=recipe.ends_bits)


def _drive(
    job: Job, store: Store, listener: Listener, *, last: str | None = None, check: bool = False
) -> Driver:
    """Run the stages; with `check` the quantizer's options must fit the network."""

    def finished(record: StageRecord) -> None:
        listener.finished(record)
        if check and record.name == "plan":
            _check_graph(driver)
        if record.name == "trace":  # before the hours that a wrong normalization would waste
            facts = load_json(driver.artifact("trace").file(FACTS))
            if note := assumed_note(facts["image"]):
                log.warning(note)

    driver = make_driver(job, store, last=last, reporter=listener.reporter, finished=finished)
    driver.run()
    return driver


def _make_folder(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    except OSError as error:
        raise EnvironmentFault(
            f"{target} cannot be written: {error.strerror or error}; choose another with -o"
        ) from error


def _compare(driver: Driver, path: Path, target: Path, listener: Listener) -> dict[str, Any]:
    import torch

    from dfqc.compiler.privacy import compare_to

    found = compare_to(
        driver.value("trace"),
        driver.value("synthesize"),
        path,
        device=torch.device(driver.settings.recipe.device),
        progress=listener.reporter("compare"),
    )
    pairs = target.with_suffix(".pairs.png")
    pairs.write_bytes(found.sheet)
    return {**found.report, "pairs": str(pairs)}


def _write_pixels(driver: Driver, target: Path) -> None:
    import numpy as np

    from dfqc.compiler.stages_calib import as_pixels

    calib, graph = driver.value("synthesize"), driver.value("trace")
    arrays = {"images": as_pixels(calib.images, graph.image)}
    if calib.labels is not None:
        arrays["labels"] = calib.labels.numpy()
    np.savez_compressed(target, allow_pickle=False, **arrays)
