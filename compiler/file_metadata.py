"""What a model file says of itself: a job, the facts of its trace and the plan in, strings out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfqc.compiler import machine
from dfqc.compiler.job import Job
from dfqc.compiler.spec import Plan


def describe_file(job: Job, facts: Mapping[str, Any], plan: Plan) -> dict[str, str]:
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
    if job.recipe.trt_base != "fp32":
        metadata["dfqc.base"] = job.recipe.trt_base
    if (zeros := job.recipe.zeros) is not None:
        text = ":".join(map(str, zeros)) if isinstance(zeros, tuple) else str(zeros)
        metadata["dfqc.sparsity"] = text
    if not plan.quantizers and any(layer.weight for layer in plan.layers.values()):
        metadata["dfqc.weight_only"] = "true"
    return metadata
