"""The main job on tiny nets: a state_dict in, a verified package out; resume, cache and gates."""

import csv
import hashlib
import json
import subprocess
from pathlib import Path

import onnx
import pytest
import yaml

from command import FEW, QUICK, Workspace, build, labelled_by_float, run, stored_stages
from dfqc.compiler.choice_text import describe_choice
from dfqc.compiler.package import file_faults, open_package
from dfqc.compiler.pipeline import STAGES


def test_the_manifest_has_every_field_that_others_read(shared, capsys):
    manifest = build(capsys, shared, "--eval-data", shared.images(), "--seed", "3")
    assert manifest["schema"] == 1
    assert manifest["dfqc"]
    weights = hashlib.sha256(Path(shared.weights()[0]).read_bytes()).hexdigest()
    assert manifest["model"]["sha256"] == weights
    assert manifest["model"]["source"].endswith("residual-0.pt")
    assert manifest["model"]["params"] > 0 < manifest["model"]["macs"]
    assert (manifest["target"], manifest["bits"], manifest["seed"]) == ("ort", "w8a8", 3)
    assert manifest["recipe"]["samples"] == 8
    metrics = manifest["metrics"]
    assert metrics["top1"]["images"] == 24
    for name in ("float", "simulated", "engine"):
        assert 0 <= metrics["top1"][name] <= 100
    assert 0 < metrics["agreement"]["simulated"] <= 100
    assert 0 < metrics["agreement"]["engine"] <= 100
    assert metrics["sqnr_db"] > 10
    latency = metrics["latency_ms"]
    assert latency["speedup"] == pytest.approx(latency["float"] / latency["engine"])
    assert (latency["batch"], latency["threads"]) == (1, 1)
    size = manifest["size"]
    assert 0 < size["ideal_bytes"] < size["model_bytes"] < size["float_bytes"]
    assert manifest["parity"]["argmax_agreement"] >= 99
    assert manifest["parity"]["max_abs"] >= 0
    assert manifest["parity"]["worst_layer"]
    assert manifest["calib"]["method"] == "zeroq"
    assert manifest["calib"]["images"] == 8
    assert manifest["calib"]["score"] >= 0
    assert {"name", "value", "limit", "passed"} == manifest["gates"][0].keys()
    assert [s["name"] for s in manifest["stages"]] == [stage.name for stage in STAGES]
    for stage in manifest["stages"]:
        assert {"name", "key", "seconds", "cached", "peak_rss_bytes"} == stage.keys()
        assert len(stage["key"]) == 64
    assert [row["name"] for row in manifest["layers"]][:2] == ["conv1", "layer1.conv1"]
    for row in manifest["layers"]:
        assert (row["asked"], row["exported"]) == ("w8a8", "w8a8")
        assert row["executed"] in ("QLinearConv", "QGemm")
        assert row["sqnr_db"] > 15
    assert manifest["environment"]["python"]
    assert (manifest["status"], manifest["exit_code"]) == ("passed", 0)


