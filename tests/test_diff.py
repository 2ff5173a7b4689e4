"""`dfqc diff`: two manifests in, what changed out."""

import copy
import json
import math

import pytest

from dfqc.compiler.cli import main
from dfqc.compiler.diff import run_diff
from dfqc.compiler.diff_text import describe_diff, markdown_diff
from dfqc.compiler.errors import LoadError
from qdq_models import tiny_manifest
from test_report import MANIFEST

OLD = tiny_manifest() | copy.deepcopy(MANIFEST) | {"files": {}, "recipe": {"bits": "w4a4"}}
OLD["model"]["macs"] = 40_000_000
OLD["metrics"]["top1"]["drop_standard_error"] = 0.2
OLD["gates"][1]["passed"] = True
FASTER = ("metrics", "latency_ms", "speedup")


def changed(*changes):
    manifest = copy.deepcopy(OLD)
    for path, value in changes:
        current = manifest
        for name in path[:-1]:
            current = current[name]
        current[path[-1]] = value
    return manifest


@pytest.fixture
def compare(tmp_path):
    def run(new, old=OLD, **options):
        places = [tmp_path / "old", tmp_path / "new"]
        for place, manifest in zip(places, (old, new), strict=True):
            place.mkdir(exist_ok=True)
            (place / "manifest.json").write_text(json.dumps(manifest))
        return run_diff(*places, **options)

    return run


def row(result, name):
    (found,) = [figure for figure in result["figures"] if figure["name"] == name]
    return found


def test_equal_builds_differ_in_nothing(compare):
    result = compare(OLD)
    assert {figure["verdict"] for figure in result["figures"]} == {"same"}
    assert result["layers"] == {"count": 2, "changed": [], "added": [], "removed": []}
    assert result["recipe"] == result["environment"] == {}
    assert "No figure changed." in markdown_diff(result)


@pytest.mark.parametrize(
    ("name", "path", "value", "change", "verdict"),
    [
        ("top-1", ("metrics", "top1", "engine"), 91.34, 0.5, "better"),
        ("top-1", ("metrics", "top1", "engine"), 90.34, -0.5, "worse"),
        ("size of the model", ("size", "model_bytes"), 190_000, -10_000, "better"),
        ("size of the model", ("size", "model_bytes"), 210_000, 10_000, "worse"),
        ("multiply-adds", ("model", "macs"), 30_000_000, -10_000_000, "better"),
        ("speed-up over float", FASTER, 2.59, 0.1, "same"),  # 4 % is what machines do by themselves
        ("speed-up over float", FASTER, 2.29, -0.2, "worse"),
        ("latency", ("metrics", "latency_ms", "engine"), 0.5, -0.11, "better"),
    ],
)
def test_a_figure_is_judged_by_its_good_side(compare, name, path, value, change, verdict):
    found = row(compare(changed((path, value))), name)
    assert found["change"] == pytest.approx(change)
    assert found["verdict"] == verdict


def test_the_costs_of_a_pruned_build_are_those_that_are_left(compare):
    pruned = OLD | {"pruning": {"macs_after": 10_000_000, "params_after": 100_000}}
    result = compare(pruned)
    assert row(result, "multiply-adds")["after"] == 10_000_000
    assert row(result, "parameters")["change"] == 100_000 - 272_474


def test_a_figure_of_one_build_alone_has_no_verdict(compare):
    result = compare(changed((("metrics", "top1", "engine"), None)))
    assert row(result, "top-1")["before"] == 90.84
    assert row(result, "top-1")["verdict"] is None
    assert not any(figure["name"] == "never measured" for figure in result["figures"])


def test_layers_that_changed_came_and_went_are_named(compare):
    layers = [
        OLD["layers"][0] | {"exported": "w8a8", "sqnr_db": 40.0},
        OLD["layers"][1] | {"name": "head"},
    ]
    found = compare(OLD | {"layers": layers})["layers"]
    assert found["added"] == ["head"]
    assert found["removed"] == ["fc"]
    (one,) = found["changed"]
    assert one["changes"] == {"exported": ["w4a4", "w8a8"]}
    assert one["sqnr_db"] == [20.0, 40.0]


