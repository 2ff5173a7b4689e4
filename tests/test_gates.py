import json

from command import build, labelled_by_float, run


def failing_gate(capsys, shared, *arguments, code, name):
    manifest = build(capsys, shared, *arguments, output="gated", code=code)
    assert (manifest["status"], manifest["exit_code"]) == ("failed", code)
    gate = next(g for g in manifest["gates"] if g["name"] == name)
    assert gate["passed"] is False
    written = json.loads((shared.root / "gated" / "manifest.json").read_text())
    assert written == manifest
    assert (shared.root / "gated" / "model.onnx").exists()
    return gate


def test_accuracy_gate(shared, capsys):
    # Labels are what the float net says: whatever 2-bit weights get wrong is a drop.
    data = labelled_by_float(shared)
    arguments = ("--bits", "w2a8", "--ends", "same", "--eval-data", data, "--max-drop", "0")
    gate = failing_gate(capsys, shared, *arguments, code=5, name="max_drop")
    assert gate["value"] > gate["limit"] == 0


def test_accuracy_gate_without_labels_is_named_otherwise(shared, capsys):
    arguments = ("--bits", "w2a8", "--ends", "same", "--max-drop", "0")
    gate = failing_gate(capsys, shared, *arguments, code=5, name="max_drop_agreement")
    assert gate["value"] > 0


def test_speed_gate(shared, capsys):
    gate = failing_gate(capsys, shared, "--min-speedup", "1000", code=6, name="min_speedup")
    assert gate["value"] < gate["limit"] == 1000


def test_parity_gate(shared, capsys, monkeypatch):
    # An engine that computes something else: every logit is turned around.
    from dfqc.backends import ort

    honest = ort.Runner.infer
    monkeypatch.setattr(ort.Runner, "infer", lambda self, images: -honest(self, images))
    arguments = ("--seed", "77", "--max-drop", "0", "--min-speedup", "1000")
    failing_gate(capsys, shared, *arguments, code=7, name="parity")  # the gravest decides


def test_a_missing_runtime_leaves_an_unverified_package(shared, capsys, monkeypatch):
    from dfqc.backends import ort

    monkeypatch.setattr(ort, "available", lambda: (False, "not installed here"))
    manifest = build(capsys, shared, output="unverified", code=8)
    assert manifest["parity"]["passed"] is None
    assert manifest["metrics"]["latency_ms"]["engine"] is None
    assert "not installed here" in manifest["notes"][0]
    assert {s["name"] for s in manifest["stages"]}.isdisjoint({"verify", "bench"})
    monkeypatch.undo()  # a machine that has the runtime verifies it
    done = run(capsys, shared, "verify", shared.root / "unverified", "--json")
    assert done.code == 0, done.err
    assert done.json["parity"]["argmax_agreement"] == 100


def test_a_package_for_trt_is_checked_as_far_as_can_be(shared, capsys):
    build(capsys, shared, "--target", "trt", output="trt")
    folder = shared.root / "trt"
    assert (folder / "golden.npz").is_file()
    done = run(capsys, shared, "verify", folder)
    assert done.code == 8
    assert "files as written, model valid" in done.user_fault
    assert "dfqc engine" in done.user_fault
    (folder / "model.onnx").write_bytes(b"other")
    assert run(capsys, shared, "verify", folder).code == 3