def test_the_package_holds_what_the_contract_lists(shared, capsys):
    manifest = build(capsys, shared)
    folder = shared.root / "package"
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files >= {
        "model.onnx", "manifest.json", "recipe.yaml", "report.html", "layers.csv",
        "calib/contact_sheet.png", "calib/quality.json", "golden.npz", "SHA256SUMS",
        "triton/residual-0/config.pbtxt", "triton/residual-0/1/model.onnx",
    }  # fmt: skip
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert set(manifest["files"]) == files - {"manifest.json", "SHA256SUMS"}
    assert file_faults(open_package(folder)) == []
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True)
    assert checked.returncode == 0
    rows = list(csv.DictReader((folder / "layers.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == [row["name"] for row in manifest["layers"]]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe == manifest["recipe"]
    assert (folder / "calib" / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")


def test_a_build_says_where_it_lies_and_which_rounding_it_kept(shared, capsys):
    kept = describe_choice(build(capsys, shared)["quantization"])
    folder = shared.root / "package"
    told = run(capsys, shared, "build", *shared.weights(), *QUICK, *FEW, "-o", folder).out
    lines = told.splitlines()  # in words, not as JSON
    assert lines[0] == f"package    {folder}"
    assert f"rounding   {kept}" in lines
    assert f"Kept as a whole: {kept}." in (folder / "report.html").read_text()
    assert f", kept: {kept}" in (folder / "MODEL_CARD.md").read_text()


def test_the_model_says_what_it_is(shared, capsys):
    manifest = build(capsys, shared)
    model = onnx.load(shared.root / "package" / "model.onnx")
    about = {p.key: p.value for p in model.metadata_props}
    assert about["dfqc.version"] == manifest["dfqc"]
    assert about["dfqc.recipe_sha256"] == manifest["recipe_sha256"]
    assert about["dfqc.source_sha256"] == manifest["model"]["sha256"]
    assert about["dfqc.input_size"] == "3x16x16"
    assert about["dfqc.mean"] == "0.5,0.4,0.3"


def test_a_second_identical_build_hits_every_stage_and_loads_no_torch(shared, capsys):
    first = build(capsys, shared)
    code = (
        "import sys; from dfqc.compiler.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "sys.exit('torch was loaded' if 'torch' in sys.modules else code)"
    )
    command = shared.command(
        "build", *shared.weights(), *QUICK, *FEW, "-o", shared.root / "second", "--json"
    )
    done = subprocess.run(
        [command[0], "-c", code, *command[3:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    second = json.loads(done.stdout)
    assert stored_stages(second) == {stage.name for stage in STAGES}
    models = [shared.root / name / "model.onnx" for name in ("package", "second")]
    assert models[0].read_bytes() == models[1].read_bytes()
    assert first["metrics"] == second["metrics"]


def test_two_cold_builds_with_one_seed_give_the_same_bytes(tmp_path, capsys):
    digests = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        manifest = build(capsys, Workspace(tmp_path / name), "--bits", "w4a4")
        assert stored_stages(manifest) <= {s.name for s in STAGES if s.save is None}  # derived ones
        digests.append(manifest["files"]["model.onnx"]["sha256"])
    assert digests[0] == digests[1]


def test_a_recipe_makes_the_same_model_again(shared, capsys):
    layer = ("--layer", "head.*=w8a8")
    manifest = build(capsys, shared, "--bits", "w4a8", *layer, output="original")
    recipe = shared.root / "original" / "recipe.yaml"
    done = run(capsys, shared, "build", "--recipe", recipe, "-o", shared.root / "again", "--json")
    assert done.code == 0, done.err
    assert done.json["files"]["model.onnx"] == manifest["files"]["model.onnx"]


def test_a_change_keeps_the_stages_it_does_not_touch(shared, capsys):
    build(capsys, shared)
    manifest = build(capsys, shared, "--bits", "w4a4", output="other")
    assert stored_stages(manifest) >= {"trace", "data", "synthesize", "holdout", "float"}
    assert not stored_stages(manifest) & {"plan", "quantize", "correct", "lower"}
    manifest = build(capsys, shared, "--bits", "w4a4", "--max-drop", "100", output="other")
    assert stored_stages(manifest) == {stage.name for stage in STAGES}  # a gate costs nothing


def test_equalizing_keeps_the_images_and_the_float_model(shared, capsys):
    build(capsys, shared)
    manifest = build(capsys, shared, "--equalize", "cle", output="other")
    assert stored_stages(manifest) >= {"trace", "data", "synthesize", "holdout", "float"}
    assert not stored_stages(manifest) & {"plan", "quantize", "correct", "lower"}


@pytest.mark.parametrize(
    ("net", "bits"),
    [
        ("plain", "w4a4"),
        ("depthwise", "w4a4"),
        ("concat", "w4a8"),
        ("pre_activation", "w8a8"),
        ("residual", "w4a16"),
    ],
)
def test_structures_and_bits(shared, capsys, net, bits):
    manifest = build(capsys, shared, "--bits", bits, net=net, output=f"{net}-{bits}")
    assert manifest["status"] == "passed"
    layers = manifest["layers"]
    ends = "w8a16" if bits == "w4a16" else "w8a8"
    for row in layers:
        assert row["asked"] == (ends if row in (layers[0], layers[-1]) else bits)
        in_float = row["exported"].endswith(("a16", "a32"))
        assert in_float == ("float" in row["executed"].lower())


def test_without_batch_norms_noise_calibrates(shared, capsys):
    manifest = build(capsys, shared, "--synth", "noise", net="no_norm", output="no_norm")
    assert manifest["calib"]["score"] is None
    assert manifest["status"] == "passed"


def test_real_images_calibrate(shared, capsys):
    data = shared.images(40)
    manifest = build(capsys, shared, "--calib-data", data, output="real")
    assert manifest["calib"]["method"] == "images"
    assert manifest["calib"]["source"] == "images/images-40-10-0.npz"
    assert (manifest["calib"]["images"], manifest["calib"]["available"]) == (8, 40)
    other = build(capsys, shared, "--calib-data", shared.images(40, seed=1), output="real")
    assert "synthesize" not in stored_stages(other)  # content, not names, is the key


def test_ends_and_rules(shared, capsys):
    arguments = ("--bits", "w4a4", "--ends", "same", "--layer", "layer1.*=w6a6",
                 "--layer", "re:.*conv2=w3a8")  # fmt: skip
    rows = {
        row["name"]: row["asked"]
        for row in build(capsys, shared, *arguments, output="rules")["layers"]
    }
    assert rows["conv1"] == rows["head.fc"] == rows["layer2.conv1"] == "w4a4"
    assert rows["layer1.conv1"] == "w6a6"
    assert rows["layer1.conv2"] == rows["layer2.conv2"] == "w3a8"  # the last match wins


def test_assumed_preprocessing_is_said(shared, capsys):
    given = [*shared.weights()[:5], *QUICK]
    done = run(capsys, shared, "build", *given, "-o", shared.root / "assumed", "--json")
    assert done.code == 0, done.err
    for text in (done.err, done.json["notes"][0]):
        assert "assumed to be ImageNet's: mean 0.485,0.456,0.406" in text
        assert "input 3x16x16" in text
        assert "--mean, --std, --input-size and --resize" in text
    for verb in ("plan", "synth"):  # also where the trace is stored
        output = () if verb == "plan" else ("-o", shared.root / "assumed.npz")
        assert "assumed to be ImageNet's" in run(capsys, shared, verb, *given, *output).err
    assert "assumed" not in run(capsys, shared, "plan", *shared.weights(), *QUICK).err


def test_a_small_data_set_calibrates_as_a_whole(shared, capsys):
    arguments = (*shared.weights(), "--calib-data", shared.images(40), "--threads", "1")
    output = ("-o", shared.root / "small", "--json")
    done = run(capsys, shared, "build", *arguments, *output)
    assert done.code == 0, done.err
    assert "holds 40 images: all of them calibrate (256 are usual" in done.err
    assert done.json["calib"]["images"] == done.json["recipe"]["samples"] == 40


def test_float_top1_is_the_models_own(shared, capsys):
    manifest = build(capsys, shared, "--eval-data", labelled_by_float(shared), output="labelled")
    assert manifest["metrics"]["top1"]["float"] == 100.0


def test_plan_does_no_work_and_says_what_would_be_done(workspace, capsys):
    done = run(
        capsys, workspace, "plan", *workspace.weights(), *QUICK, "--bits", "w4a4", "--explain",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    plan = done.json
    assert plan["layers"][0]["name"] == "conv1"
    assert plan["seconds"] > 0 < plan["peak_bytes"]
    assert {row["stage"] for row in plan["estimate"]} >= {"synthesize", "quantize", "bench"}
    status = {row["name"]: row["status"] for row in plan["stages"]}
    assert status["plan"] == "hit"
    assert status["synthesize"] == "miss"
    stages = {json.loads(p.read_text())["stage"] for p in workspace.cache.rglob("artifact.json")}
    assert stages == {"trace", "prune", "plan", "data"}
    text = run(
        capsys, workspace, "plan", *workspace.weights(), *QUICK, "--bits", "w4a4", "--explain"
    ).out
    assert "layer1.conv1" in text
    assert "estimate:" in text
    assert "never made for this model" in text


def test_explain_names_the_field_that_differs(shared, capsys):
    build(capsys, shared)
    given = ("plan", *shared.weights(), *QUICK, *FEW, "--explain", "--json")
    rows = {r["name"]: r for r in run(capsys, shared, *given, "--samples", "9").json["stages"]}
    assert rows["trace"]["status"] == "hit"
    assert rows["synthesize"]["reasons"] == ["options.samples: 8 -> 9"]
    assert rows["quantize"]["status"] == "waits"
    rows = {r["name"]: r for r in run(capsys, shared, *given).json["stages"]}
    assert {row["status"] for row in rows.values()} == {"hit", "derived"}


def test_an_earlier_package_is_replaced(shared, capsys):
    for bits in ("w8a8", "w4a4"):
        manifest = build(capsys, shared, "--bits", bits, output="replaced")
        assert open_package(shared.root / "replaced").manifest["bits"] == manifest["bits"] == bits


def test_verify_eval_bench_and_inspect_read_what_build_wrote(shared, capsys):
    build(capsys, shared)
    folder = shared.root / "package"
    verified = run(capsys, shared, "verify", folder, "--json")
    assert verified.code == 0, verified.err
    assert verified.json["failures"] == []
    scored = run(capsys, shared, "eval", folder, "--data", shared.images(), "--json")
    assert scored.json["top1"]["engine"]["images"] == 24
    timed = run(capsys, shared, "bench", folder, "--runs", "5", "--threads", "1", "--json")
    assert timed.code == 0, timed.err
    inspected = run(capsys, shared, "inspect", folder, "--json")
    assert inspected.json["bits"] == "w8a8"
    (folder / "layers.csv").write_text("other")
    assert run(capsys, shared, "verify", folder, "--json").code == 3


def test_no_bias_correction_reaches_the_quantizer_and_the_manifest(shared, capsys):
    """Neither before the learning nor behind it."""
    given = ("--bits", "w4a4", "--bias-correction", "none")
    given += ("--quantizer-option", "lr_bias=0", "--quantizer-option", "tune_iterations=0")
    about = build(capsys, shared, *given, output="uncorrected")["quantization"]["bias_correction"]
    nothing = {"method": "none", "variance": "keep"}
    assert about == {**nothing, "before": nothing}
