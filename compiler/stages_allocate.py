"""What the stage that chooses weight bits does: plan and images in, the final plan out.

Without --avg-bits and --size it hands the plan on, with --sensitivity beside the table that the
choice would be made from. Both limits speak of the layers that are free:
quantized, no end with bits of its own, and under no --layer rule.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler import allocate as solver
from dfqc.compiler.allocate import Option, Table
from dfqc.compiler.contracts import CalibSet, QParams, QTensor, QuantState
from dfqc.compiler.driver import Context
from dfqc.compiler.errors import UsageError
from dfqc.compiler.file_metadata import describe_file
from dfqc.compiler.job import Job
from dfqc.compiler.spec import Plan
from dfqc.compiler.stages import FACTS, device_of
from dfqc.compiler.storage import load_json, save_json, save_plan
from dfqc.compiler.units import format_size

if TYPE_CHECKING:
    from torch import Tensor

    from dfqc.compiler.graph import Graph

log = logging.getLogger("dfqc.allocate")

ALLOCATION = "allocation.json"
_SUMS = "sums.json"
_PACKED = 4  # a target that packs weights stores those of so many bits and fewer in so many
# A later choice of grids can need another zero point, stored as a tensor of its own, per grid.
RESERVE = 24
_RANGE_IMAGES = 64


def options(job: Job) -> dict[str, Any]:
    """Return what the choice depends on beside the plan."""
    saved = job.recipe.saved()
    picked = {name: saved[name] for name in ("avg-bits", "size", "ends", "layer")}
    if not job.recipe.measures_layers:
        return {"avg-bits": None, "size": None}
    if job.recipe.weight_limit is None:
        return {"sensitivity": True, "target": dataclasses.asdict(job.backend.TARGET)}
    return {**picked, "target": dataclasses.asdict(job.backend.TARGET)}


def allocate(context: Context) -> tuple[Plan, dict[str, Any]]:
    """Return the final plan, and what the report says of layers and choice (empty: nothing)."""
    job: Job = context.settings
    base: Plan = context.value("plan")
    if not job.recipe.measures_layers:
        return base, {}
    graph = context.value("fold")
    table, images = _measure(context, graph, base)
    if job.recipe.weight_limit is None:
        return base, {"images": images, "table": solver.table_to_json(table)}
    if job.recipe.avg_bits is not None:
        chosen, figures = _fit_average(job, graph, base, table)
    else:
        chosen, figures = _fit_file(context, graph, base, table)
    about = _describe(job, table, chosen) | figures | {"images": images}
    if about["all_widest"]:
        log.warning(
            "%s is no limit here: every layer that it may narrow keeps its widest weights",
            job.recipe.weight_limit,
        )
    plan = plan_with(job, graph, chosen, table)
    return plan, about | {"table": solver.table_to_json(table)}


def save_allocation(value: tuple[Plan, Mapping[str, Any]], folder: Path) -> None:
    """Write the plan and what is said of the choice."""
    save_plan(value[0], folder)
    save_json(dict(value[1]), folder / ALLOCATION)


def check_limit(job: Job, graph: Graph, plan: Plan) -> None:
    """Refuse, before any work, a limit that no choice can keep (exit 2)."""
    limit, free = job.recipe.weight_limit, list_free(job, plan)
    if not free:
        raise UsageError(
            f"{limit}: no layer is left to choose bits for: all are under --layer rules, ends "
            "with bits of their own (--ends same), or not quantized"
        )
    if job.recipe.size_bytes is not None:
        narrow, wide = solver.widths(job.backend.TARGET)[0], solver.widths(job.backend.TARGET)[-1]
        facts = {"image": dataclasses.asdict(graph.image), "sha256": "0" * 64}

        def size(bits: int) -> int:
            return file_bytes(job, graph, facts, plan_with(job, graph, dict.fromkeys(free, bits)))

        _check_size(job, size(narrow), lambda: size(wide))


def _check_size(job: Job, smallest: int, measure_largest: Callable[[], int]) -> None:
    asked = job.recipe.size_bytes or 0
    if asked < smallest:
        largest = measure_largest()
        raise UsageError(
            f"{job.recipe.weight_limit}: {asked:,} bytes are less than the smallest file that can "
            f"be reached, {smallest:,} ({format_size(smallest)}; the largest is {largest:,}, "
            f"{format_size(largest)}); ask for more, free the ends with --ends same, or let "
            "channels go too with --prune auto"
        )


def _measure(context: Context, graph: Graph, plan: Plan) -> tuple[Table, int]:
    """Return the table of all planned layers, stored chunk of images by chunk of images.

    The chunks serve every limit: nothing is measured again for another one.
    """
    from dfqc.compiler import sensitivity
    from dfqc.compiler.graph import on_device

    widths = solver.widths(context.settings.backend.TARGET)
    device, report = device_of(context), context.progress()
    chunks = sensitivity.choose_chunks(graph, plan, context.value("synthesize").images, widths)

    @functools.cache
    def prepared() -> tuple[Graph, Any]:
        return on_device(graph, device), sensitivity.round_weights(graph, plan, widths)

    def measure(index: int) -> Callable[[], Any]:
        def progress(done: int, total: int, note: str) -> None:
            report(index * total + done, len(chunks) * total, note)

        return lambda: sensitivity.measure_chunk(
            prepared()[0], plan, prepared()[1], chunks[index], device=device, progress=progress
        )

    sums = [
        context.checkpoint(
            {"chunk": index, "of": len(chunks), "widths": list(widths)},
            measure(index),
            lambda value, folder: save_json(value, folder / _SUMS),
            lambda folder: load_json(folder / _SUMS),
            without=("avg-bits", "size", "ends", "layer", "target", "sensitivity"),
        )
        for index in range(len(chunks))
    ]
    return sensitivity.combine(sums), sum(map(len, chunks))


def _fit_average(
    job: Job, graph: Graph, plan: Plan, table: Table
) -> tuple[dict[str, int], dict[str, Any]]:
    """Choose under an average over the weights of the free layers."""
    counts = _weight_counts(graph, list_free(job, plan))
    ways = _options(table, counts, lambda bits, count: bits * count)
    limit = math.floor((job.recipe.avg_bits or 0) * sum(counts.values()) + 1e-6)
    chosen = solver.choose(ways, limit)
    cost = solver.total(ways, chosen)[0]
    return chosen, {"avg_bits": cost / sum(counts.values()), "file_bytes": None}


def _fit_file(
    context: Context, graph: Graph, plan: Plan, table: Table
) -> tuple[dict[str, int], dict[str, Any]]:
    """Choose under the size of the file that the target's lowering writes.

    What weights take of it is known; the rest is measured on a lowered file, which also shows
    whether the choice fits: if it does not, what is too much is taken off and it is made again.
    """
    job: Job = context.settings
    target, widths = job.backend.TARGET, solver.widths(job.backend.TARGET)
    counts = _weight_counts(graph, list_free(job, plan))
    grids = _grids(graph, plan, context.value("synthesize"), context)
    facts = load_json(context.path("trace", FACTS))

    def size(chosen: Mapping[str, int]) -> int:
        found = plan_with(job, graph, chosen)
        reserve = RESERVE * len(found.quantizers)
        return file_bytes(job, graph, facts, found, grids) + reserve

    def stored(bits: int, count: int) -> int:
        return -(-count * (_PACKED if target.packed_int4 and bits <= _PACKED else 8) // 8)

    ways = _options(table, counts, stored)
    least = dict.fromkeys(counts, widths[0])
    smallest, allowed = size(least), job.recipe.size_bytes or 0
    _check_size(job, smallest, lambda: size(dict.fromkeys(counts, widths[-1])))
    lowest = solver.total(ways, least)[0]
    limit = allowed - smallest + lowest
    chosen = solver.choose(ways, limit)
    while (reached := size(chosen)) > allowed:
        limit -= reached - allowed
        chosen = solver.choose(ways, limit) if limit > lowest else least
    bits = sum(chosen[name] * count for name, count in counts.items())
    return chosen, {"avg_bits": bits / sum(counts.values()), "file_bytes": reached}


def _options(
    table: Table, counts: Mapping[str, int], cost: Callable[[int, int], int]
) -> dict[str, list[Option]]:
    return {
        name: [Option(bits, cost(bits, count), e.noise) for bits, e in table[name].items()]
        for name, count in counts.items()
    }


def _describe(job: Job, table: Table, chosen: Mapping[str, int]) -> dict[str, Any]:
    noise = sum(table[name][bits].noise for name, bits in chosen.items())
    widest = solver.widths(job.backend.TARGET)[-1]
    return {
        "limit": job.recipe.weight_limit,
        "chosen": dict(chosen),
        "all_widest": all(bits == widest for bits in chosen.values()),
        # Of the free layers' weights, were their effects independent.
        "predicted_sqnr_db": -10 * math.log10(noise) if noise > 0 else None,
    }


def plan_with(
    job: Job, graph: Graph, chosen: Mapping[str, int], table: Table | None = None
) -> Plan:
    """Return the plan with these weight bits and, with a table, their reasons."""
    from dfqc.compiler.plan import Choice, make_plan

    recipe = job.recipe

    def reason(name: str, bits: int) -> str:
        alone = table[name][bits].sqnr_db if table else None
        effect = "" if alone is None else f": alone it leaves the output {alone:.1f} dB"
        return f"w{bits} chosen under {recipe.weight_limit}{effect}"

    choices = {name: Choice(bits, reason(name, bits)) for name, bits in chosen.items()}
    return make_plan(
        graph,
        job.backend.TARGET,
        recipe.asked_bits,
        recipe.rules,
        ends=recipe.ends_bits,
        chosen=choices,
    )


def list_free(job: Job, plan: Plan) -> tuple[str, ...]:
    """Return the layers whose weight bits may be chosen."""
    return solver.free_layers(plan, job.recipe.rules, ends=job.recipe.ends_bits)


def _weight_counts(graph: Graph, names: Sequence[str]) -> dict[str, int]:
    return {name: graph.module.get_parameter(f"{name}.weight").numel() for name in names}


def _grids(graph: Graph, plan: Plan, calib: CalibSet, context: Context) -> dict[str, QParams]:
    """Return activation grids like those of the file to come: they decide which nodes it needs."""
    from dfqc.compiler.quantize import rtn

    few = dataclasses.replace(calib, images=calib.images[:_RANGE_IMAGES])
    grids, _ = rtn.activation_grids(
        graph, few, plan, rtn.Options.model_validate({}), device=device_of(context)
    )
    return grids


def file_bytes(
    job: Job,
    graph: Graph,
    facts: Mapping[str, Any],
    plan: Plan,
    grids: Mapping[str, QParams] | None = None,
) -> int:
    """Return the size of the lowered file; without grids, all of them have scale 1 and zero 0."""
    from dfqc.compiler.quantize.rtn import layer_bias, round_weight

    acts = grids or {name: QParams(1.0, 0) for name in plan.quantizers}
    weights: dict[str, QTensor] = {}
    biases: dict[str, Tensor] = {}
    for name, layer in plan.layers.items():
        if layer.weight is None:
            continue
        module = graph.module.get_submodule(name)
        weights[name] = round_weight(module, layer, acts, "minmax")
        bias = layer_bias(module)
        if bias is not None:
            biases[name] = bias
    state = QuantState(plan, weights, biases, acts)
    model: bytes = job.backend.lower(graph, state, metadata=describe_file(job, facts, plan)).model
    return len(model)
