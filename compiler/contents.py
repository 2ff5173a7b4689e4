"""The files of a package: a finished build and its manifest in, paths and bytes by name out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfqc.compiler.job import model_name
from dfqc.compiler.manifest import assemble
from dfqc.compiler.package import FLOAT_MODEL, GOLDEN, MODEL, to_json, write_package
from dfqc.compiler.pipeline import Build
from dfqc.compiler.report import layers_csv, report_html
from dfqc.compiler.stages_calib import SHEET
from dfqc.compiler.stages_engine import PARITY
from dfqc.compiler.storage import INFO
from dfqc.compiler.triton import triton_repository


def write_build(build: Build) -> dict[str, Any]:
    """Write the package of a finished build and return its final manifest."""
    manifest = assemble(build)
    return write_package(build.job.output, manifest, package_contents(build, manifest))


def package_contents(build: Build, manifest: Mapping[str, Any]) -> dict[str, Path | bytes]:
    """Return what goes into the package beside manifest and checksums."""
    job, model = build.job, build.file("lower", MODEL)
    sheet = build.file("synthesize", SHEET)
    contents: dict[str, Path | bytes] = {
        MODEL: model,
        FLOAT_MODEL: build.file("float", FLOAT_MODEL),
        GOLDEN: build.file("golden", GOLDEN),
        "recipe.yaml": _recipe_yaml(manifest["recipe"]),
        "report.html": report_html(manifest, sheet.read_bytes()).encode(),
        "layers.csv": layers_csv(manifest).encode(),
        "calib/contact_sheet.png": sheet,
        "calib/quality.json": (to_json(_quality(build, manifest)) + "\n").encode(),
    }
    if job.runtime is not None:
        contents["parity.json"] = build.file("verify", PARITY)
    on_cpu = job.recipe.target != "trt"
    repository = triton_repository(model_name(job.recipe), model.read_bytes(), cpu=on_cpu)
    return contents | dict(repository)


def _quality(build: Build, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the manifest says of the calibration images, and the scores in all detail."""
    stages = {"calibration_set": "synthesize", "held_out_set": "holdout"}
    scores = {name: build.data(stage, INFO)["info"]["score"] for name, stage in stages.items()}
    return {**manifest["calib"], **scores}


def _recipe_yaml(recipe: Mapping[str, Any]) -> bytes:
    import yaml

    text: str = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    return ("# The resolved recipe: dfqc build --recipe recipe.yaml makes this package again.\n"
            + text).encode()  # fmt: skip
