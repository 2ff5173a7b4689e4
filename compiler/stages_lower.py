"""What the stages that write ONNX do: a context in, the float or the quantized model out."""

from __future__ import annotations

from dfqc.compiler.contracts import Lowered
from dfqc.compiler.driver import Context
from dfqc.compiler.job import Job
from dfqc.compiler.stages import FACTS
from dfqc.compiler.storage import FLOAT_MODEL, load_json


def export_float(context: Context) -> bytes:
    """Write the float model that the engine is compared with: the user's, not equalized."""
    from dfqc.compiler.passes.fold import fold as fold_graph

    model: bytes = context.settings.backend.lower_float(fold_graph(context.value("trace")))
    return model


def lower(context: Context) -> tuple[Lowered, dict[str, int]]:
    """Write the model as the target wants it; beside it, the sizes of the models."""
    from dfqc.compiler.file_metadata import describe_file
    from dfqc.compiler.sizes import ideal_bytes

    job: Job = context.settings
    graph, state = context.value("fold"), context.value("correct")
    facts = load_json(context.path("trace", FACTS))
    lowered: Lowered = job.backend.lower(
        graph, state, metadata=describe_file(job, facts, state.plan)
    )
    sizes = {
        "float_bytes": context.path("float", FLOAT_MODEL).stat().st_size,
        "model_bytes": len(lowered.model),
        "ideal_bytes": ideal_bytes(graph, state),
    }
    return lowered, sizes
