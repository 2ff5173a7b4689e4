"""Weight bits chosen in a build: limits kept by the package, rules and ends respected, refusals."""

import csv
import json
import re

import pytest

from command import QUICK, build, run, stored_stages


def bits_of(manifest):
    return {row["name"]: int(re.match(r"w(\d)", row["exported"])[1]) for row in manifest["layers"]}


def weights_of(workspace, name="residual"):
    import models

    counts = {}
    for path, module in models.build(name).named_modules():
        if hasattr(module, "weight") and module.weight.ndim > 1:
            counts[path] = module.weight.numel()
    return counts


def test_an_average_is_kept_and_the_package_says_how(shared, capsys):
    manifest = build(capsys, shared, "--bits", "w4a8", "--avg-bits", "4.5", output="average")
    chosen = manifest["allocation"]
    bits, counts = bits_of(manifest), weights_of(shared)
    assert bits["conv1"] == bits["head.fc"] == 8  # the ends, which do not count
    free = [name for name in bits if name not in ("conv1", "head.fc")]
    average = sum(bits[n] * counts[n] for n in free) / sum(counts[n] for n in free)
    assert chosen["avg_bits"] == pytest.approx(average)
    assert 3.5 < average <= 4.5
    assert chosen["chosen"] == {name: bits[name] for name in free}
    assert (chosen["limit"], chosen["images"], chosen["all_widest"]) == ("--avg-bits 4.5", 8, False)
    assert manifest["recipe"]["avg-bits"] == 4.5
    for row in manifest["layers"]:
        assert row["asked"] == row["exported"] == f"w{bits[row['name']]}a8"
        effects = {int(b): e["sqnr_db"] for b, e in row["sensitivity"].items()}
        assert list(effects) == [2, 3, 4, 6, 8]
        assert effects[8] > effects[4] > effects[2]
        reason = f"w{bits[row['name']]} chosen under --avg-bits 4.5: alone it leaves the output "
        assert row["reason"].startswith(reason) == (row["name"] in free)
    folder = shared.root / "average"
    rows = list(csv.DictReader((folder / "layers.csv").read_text().splitlines()))
    first = manifest["layers"][0]["sensitivity"]["4"]["sqnr_db"]
    assert float(rows[0]["w4_alone_db"]) == pytest.approx(first)
    assert "Weight bits under a limit" in (folder / "report.html").read_text()


def test_a_size_is_kept_by_the_file(shared, capsys):
    given = ("--quantizer", "rtn", "--size")
    plenty = build(capsys, shared, *given, "1m", output="plenty")
    assert plenty["allocation"]["all_widest"] is True
    assert set(bits_of(plenty).values()) == {8}
    # Four bits save half of the weights that may have them.
    counts = weights_of(shared)
    halved = sum(counts[name] for name in plenty["allocation"]["chosen"])
    asked = plenty["size"]["model_bytes"] - halved // 4
    manifest = build(capsys, shared, *given, f"{asked}b", output="sized")
    assert asked - halved // 4 < manifest["size"]["model_bytes"] <= asked
    assert manifest["size"]["model_bytes"] <= manifest["allocation"]["file_bytes"] <= asked
    # Narrower than four bits saves nothing in the file, so nothing is narrower.
    free = manifest["allocation"]["chosen"]
    assert set(free.values()) == {4, 8}


def test_rules_and_activations_stay(shared, capsys):
    given = ("--bits", "w8a4", "--avg-bits", "3", "--layer", "layer1.*=w6a6", "--ends", "same",
             "--quantizer", "rtn")  # fmt: skip
    manifest = build(capsys, shared, *given, output="rules")
    rows = {row["name"]: row for row in manifest["layers"]}
    assert rows["layer1.conv1"]["asked"] == rows["layer1.conv2"]["asked"] == "w6a6"
    assert "layer1.conv1" not in manifest["allocation"]["chosen"]
    assert {"conv1", "head.fc"} <= manifest["allocation"]["chosen"].keys()
    assert manifest["allocation"]["avg_bits"] <= 3
    assert rows["conv1"]["exported"].endswith("a8")  # the image is not narrowed
    assert "not narrowed" in rows["conv1"]["reason"]
    assert rows["layer2.conv1"]["exported"].endswith("a4")


