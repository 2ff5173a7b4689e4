"""The files of a package: a finished build and its manifest in, paths and bytes by name out."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from dfqc.compiler.baking import BAKED, INPUT, bake_preprocessing, compare_baked
from dfqc.compiler.handover import hand_over
from dfqc.compiler.job import model_name
from dfqc.compiler.manifest import assemble
from dfqc.compiler.package import FLOAT_MODEL, GOLDEN, MODEL, to_json, write_package
from dfqc.compiler.pipeline import Build
from dfqc.compiler.report import layers_csv, report_html
from dfqc.compiler.stages import FACTS, image_spec
from dfqc.compiler.stages_calib import SHEET
from dfqc.compiler.stages_engine import PARITY
from dfqc.compiler.storage import INFO
from dfqc.compiler.verify_package import golden_limits, read_golden


def write_build(build: Build) -> dict[str, Any]:
    """Write the package of a finished build and return its final manifest."""
    with tempfile.TemporaryDirectory(prefix="dfqc-") as folder:
        baked = bake_build(build, Path(folder)) if build.job.recipe.bake_preprocessing else None
        manifest = assemble(build, baked)
        limits = golden_limits(
            read_golden(build.file("golden", GOLDEN)),
            onnx.load(build.file("lower", MODEL)),
            manifest,
        )
        manifest["golden"] = limits
        contents = package_contents(build, manifest)
        if baked is not None:
            contents[BAKED] = Path(folder) / BAKED
        recipe = build.job.recipe
        name, on_cpu = model_name(recipe), recipe.target != "trt"
        files = hand_over(manifest, contents, name=name, cpu=on_cpu)
        return write_package(build.job.output, manifest, files)


def bake_build(build: Build, folder: Path) -> dict[str, Any]:
    """Write the model that takes pixels, run it beside the other, and say how they compare."""
    plain, path = build.file("lower", MODEL), folder / BAKED
    image = image_spec(build.data("trace", FACTS)["image"])
    path.write_bytes(bake_preprocessing(onnx.load(plain), image).SerializeToString())
    channels, height, width = image.size
    found: dict[str, Any] = {
        "file": BAKED,
        "input": {"name": INPUT, "type": "uint8", "shape": ["n", height, width, channels]},
        "max_abs": None,
        "tolerance": None,
        "images": 0,
        "passed": None,
    }
    if build.job.runtime is None:
        return found
    inputs = read_golden(build.file("golden", GOLDEN)).inputs
    return found | compare_baked(build.job.backend.open_runner, plain, path, inputs, image)


def package_contents(build: Build, manifest: Mapping[str, Any]) -> dict[str, Path | bytes]:
    """Return what a build leaves: the models, what was measured, and the report."""
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
    return contents


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
