"""Channels and bits chosen in a build for limits on the file and the work: kept, and shown."""

import pytest

from command import build
from dfqc.compiler import joint


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """One part of each count: what is chosen from more is chosen in the same way."""
    monkeypatch.setattr(joint, "PARTS", (0.4,))


def test_a_limit_that_bits_alone_cannot_keep_takes_channels_too(shared, capsys):
    auto = ("--prune", "auto", "--quantizer", "rtn", "--refit", "off", "--size")
    wide = build(capsys, shared, *auto, "10m", output="wide")
    assert wide["pruning"]["budget"]["chosen"]["part"] == 0
    assert wide["pruning"]["groups"] == []
    whole = [p["bytes"] for p in wide["pruning"]["budget"]["points"] if p["share"] is None]
    assert len(whole) == 2
    limit = min(whole) - 1  # what fewer bits alone do not reach
    manifest = build(capsys, shared, *auto, str(limit), output="both")
    budget = manifest["pruning"]["budget"]
    assert budget["limits"] == {"bytes": limit}
    able = [p for p in budget["points"] if p["bytes"] <= limit]
    assert {p["share"] for p in able} == {"channels", "params"}
    assert budget["chosen"]["distance"] == min(p["distance"] for p in able)
    assert budget["chosen"]["part"] > 0
    assert (shared.root / "both" / "model.onnx").stat().st_size <= limit
    assert manifest["pruning"]["params_after"] < manifest["pruning"]["params_before"]
    assert "Pareto front" in (shared.root / "both" / "report.html").read_text()


def test_a_limit_on_the_work_is_met_from_a_front_that_is_shown(shared, capsys):
    given = ("--prune", "auto", "--quantizer", "rtn", "--refit", "off")
    manifest = build(capsys, shared, *given, "--macs", "0.8", output="work")
    about = manifest["pruning"]
    budget, points = about["budget"], about["budget"]["points"]
    limit = int(0.8 * about["macs_before"])
    assert budget["limits"] == {"macs": limit}
    assert about["macs_after"] == budget["chosen"]["macs"] <= limit
    able = [p for p in points if p["macs"] <= limit]
    assert budget["chosen"]["distance"] == min(p["distance"] for p in able)
    # What just keeps the limit was tried by both counts, beside less and more.
    assert {p["share"] for p in able if p["macs"] > 0.75 * about["macs_before"]} == {
        "macs", "channels"
    }  # fmt: skip
    assert {p["within"] for p in points} == {True, False}
    front = sorted((p["macs"], p["distance"]) for p in points if p["front"])
    assert len(front) > 2
    assert [d for _, d in front] == sorted((d for _, d in front), reverse=True)
    assert {p["bits"] for p in points} == {None}  # of --bits
    assert any(p["front"] and p["macs"] == budget["chosen"]["macs"] for p in points)
    page = (shared.root / "work" / "report.html").read_text()
    assert "Pareto front" in page
    assert f"{limit:,}" in page
    plain = build(capsys, shared, *given[2:], "--macs", "0.8", output="macs")["pruning"]
    assert "budget" not in plain
    own = next(p for p in points if p["share"] == "macs" and p["part"] == 0.2)
    assert own["macs"] == plain["macs_after"]


def test_limits_on_the_work_and_on_the_file_are_kept_together(shared, capsys):
    given = ("--prune", "auto", "--quantizer", "rtn", "--refit", "off", "--macs", "0.9")
    wide = build(capsys, shared, *given, "--size", "10m", output="roomy")["pruning"]
    assert {p["bits"] for p in wide["budget"]["points"]} == {4, 8}
    able = [p["bytes"] for p in wide["budget"]["points"] if p["within"]]  # work, any size
    limit = (min(able) + wide["budget"]["chosen"]["bytes"]) // 2
    assert min(able) < limit < wide["budget"]["chosen"]["bytes"]
    manifest = build(capsys, shared, *given, "--size", str(limit), output="tight")
    about = manifest["pruning"]
    assert set(about["budget"]["limits"]) == {"bytes", "macs"}
    assert about["macs_after"] <= 0.9 * about["macs_before"]
    assert (shared.root / "tight" / "model.onnx").stat().st_size <= limit
    assert about["budget"]["chosen"]["distance"] >= wide["budget"]["chosen"]["distance"]