def test_figures_of_different_machines_are_noted(compare):
    environment = OLD["environment"] | {"cpu": "Other CPU"}
    notes = compare(OLD | {"environment": environment})["notes"]
    assert any("Some CPU, Other CPU" in note and "different machines" in note for note in notes)


def test_a_failed_gate_is_the_headline(compare):
    gates = [OLD["gates"][0], OLD["gates"][1] | {"passed": False}]
    result = compare(OLD | {"gates": gates})
    assert result["gates"][1]["before"]["passed"]
    assert "**Gates of the new build failed**: min-speedup." in markdown_diff(result)


def test_the_uncertainty_is_that_of_both_drops(compare):
    result = compare(OLD)
    assert result["top1_uncertainty"] == pytest.approx(1.96 * 0.4)
    assert any("within" in line and "0.78 points" in line for line in describe_diff(result))
    far = compare(changed((("metrics", "top1", "engine"), 89.0)))
    assert any("beyond" in line for line in describe_diff(far))


@pytest.mark.parametrize(
    ("engine", "fails"), [(90.84, False), (90.35, False), (90.3, True), (95.0, False)]
)
def test_a_loss_above_the_limit_fails(compare, engine, fails):
    result = compare(changed((("metrics", "top1", "engine"), engine)), max_drop=0.5)
    assert bool(result["failures"]) == fails


def test_agreement_does_not_stand_in_for_lost_labels(compare):
    top1 = dict.fromkeys(("engine", "simulated", "float"))
    (failure,) = compare(changed((("metrics", "top1"), top1)), max_drop=0.5)["failures"]
    assert failure.startswith("top-1 is missing after")


def test_markdown_keeps_names_out_of_the_markup(compare):
    layers = [OLD["layers"][0] | {"name": "a|b<i>`*@all", "exported": "w2a2"}]
    text = markdown_diff(compare(OLD | {"layers": layers}, OLD | {"layers": [
        layers[0] | {"exported": "w4a4"}]}))  # fmt: skip
    (line,) = [line for line in text.splitlines() if "w2a2" in line]
    assert line.startswith("| a\\|b&lt;i>\\`\\*@\u200ball | Conv2d |")
    assert line.replace("\\|", "").count("|") == 5


def test_every_table_of_the_markdown_has_as_many_cells_in_every_row(compare):
    new = changed((("metrics", "top1", "engine"), 80.0), (("recipe",), {"bits": "w8a8"}))
    new["layers"][0]["exported"] = "w8a8"
    widths = set()
    for block in markdown_diff(compare(new)).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in rows}) <= 1
        widths |= {len(rows)}
    assert len(widths) > 2


def test_many_changed_layers_are_folded(compare):
    layers = [OLD["layers"][0] | {"name": f"layer{i}"} for i in range(30)]
    wider = [row | {"exported": "w8a8"} for row in layers]
    text = markdown_diff(compare(OLD | {"layers": wider}, OLD | {"layers": layers}))
    assert "<details><summary>30 of 30 layers changed</summary>" in text


def test_the_command(tmp_path, capsys):
    for name, manifest in (("a", OLD), ("b", changed((("metrics", "top1", "engine"), 80.0)))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    a, b = str(tmp_path / "a"), str(tmp_path / "b" / "manifest.json")
    assert main(["diff", a, b, "--json"]) == 0
    assert math.isclose(row(json.loads(capsys.readouterr().out), "top-1")["change"], -10.84)
    assert main(["diff", a, b, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("### dfqc: `a` → `b`\n\nWorse: top-1.\n")
    assert main(["diff", a, b, "--max-drop", "1"]) == 5
    streams = capsys.readouterr()
    assert "FAILED" in streams.out
    assert "top-1 falls by 10.84 points" in streams.err
    assert main(["diff", a, b, "--markdown", "--json"]) == 2


def test_a_place_without_a_manifest_is_a_fault(tmp_path, compare):
    compare(OLD)
    with pytest.raises(LoadError, match=r"it has no manifest\.json"):
        run_diff(tmp_path / "old", tmp_path)
