"""How much of the channels goes for a limit on the file: a context in, the part and why out."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from dfqc.compiler import plugins
from dfqc.compiler.batches import make_images
from dfqc.compiler.driver import Context
from dfqc.compiler.errors import DfqcError
from dfqc.compiler.job import Job
from dfqc.compiler.options import plugin_options

if TYPE_CHECKING:
    from torch import Tensor

    from dfqc.compiler.graph import Graph
    from dfqc.compiler.spec import Plan

log = logging.getLogger("dfqc.prune")

_IMAGES = 32  # that fit the batch norms; on noise, strong pruning looks harmless
_PACKED = 4
_RESERVES = 4  # grids of activations, which need images, add nodes and constants to the file


def choose_part(context: Context, original: Graph) -> tuple[float, dict[str, Any]]:
    """Return the part of the channels to remove so that --size costs least, and the trade-offs.

    Raises:
        UsageError: pruning and few bits together do not reach the size.
    """
    from dfqc.compiler import joint
    from dfqc.compiler.passes.restore import restore
    from dfqc.compiler.plan import make_plan
    from dfqc.compiler.pruning import choose_channels, rank_once, restoring
    from dfqc.compiler.stages import model_facts
    from dfqc.compiler.stages_allocate import RESERVE, file_bytes, list_free, plan_with

    job: Job = context.settings
    recipe, target = job.recipe, job.backend.TARGET
    facts = model_facts(original) | {"sha256": "0" * 64}
    curves = rank_once(recipe, original)

    def cut(part: float) -> Graph | None:
        asked = recipe.model_copy(update={"prune": part, "prune_by": "error"})
        try:
            keep, _ = choose_channels(asked, original, curves)
        except DfqcError as error:
            if part == min(p for p in joint.PARTS if p):
                raise  # nothing can go at all: said as for any other part
            log.info("prune: not %g of the channels: %s", part, error)
            return None
        return restore(original, keep, restoring(recipe))

    def plan_at(folded: Graph, bits: int) -> Plan:
        base = make_plan(folded, target, recipe.asked_bits, recipe.rules, ends=recipe.ends_bits)
        return plan_with(job, folded, dict.fromkeys(list_free(job, base), bits))

    def size(folded: Graph, plan: Plan) -> int:
        return file_bytes(job, folded, facts, plan) + _RESERVES * RESERVE * len(plan.quantizers)

    points = joint.measure(
        *(original, _images(context), cut, plan_at, size),
        widths=_widths(job),
        progress=context.progress(),
    )
    chosen = joint.choose(points, recipe.size_bytes or 0)
    log.info("prune: %g of the channels go for --size %s", chosen.part, recipe.size)
    return chosen.part, {
        "limit_bytes": recipe.size_bytes,
        "chosen": dataclasses.asdict(chosen),
        "points": joint.to_json(points),
    }


def _widths(job: Job) -> list[int]:
    """Return, of all widths that take the same room in the file, the widest."""
    from dfqc.compiler.allocate import widths

    target = job.backend.TARGET
    room = {
        8 if bits > _PACKED or not target.packed_int4 else _PACKED: bits
        for bits in sorted(widths(target))
    }
    return list(room.values())


def _images(context: Context) -> Tensor:
    """Make images by which networks are compared: before there is a calibration set."""
    from dfqc.compiler.graph import has_batch_norm
    from dfqc.compiler.stages_calib import MATCHED

    if has_batch_norm(context.value("trace")):
        name, given = "zeroq", MATCHED
    else:
        log.warning(
            "prune: the model has no batch norm to make images for, so the part of the channels is "
            "chosen on noise, on which strong pruning looks better than it is"
        )
        name, given = "noise", {"kind": "pink"}
    options = plugin_options(plugins.load("synthesizer", name), name, "quick", given)
    return make_images(context, name, options, _IMAGES).images
