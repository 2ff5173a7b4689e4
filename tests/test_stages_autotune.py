"""Layers left in float in a build: timed, said in the package, refused where nothing runs."""

import numpy as np

from command import QUICK, build, run, stored_stages
from dfqc.backends import ort
from dfqc.compiler import stages_autotune
from dfqc.compiler.stages_autotune import time_plans


def test_a_build_leaves_out_what_timing_says(shared, capsys, monkeypatch):
    # Real engines are made and run; the clock alone is ours: the classifier is slow in integers.
    def slow_end(job, graph, plans):
        assert {len(times) for times in time_plans(job, graph, plans).values()} >= {40}
        slow = {name: plan.layers["head.fc"].weight is not None for name, plan in plans.items()}
        return {name: np.full(9, 2.0 if slow[name] else 1.0) for name in plans}

    monkeypatch.setattr(stages_autotune, "time_plans", slow_end)
    manifest = build(capsys, shared, "--autotune", output="tuned")
    about = manifest["autotune"]
    assert about["in_float"] == ["head.fc"]
    assert [trial["what"] for trial in about["trials"] if trial["kept"]] == ["linear layers"]
    assert len(about["trials"]) > 2
    rows = {row["name"]: row for row in manifest["layers"]}
    assert rows["head.fc"]["exported"] == "w32a32"
    assert rows["head.fc"]["reason"] == "faster in float here (--autotune)"
    others = {row["executed"] for name, row in rows.items() if name != "head.fc"}
    assert others == {"QLinearConv"}
    assert manifest["parity"]["passed"]
    report = (shared.root / "tuned" / "report.html").read_text()
    assert "Layers that are faster in float" in report
    again = build(capsys, shared, "--autotune", output="again")
    assert "autotune" in stored_stages(again)  # chosen once: a second run is the same file
    files = [(shared.root / name / "model.onnx").read_bytes() for name in ("tuned", "again")]
    assert files[0] == files[1]


def test_without_the_flag_nothing_is_timed(shared, capsys, monkeypatch):
    monkeypatch.setattr(stages_autotune, "time_plans", None)
    manifest = build(capsys, shared, output="plain")
    assert manifest["autotune"] is None


def test_it_is_refused_where_it_cannot_keep_its_word(shared, capsys, monkeypatch):
    given = ("build", *shared.weights("residual"), *QUICK, "--autotune")
    done = run(capsys, shared, *given, "--size", "100k")
    assert done.code == 2
    assert "--size 100k" in done.err
    monkeypatch.setattr(ort, "available", lambda: (False, "no engine"))
    done = run(capsys, shared, *given)
    assert done.code == 8
    assert "--autotune" in done.err
