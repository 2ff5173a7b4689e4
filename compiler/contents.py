"""The files of a package: a finished build and its manifest in, paths and bytes by name out."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from dfqc.compiler.artifact import hash_file
from dfqc.compiler.baking import BAKED, INPUT, bake_preprocessing, compare_baked
from dfqc.compiler.job import model_name
from dfqc.compiler.junit import junit_xml
from dfqc.compiler.manifest import assemble
from dfqc.compiler.model_card import model_card
from dfqc.compiler.package import FLOAT_MODEL, GOLDEN, MODEL, to_json, write_package
from dfqc.compiler.pipeline import Build
from dfqc.compiler.provenance import make_statement
from dfqc.compiler.report import layers_csv, report_html
from dfqc.compiler.selftest import SCRIPT, SELFTEST
from dfqc.compiler.stages import FACTS, image_spec
from dfqc.compiler.stages_calib import SHEET
from dfqc.compiler.stages_engine import PARITY
from dfqc.compiler.storage import INFO
from dfqc.compiler.triton import triton_repository
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
        return write_package(build.job.output, manifest, complete(build, manifest, contents))


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
    return found | compare_baked(build.job.backend, plain, path, inputs, image)


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


def complete(
    build: Build, manifest: Mapping[str, Any], contents: Mapping[str, Path | bytes]
) -> dict[str, Path | bytes]:
    """Add what whoever takes the package needs: server configuration, self-test, card, proofs."""
    recipe = build.job.recipe
    served = _read(contents.get(BAKED, contents[MODEL]))
    more: dict[str, Path | bytes] = dict(contents)
    more |= triton_repository(model_name(recipe), served, cpu=recipe.target != "trt")
    more[SELFTEST] = SCRIPT.encode()
    more["junit.xml"] = junit_xml(manifest)
    names = [*more, "MODEL_CARD.md", "provenance.json"]
    more["MODEL_CARD.md"] = model_card(manifest, names).encode()
    statement = make_statement(manifest, {name: _digest(what) for name, what in more.items()})
    more["provenance.json"] = (to_json(statement) + "\n").encode()
    return more


def _read(content: Path | bytes) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def _digest(content: Path | bytes) -> str:
    return hash_file(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()


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
