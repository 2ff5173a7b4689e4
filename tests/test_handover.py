"""What a package brings for whoever takes it, in one that `dfqc build` wrote."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from PIL import Image

from command import QUICK, SIZE, Workspace
from dfqc.compiler.cli import main
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.dataset import open_dataset
from dfqc.compiler.handover import hand_over
from dfqc.compiler.model_card import model_card
from dfqc.compiler.package import write_package
from dfqc.compiler.selftest import SCRIPT
from test_without_torch import BLOCKER
from triton_schema import parse_config


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("handover"))
    words = workspace.command(
        "build", *workspace.weights("residual"), *QUICK, "--quantizer", "rtn", "--bits", "w4a8",
        "--bake-preprocessing", "--max-drop", "0", "-o", workspace.root / "package",
    )  # fmt: skip
    # Nothing may be lost on a random net rounded to 4 bits: the gate fails, the package is written.
    assert main(words[3:]) == 5
    return workspace.root / "package"


@pytest.fixture
def package(built, tmp_path):
    return shutil.copytree(built, tmp_path / "package")


def selftest(package, tmp_path):
    """Run it as a serving team does: nothing of the compile extra, and no dfqc."""
    place = tmp_path / "site"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(BLOCKER.replace("'torch',", "'torch', 'dfqc', 'onnx',"))
    return subprocess.run(
        [sys.executable, str(package / "selftest.py")],
        env={"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


def manifest_of(package):
    return json.loads((package / "manifest.json").read_text())


def reseal(package, name):
    """Make the checksums right again around a changed file."""
    sums = (package / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256((package / name).read_bytes()).hexdigest()
    lines = [f"{digest}  {name}" if line.endswith(f"  {name}") else line for line in sums]
    (package / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def test_the_selftest_passes_with_numpy_and_onnxruntime_alone(package, tmp_path):
    done = selftest(package, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "passed   model.onnx" in done.stdout
    assert "model.uint8.onnx differs by 0," in done.stdout
    assert "'dfqc'" in (tmp_path / "site" / "sitecustomize.py").read_text()


def test_the_selftest_says_how_many_images_are_ties(package, tmp_path):
    said = re.search(r"arg-max  equal on 100.00 % of (\d+) images\n( +\d+ more)?",
                     selftest(package, tmp_path).stdout)  # fmt: skip
    outputs = np.load(package / "golden.npz")["outputs"]
    best = np.sort(outputs, axis=1)
    manifest = manifest_of(package)
    gaps = np.sort(best[:, -1] - best[:, -2])
    clear = gaps > manifest["golden"]["margin"]
    assert said
    assert int(said[1]) == clear.sum()
    assert (said[2] is None) == clear.all()
    manifest["golden"]["margin"] = float(gaps[2])
    (package / "manifest.json").write_text(json.dumps(manifest))
    reseal(package, "manifest.json")
    out = selftest(package, tmp_path).stdout
    assert f"of {len(gaps) - 3} images\n         3 more not judged: " in out


def test_the_selftest_needs_no_engine_at_build_time(package, tmp_path):
    manifest = manifest_of(package)
    manifest["preprocessing"]["baked"] |= {"max_abs": None, "tolerance": None, "passed": None}
    (package / "manifest.json").write_text(json.dumps(manifest))
    reseal(package, "manifest.json")
    assert selftest(package, tmp_path).returncode == 0


def test_the_selftest_finds_a_changed_file(package, tmp_path):
    (package / "float.onnx").write_bytes(b"something else")
    done = selftest(package, tmp_path)
    assert (done.returncode, "float.onnx was changed" in done.stderr) == (3, True)
    (package / "float.onnx").unlink()
    assert "float.onnx is missing" in selftest(package, tmp_path).stderr


def test_the_selftest_finds_another_model(package, tmp_path):
    shutil.copyfile(package / "float.onnx", package / "other.onnx")
    (package / "other.onnx").replace(package / "model.onnx")
    reseal(package, "model.onnx")
    done = selftest(package, tmp_path)
    assert done.returncode == 7
    assert "the outputs differ" in done.stderr


def test_the_selftest_script_is_valid_everywhere(package):
    assert (package / "selftest.py").read_text() == SCRIPT
    compile(SCRIPT, "selftest.py", "exec")
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", SCRIPT, re.M))
    assert imported == {"hashlib", "importlib", "json", "sys", "pathlib", "numpy"}


def test_the_checksums_cover_every_file(package):
    listed = {line.partition("  ")[2] for line in (package / "SHA256SUMS").read_text().splitlines()}
    files = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()}
    assert listed == files - {"SHA256SUMS"}
    assert {"MODEL_CARD.md", "junit.xml", "provenance.json", "selftest.py"} < listed


def test_the_failed_gate_is_in_junit_card_and_manifest(package):
    root = ElementTree.parse(package / "junit.xml").getroot()
    failed = [
        case.get("name") for case in root.iter("testcase") if case.find("failure") is not None
    ]
    assert failed == ["max_drop_agreement"]
    card = (package / "MODEL_CARD.md").read_text()
    assert "failed: max_drop_agreement" in card
    assert "do not serve it" in card
    gates = {gate["name"]: gate["passed"] for gate in manifest_of(package)["gates"]}
    assert gates == {"parity": True, "max_drop_agreement": False, "parity_baked": True}


def test_the_card_says_what_the_manifest_says(package):
    card, manifest = (package / "MODEL_CARD.md").read_text(), manifest_of(package)
    assert manifest["command"] in card
    assert f"{manifest['metrics']['agreement']['engine']:.2f} %" in card
    assert "top-1 | not measured | not measured" in card
    for name in re.findall(r"^- `([^`]+)`: ", card, re.M):
        assert (package / name).is_file(), name
    text = re.sub(r"```.*?```", "", card, flags=re.S)
    assert "None" not in text


@pytest.mark.parametrize("resize", [None, 17, 24])
@pytest.mark.parametrize("shape", [(20, 30), (31, 18), (16, 16), (9, 40)])
def test_the_code_on_the_card_prepares_as_dfqc_does(package, shape, resize, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    (package / "data" / "0").mkdir(parents=True)
    Image.fromarray(pixels).save(package / "image.jpg")
    shutil.copyfile(package / "image.jpg", package / "data" / "0" / "image.jpg")
    image = manifest_of(package)["image"] | {"resize": resize}
    card = model_card(manifest_of(package) | {"image": image})
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(package)
    namespace = {}
    exec(code, namespace)
    spec = ImageSpec(SIZE, tuple(image["mean"]), tuple(image["std"]), resize)
    ((expected, _),) = open_dataset(package / "data", spec).batches(1)
    np.testing.assert_array_equal(namespace["images"], expected)
    assert 0 <= int(capsys.readouterr().out.strip(" []\n")) < 10


def test_the_provenance_lists_what_is_there(package):
    statement = json.loads((package / "provenance.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    for subject in statement["subject"]:
        data = (package / subject["name"]).read_bytes()
        assert subject["digest"] == {"sha256": hashlib.sha256(data).hexdigest()}
    made = statement["predicate"]["buildDefinition"]
    inputs = {entry["name"]: entry for entry in made["resolvedDependencies"] if "name" in entry}
    weights = made["externalParameters"]["recipe"]["model"]
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    assert inputs["model"]["digest"] == {"sha256": digest}
    assert set(inputs) == {"model", "architecture"}


def test_the_provenance_takes_its_time_from_the_environment(monkeypatch):
    from dfqc.compiler.provenance import make_statement

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    details = make_statement({}, {})["predicate"]["runDetails"]
    assert details["metadata"] == {"finishedOn": "1970-01-02T00:00:00Z"}


def test_triton_serves_the_model_of_pixels(package):
    (config,) = (package / "triton").glob("*/config.pbtxt")
    parsed = parse_config(config.read_text())
    assert parsed.name == config.parent.name
    assert list(parsed.input[0].dims) == [*SIZE[1:], SIZE[0]]
    served = config.parent / "1" / "model.onnx"
    assert served.read_bytes() == (package / "model.uint8.onnx").read_bytes()


def test_verify_compares_the_model_of_pixels_too(package, capsys):
    capsys.readouterr()
    assert main(["verify", str(package), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["baked"]["passed"] is True
    model = onnx.load(package / "model.uint8.onnx")
    (mean,) = [t for t in model.graph.initializer if t.name.endswith("preprocessing.mean")]
    mean.CopyFrom(onnx.numpy_helper.from_array(np.float32([0.9] * 3), mean.name))
    contents = {p: package / p for p in manifest_of(package)["files"]}
    contents |= {p: (package / p).read_bytes() for p in contents}
    contents["model.uint8.onnx"] = model.SerializeToString()
    manifest = {k: v for k, v in manifest_of(package).items() if k != "files"}
    write_package(package, manifest, contents)
    assert main(["verify", str(package)]) == 7
    assert "model.uint8.onnx and model.onnx differ by" in capsys.readouterr().err


def test_a_package_is_finished_again_with_an_engine(package):
    manifest = {k: v for k, v in manifest_of(package).items() if k != "files"}
    contents = {p: (package / p).read_bytes() for p in manifest_of(package)["files"]}
    files = hand_over(manifest, contents, name="net", cpu=False, engine=b"plan", batches=(1, 16))
    assert [p for p in files if p.startswith("triton/")] == [
        "triton/net/config.pbtxt",
        "triton/net/1/model.plan",
    ]
    config = parse_config(files["triton/net/config.pbtxt"].decode())
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 16)
    assert config.input[0].name == "input"  # engines are built from model.onnx
    subjects = {s["name"] for s in json.loads(files["provenance.json"])["subject"]}
    assert subjects == set(files) - {"provenance.json"}
