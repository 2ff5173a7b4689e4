"""What the stages that write ONNX do: a context in, the float or the quantized model out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dfqc.compiler import machine
from dfqc.compiler.contracts import Lowered
from dfqc.compiler.driver import Context
from dfqc.compiler.job import Job
from dfqc.compiler.spec import Plan
from dfqc.compiler.stages import FACTS
from dfqc.compiler.storage import FLOAT_MODEL, load_json

if TYPE_CHECKING:
    pass


def export_float(context: Context) -> bytes:
    """Write the float model that the engine is compared with: the user's, not equalized."""
    from dfqc.compiler.passes.fold import fold as fold_graph

    model: bytes = context.settings.backend.lower_float(fold_graph(context.value("trace")))
    return model


def lower(context: Context) -> tuple[Lowered, dict[str, int]]:
    """Write the model as the target wants it; beside it, the sizes of the models."""
    from dfqc.compiler.sizes import ideal_bytes

    job: Job = context.settings
    graph, state = context.value("fold"), context.value("correct")
    facts = load_json(context.path("trace", FACTS))
    lowered: Lowered = job.backend.lower(
        graph, state, metadata=file_metadata(job, facts, state.plan)
    )
    sizes = {
        "float_bytes": context.path("float", FLOAT_MODEL).stat().st_size,
        "model_bytes": len(lowered.model),
        "ideal_bytes": ideal_bytes(graph, state),
    }
    return lowered, sizes


def file_metadata(job: Job, facts: Mapping[str, Any], plan: Plan) -> dict[str, str]:
    """Return what the file says of itself: enough to trace it back, and to feed it rightly."""
    image = facts["image"]
    metadata = {
        "dfqc.version": str(machine.version("dfqc")),
        "dfqc.target": job.recipe.target,
        "dfqc.bits": job.recipe.bits,
        "dfqc.seed": str(job.recipe.seed),
        "dfqc.recipe_sha256": job.recipe_digest(),
        "dfqc.source_sha256": facts["sha256"],
        "dfqc.input": "RGB / 255, resized, center-cropped, (x - mean) / std, NCHW float32",
        "dfqc.input_size": "x".join(map(str, image["size"])),
        "dfqc.resize": str(image["resize"] or ""),
        "dfqc.mean": ",".join(map(str, image["mean"])),
        "dfqc.std": ",".join(map(str, image["std"])),
    }
    if not plan.quantizers and any(layer.weight for layer in plan.layers.values()):
        metadata["dfqc.weight_only"] = "true"
    return metadata