def test_another_limit_measures_nothing_again_and_a_recipe_repeats_the_choice(shared, capsys):
    rtn = ("--quantizer", "rtn")
    build(capsys, shared, *rtn, "--avg-bits", "5", output="five")

    def parts():
        records = shared.cache.glob("v1/objects/*/*/artifact.json")
        return sum('"allocate.part"' in path.read_text() for path in records)

    before = parts()
    assert before > 0
    manifest = build(capsys, shared, *rtn, "--avg-bits", "3.5", output="three")
    assert parts() == before
    assert "allocate" not in stored_stages(manifest)
    recipe = shared.root / "three" / "recipe.yaml"
    done = run(capsys, shared, "build", "--recipe", recipe, "-o", shared.root / "again", "--json")
    assert done.code == 0, done.err
    assert done.json["files"]["model.onnx"] == manifest["files"]["model.onnx"]
    assert "allocate" in stored_stages(done.json)


def test_the_table_alone_changes_no_plan_and_serves_a_limit_later(shared, capsys):
    rtn = ("--quantizer", "rtn", "--bits", "w4a8")
    without = build(capsys, shared, *rtn, output="unmeasured")
    done = run(capsys, shared, "build", *shared.weights(), *QUICK, *rtn, "--sensitivity",
               "-o", shared.root / "measured")  # fmt: skip
    assert done.code == 0, done.err
    folder = shared.root / "measured"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["allocation"], manifest["sensitivity"]) == (None, {"images": 8})
    assert without["sensitivity"] is None
    assert bits_of(manifest) == bits_of(without)
    alone = {row["name"]: row["sensitivity"] for row in manifest["layers"]}
    assert [list(row) for row in alone.values()] == [["2", "3", "4", "6", "8"]] * len(alone)
    bits = bits_of(manifest)
    worst = min(alone, key=lambda name: alone[name][str(bits[name])]["sqnr_db"])
    assert f"sensitive  {worst} (w{bits[worst]}, " in done.out
    assert "Sensitivity of the layers" in (folder / "report.html").read_text()
    rows = list(csv.DictReader((folder / "layers.csv").read_text().splitlines()))
    assert float(rows[0]["w4_alone_db"]) == pytest.approx(alone[rows[0]["name"]]["4"]["sqnr_db"])
    # What was measured serves a limit later.
    limited = build(capsys, shared, *rtn, "--avg-bits", "3.2", output="limited")
    assert {row["name"]: row["sensitivity"] for row in limited["layers"]} == alone
    assert limited["sensitivity"] == {"images": 8}


def test_plan_says_that_bits_are_chosen_later(shared, capsys):
    given = ("plan", *shared.weights(), *QUICK, "--bits", "w4a8", "--avg-bits", "4")
    plan = run(capsys, shared, *given, "--json").json
    assert plan["weight_limit"] == "--avg-bits 4"
    assert len(plan["chosen_later"]) == 5
    assert "allocate" in {row["stage"] for row in plan["estimate"]}
    reasons = {row["name"]: row["reason"] for row in plan["layers"]}
    assert reasons["layer1.conv1"].startswith("weight bits chosen later under --avg-bits 4")
    assert "later" not in reasons["conv1"]
    assert (
        "the weight bits of 5 layers will be chosen under --avg-bits 4"
        in run(capsys, shared, *given).out
    )
    without = run(capsys, shared, *given[:-2], "--json").json
    assert (without["weight_limit"], without["chosen_later"]) == (None, [])
    assert "allocate" not in {row["stage"] for row in without["estimate"]}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (("--size", "1k"), r"smallest file that can be reached, [\d,]+ .*the largest is [\d,]+"),
        (("--avg-bits", "4", "--layer", "*=w4a4"), "no layer is left to choose bits for"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused_before_any_work(shared, capsys, given, text):
    done = run(capsys, shared, "plan", *shared.weights(), *QUICK, *given)
    assert done.code == 2
    assert re.search(text, done.user_fault)
