"""Pruning in a build: the package is smaller, checked against the original, and says how."""

import csv
import json
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import models
from command import QUICK, Workspace, build, labelled_by_float, run, stored_stages
from dfqc.compiler import stages_prune
from dfqc.compiler.channels import find_groups
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import count_macs, count_params, layer_nodes
from dfqc.compiler.passes import prune
from dfqc.compiler.passes.restore import Options, restore
from dfqc.compiler.pruning import find_kept_outputs
from dfqc.compiler.recipe import make_recipe

MEAN = ("--quantizer-option", "mean_fix=true")
UDFC = ("--prune", "0.3", "--quantizer", "udfc", "--bits", "w6a32")


def weights_of(path):
    """Return the stored weight of every layer, by the type of the node that reads it."""
    model = onnx.load(path)
    tensors = {t.name: t for t in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        name = node.input[1]
        while name not in tensors:
            name = producers[name].input[0]
        found[node.name or node.output[0]] = numpy_helper.to_array(tensors[name])
    return list(found.values())


def written_sparsity(package):
    """Return what the file says of its zeros: engines that can skip them read it."""
    model = onnx.load(package / "model.onnx")
    return {entry.key: entry.value for entry in model.metadata_props}.get("dfqc.sparsity")


def predict(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def test_pruned_and_rounded_in_closed_form_through_to_the_engine(shared, capsys):
    labelled = labelled_by_float(shared)
    manifest = build(capsys, shared, *UDFC, "--eval-data", labelled)
    assert manifest["status"] == "passed"
    assert manifest["parity"]["argmax_agreement"] >= 99
    about = manifest["pruning"]
    assert (about["method"], about["criterion"]) == ("uniform", "l2")
    assert about["restored_by"] == "udfc (patches)"
    assert about["refit"] is None
    assert about["not_restored"] == []
    cut = {g["name"]: (g["channels_before"], g["channels_after"]) for g in about["groups"]}
    assert cut == {"layer1.conv1": (8, 6), "layer2.conv1": (16, 12)}
    assert {"name": "conv1", "reason": "channels of a residual sum"} in about["left"]
    # Counted here by hand: 3x3 kernels without biases, their batch norms with two values each.
    graph = models.trace_tiny("residual")
    lost = 2 * (9 * 8 + 9 * 8 + 2) + 4 * (9 * 8 + 9 * 16 + 2)
    assert about["params_before"] == manifest["model"]["params"] == count_params(graph)
    assert about["params_after"] == about["params_before"] - lost
    saved = 2 * 2 * 9 * 8 * 16 * 16 + 4 * 9 * (8 + 16) * 8 * 8
    assert about["macs_before"] == manifest["model"]["macs"] == count_macs(graph)
    assert about["macs_after"] == about["macs_before"] - saved
    shapes = [w.shape for w in weights_of(shared.root / "package" / "model.onnx")]
    assert {(6, 8, 3, 3), (8, 6, 3, 3), (12, 8, 3, 3), (16, 12, 3, 3)} <= set(shapes)
    rows = {row["name"]: row for row in manifest["layers"]}
    assert (rows["conv1"]["channels_before"], rows["conv1"]["channels_after"]) == (8, 8)
    assert (rows["layer2.conv1"]["channels_before"], rows["layer2.conv1"]["channels_after"]) == cut[
        "layer2.conv1"
    ]
    # Accuracy is that against the user's model, whose own labels these are.
    top1 = manifest["metrics"]["top1"]
    assert top1["float"] == 100
    assert 0 < top1["pruned"] < 100
    latency = manifest["metrics"]["latency_ms"]
    assert latency["pruned"] > 0 < latency["pruned_speedup"]


def test_the_control_is_the_original_and_the_package_shows_what_went(shared, capsys):
    manifest = build(capsys, shared, *UDFC, output="shown")
    folder = shared.root / "shown"
    images = models.images(4).numpy()
    with torch.no_grad():
        expected = models.build("residual")(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(predict(folder / "float.onnx", images), expected, atol=1e-4)
    assert manifest["size"]["float_bytes"] == (folder / "float.onnx").stat().st_size
    page = (folder / "report.html").read_text()
    assert "<h2>Pruning</h2>" in page
    assert "8 → 6" in page
    assert "channels of a residual sum" in page
    rows = list(csv.DictReader((folder / "layers.csv").read_text().splitlines()))
    assert (rows[1]["channels_before"], rows[1]["channels_after"]) == ("8", "6")
    shown = run(capsys, shared, "inspect", folder).out
    assert "pruning     6 of 24 channels of 2 groups removed; parameters" in shown
    recipe = folder / "recipe.yaml"
    again = run(capsys, shared, "build", "--recipe", recipe, "-o", shared.root / "again", "--json")
    assert again.json["files"]["model.onnx"] == manifest["files"]["model.onnx"]


def test_layers_that_do_not_make_up_for_what_went_are_named(shared, capsys):
    """Both sums have two producers, which no form restores; the convolutions within are."""
    given = ("--prune", "0.3", "--prune-residual", "--quantizer", "rtn", "--refit", "off")
    manifest = build(capsys, shared, *given, output="summed")
    names = ["head.fc", "layer1.conv1", "layer2.conv1", "layer2.downsample.0"]
    assert manifest["pruning"]["not_restored"] == names
    assert ", ".join(names) in (shared.root / "summed" / "report.html").read_text()
    assert "; 4 layers not restored; " in run(capsys, shared, "inspect", shared.root / "summed").out
    plan = ("plan", *shared.weights(), *QUICK, *given, "--restore", "none", "--json")
    assert run(capsys, shared, *plan).json["pruning"]["not_restored"] == []


def test_a_budget_of_work_and_weights_fitted_to_the_images(shared, capsys):
    given = ("--macs", "0.8", "--quantizer", "rtn")
    manifest = build(capsys, shared, *given, output="macs")
    about = manifest["pruning"]
    assert (about["method"], about["criterion"]) == ("macs", "moments")
    assert 0.6 * about["macs_before"] < about["macs_after"] <= 0.8 * about["macs_before"]
    scores = about["refit"]["scores"]
    assert about["refit"]["kept"] == min(scores, key=scores.get)
    assert set(scores) == {"restored", "refit"}
    assert about["refit"]["images"] == 4 * 6  # of 8 two judge; each is mirrored and shifted
    assert manifest["status"] == "passed"
    off = build(capsys, shared, *given, "--refit", "off", output="off")
    assert off["pruning"]["refit"] is None
    assert "prune" in stored_stages(off)
    assert (
        off["files"]["model.onnx"] == manifest["files"]["model.onnx"]
        if about["refit"]["kept"] == "restored"
        else off["files"]["model.onnx"] != manifest["files"]["model.onnx"]
    )


def test_zeros_of_two_in_four_reach_the_file(shared, capsys):
    manifest = build(capsys, shared, "--sparsity", "2:4", "--quantizer", "rtn", output="sparse")
    sparsity = manifest["pruning"]["sparsity"]
    assert {row["name"] for row in sparsity["left"]} == {"conv1"}  # reads three channels
    assert sparsity["fraction"] == 0.5
    assert written_sparsity(shared.root / "sparse") == "2:4"
    weights = weights_of(shared.root / "sparse" / "model.onnx")
    checked = 0
    for weight in weights:
        if weight.ndim == 4 and weight.shape[1] % 4 == 0:
            fours = weight.transpose(0, 2, 3, 1).reshape(-1, 4)
            assert ((fours != 0).sum(1) <= 2).all()
            assert (fours != 0).mean() > 0.4
            checked += 1
    assert checked == 5
    assert manifest["pruning"]["macs_after"] == manifest["pruning"]["macs_before"]
    half = build(
        capsys, shared, "--sparsity", "0.5", "--quantizer", "rtn", "--refit", "off", output="half"
    )
    assert half["pruning"]["sparsity"]["fraction"] == pytest.approx(0.5, abs=0.01)
    assert written_sparsity(shared.root / "half") == "0.5"
    codes = weights_of(shared.root / "half" / "model.onnx")
    assert np.concatenate([w.ravel() == 0 for w in codes]).mean() >= 0.49


def test_without_pruning_nothing_is_stored_and_nothing_said(shared, capsys):
    manifest = build(capsys, shared, "--quantizer", "rtn", output="whole")
    assert manifest["pruning"] is None
    assert manifest["metrics"]["latency_ms"]["pruned"] is None
    assert "Pruning" not in (shared.root / "whole" / "report.html").read_text()
    assert written_sparsity(shared.root / "whole") is None
    key = next(s["key"] for s in manifest["stages"] if s["name"] == "prune")
    (entry,) = shared.cache.glob(f"v1/objects/*/{key}")
    assert not (entry / "graph").exists()


def test_another_ratio_keeps_the_images(shared, capsys):
    build(capsys, shared, "--prune", "0.3", "--quantizer", "rtn", output="less")
    manifest = build(capsys, shared, "--prune", "0.5", "--quantizer", "rtn", output="more")
    stored = stored_stages(manifest)
    assert stored >= {"trace", "data", "synthesize", "holdout", "float"}
    assert not stored & {"prune", "plan", "refit", "quantize", "lower", "pruned"}
    rounded = build(
        capsys, shared, "--prune", "0.5", "--quantizer", "rtn", "--bits", "w4a8", output="more"
    )
    assert stored_stages(rounded) >= {"prune", "refit", "pruned", "synthesize"}


def test_a_plan_shows_channels_and_work(shared, capsys):
    given = ("plan", *shared.weights(), *QUICK, "--prune", "0.3", "--prune-layer", "layer2.*=0.5")
    plan = run(capsys, shared, *given, "--json").json
    cut = {g["name"]: g["channels_after"] for g in plan["pruning"]["groups"]}
    assert cut == {"layer1.conv1": 6, "layer2.conv1": 8}
    assert {"refit", "pruned"} <= {row["stage"] for row in plan["estimate"]}
    shown = run(capsys, shared, *given).out
    assert "pruning: 10 of 24 channels of 2 groups removed; parameters" in shown
    assert "left alone: channels of a residual sum" in shown
    assert run(capsys, shared, *given[:-4], "--json").json["pruning"] is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (("--prune", "1.5"), "--prune: got 1.5"),
        (("--prune", "auto"), "--prune auto: removes what limits ask for"),
        (("--prune", "0.3", "--macs", "0.5"), "--prune and --macs both say how much"),
        (("--prune", "0.01"), "no layer loses a channel"),
        (("--params", "0.01"), "expected at least 0"),
        (("--params", "1.0"), "the model keeps --params 1 as it is; ask for less"),
        (("--prune-layer", "conv1=0.5"), "conv1: channels of a residual sum"),
        (("--prune-by", "error"), "give --prune"),
        (("--prune-layer", "layer1.conv1"), "expected GLOB=PART"),
        (("--prune-layer", "layre*=0.5"), "matches no layer"),
        (("--prune-criterion", "l1"), "--prune-criterion says which channels go, and none do"),
        (("--channel-multiple", "8"), "--channel-multiple says"),
        (("--restore", "none"), "nothing is removed"),
        (("--sparsity", "4:2"), "expected N:M"),
        (("--sparsity", "much"), "expected N:M"),
        (("--refit", "on"), "nothing is pruned"),
        (("--prune", "0.3", "--quantizer", "udfc", "--refit", "on"), "would not use what was"),
        (("--prune", "0.3", "--quantizer", "udfc", "--equalize", "cle"), "leave --equalize out"),
        (("--prune", "0.3", "--quantizer", "udfc", "--sparsity", "2:4"), "fill the zeros"),
        (("--quantizer", "udfc", "--bias-correction", "analytic"), "would count twice"),
        ((*UDFC, *MEAN, "--restore", "none", "--bias-correction", "blend"), "would count twice"),
        ((*UDFC, "--restore", "lbyl", "--quantizer-option", "compensate=users"), "patches or mom"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(shared, capsys, given, text):
    done = run(capsys, shared, "plan", *shared.weights(), *QUICK, *given)
    assert done.code == 2
    assert text in done.user_fault


def test_a_mean_that_was_not_put_back_may_be_corrected(shared, capsys):
    off = ("--quantizer-option", "mean_fix=false", "--bias-correction", "analytic")
    done = run(capsys, shared, "plan", *shared.weights(), *QUICK, *UDFC, *off)
    assert done.code == 0, done.user_fault


def test_a_network_of_which_nothing_can_go_is_not_supported(shared, capsys):
    done = run(capsys, shared, "build", *shared.weights("concat"), *QUICK, "--prune", "0.3")
    assert done.code == 4
    for reason in ("left.0: ", "inner.0: reshape splits or merges", "head.fc: channels of"):
        assert reason in done.user_fault


def test_a_recipe_in_yaml_may_leave_the_quotes_out(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a\nsparsity: 2:4\nrefit: on\nprune-layer:\n  body.*: 0.5\n")
    recipe = make_recipe({}, path)
    assert (recipe.zeros, recipe.refits) == ((2, 4), True)
    assert recipe.pruned_layers == (("body.*", 0.5),)
    path.write_text("model: a\nsparsity: 0.5\nrefit: off\n")
    recipe = make_recipe({}, path)
    assert (recipe.zeros, recipe.refits) == (0.5, False)
    with pytest.raises(UsageError, match="--sparsity"):
        make_recipe({"model": "a", "sparsity": "0"})


@pytest.mark.parametrize(("given", "fits"), [
    ({}, False),
    ({"prune": 0.3}, True),
    ({"sparsity": "2:4"}, True),
    ({"prune": 0.3, "synth": "noise"}, False),  # noise tells nothing
    ({"prune": 0.3, "synth": "noise", "refit": "on"}, True),
    ({"prune": 0.3, "quantizer": "udfc"}, False),  # restores by itself
])  # fmt: skip
def test_weights_are_fitted_where_that_helps(given, fits):
    assert make_recipe({"model": "a", **given}).refits is fits


def test_kept_outputs_are_those_that_the_smaller_layers_have():
    graph = models.trace_tiny("depthwise")
    (group,) = [g for g in find_groups(graph) if g.prunable and not g.residual]
    decision = prune.choose(graph, prune.Options(ratio=0.3, criterion="l2"))
    kept = find_kept_outputs(graph, decision.keep)
    expected = decision.keep[group.name].tolist()
    assert group.through
    assert set(kept) == {*group.producers, *group.through}
    smaller = restore(graph, decision.keep, Options(method="none"))
    for path, rows in kept.items():
        assert len(rows) == len(smaller.module.get_submodule(path).weight)
        assert rows.tolist() == expected
    assert set(kept) < {path for path, _ in layer_nodes(graph)}


def test_a_killed_build_goes_on_from_the_pruned_model(tmp_path):
    workspace = Workspace(tmp_path)
    given = ("build", *workspace.weights(), *QUICK, "--quantizer", "rtn", "--prune", "0.3",
             "--json", "-o")  # fmt: skip
    command = workspace.command(*given, tmp_path / "package")

    def stored():
        records = workspace.cache.glob("v1/objects/*/*/artifact.json")
        return {json.loads(path.read_text())["stage"] for path in records}

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while "refit" not in stored() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "package").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert stored_stages(json.loads(done.stdout)) >= {"prune", "synthesize", "refit"}
    (tmp_path / "whole").mkdir()
    whole = Workspace(tmp_path / "whole").dfqc(*given, tmp_path / "one")
    assert whole.code == 0, whole.err
    files = [json.loads(done.stdout)["files"], whole.json["files"]]
    assert files[0]["model.onnx"] == files[1]["model.onnx"]


@pytest.mark.parametrize(("gain", "warned"), [(1.0, True), (1.5, False)])
def test_pruning_that_saves_no_time_is_said(shared, capsys, monkeypatch, caplog, gain, warned):
    ratio = {"median": gain, "best": gain}
    monkeypatch.setattr("dfqc.compiler.bench.speedup", lambda reference, samples: ratio)
    given = ("--prune", "0.6", "--quantizer", "rtn", "--seed", int(10 * gain))  # nothing stored
    build(capsys, shared, *given, output=f"gain{gain}")
    assert ("try --channel-multiple 16" in caplog.text) == warned


def test_the_original_of_a_sparse_network_is_what_is_to_be_reproduced():
    original, mask = models.trace_tiny("plain"), {"stem.0": torch.ones(1, dtype=torch.bool)}
    cuts = {
        "nothing": stages_prune.Cut(),
        "channels": stages_prune.Cut(original, {"stem.0": torch.arange(3)}),
        "zeros": stages_prune.Cut(original, {}, mask),
    }
    for name, cut in cuts.items():
        values = {"prune": cut, "equalize": original}
        found = stages_prune.unpruned(SimpleNamespace(value=values.__getitem__))
        if name == "nothing":
            assert found is None
        else:
            assert (found.graph, found.keep) == (original, cut.keep)
