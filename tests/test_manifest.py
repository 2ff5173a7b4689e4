from types import SimpleNamespace

import pytest

import models
from dfqc.compiler.calib_quality import score, warnings
from dfqc.compiler.contents import _quality
from dfqc.compiler.ledger import describe_quantization, list_collapses
from dfqc.compiler.manifest import _calib, check_gates, exit_code, verdict


def job(runtime="1.0", max_drop=None, min_speedup=None, *, later=False, require_engine=False):
    recipe = SimpleNamespace(
        max_drop=max_drop, min_speedup=min_speedup, require_engine=require_engine
    )
    target = SimpleNamespace(engine_file="model.plan" if later else None)
    return SimpleNamespace(runtime=runtime, recipe=recipe, backend=SimpleNamespace(TARGET=target))


def metrics(engine=90.0, images=100, agreement=97.0, speedup=2.0):
    return {
        "top1": {"float": 91.0, "simulated": 90.5, "engine": engine, "images": images},
        "agreement": {"simulated": 98.0, "engine": agreement},
        "latency_ms": {"speedup": speedup},
    }


def parity(passed=True, on_images=None):
    return {
        "argmax_agreement": 100.0 if passed else 60.0,
        "passed": passed,
        "eval_agreement": on_images,
        "tolerance": {"argmax_agreement": 99.0},
    }


def outcome(job, metrics, parity):
    gates = check_gates(job, metrics, parity)
    return {gate["name"]: gate["passed"] for gate in gates}, exit_code(job, gates)


def test_parity_is_always_a_gate():
    assert outcome(job(), metrics(), parity()) == ({"parity": True}, 0)
    assert outcome(job(), metrics(), parity(passed=False)) == ({"parity": False}, 7)


@pytest.mark.parametrize(("agreement", "code"), [(99.0, 0), (98.0, 7)])
def test_parity_on_the_users_images_counts_too(agreement, code):
    _, found = outcome(job(), metrics(), parity(on_images=agreement))
    assert found == code


@pytest.mark.parametrize(("limit", "code"), [(1.0, 0), (0.9, 5)])
def test_the_drop_is_the_engines_in_points_of_top1(limit, code):
    gates, found = outcome(job(max_drop=limit), metrics(), parity())
    assert (gates["max_drop"], found) == (code == 0, code)


@pytest.mark.parametrize(("limit", "code"), [(3.0, 0), (2.9, 5)])
def test_without_labels_the_drop_is_lost_agreement_and_says_so(limit, code):
    gates, found = outcome(job(max_drop=limit), metrics(images=0), parity())
    assert (gates["max_drop_agreement"], found) == (code == 0, code)


@pytest.mark.parametrize(("limit", "code"), [(2.0, 0), (2.1, 6)])
def test_speed(limit, code):
    gates, found = outcome(job(min_speedup=limit), metrics(), parity())
    assert (gates["min_speedup"], found) == (code == 0, code)


@pytest.mark.parametrize(
    ("different", "images", "passed"),
    [(1, 24, True), (2, 24, False), (2, 200, True), (3, 200, False)],
)
def test_one_tie_among_few_images_is_no_fault_of_parity(different, images, passed):
    on_images = 100.0 * (images - different) / images
    gates, _ = outcome(job(), metrics(images=images), parity(on_images=on_images))
    assert gates["parity_eval"] is passed


def test_a_failed_gate_of_the_simulation_decides_also_without_a_runtime():
    unknown = metrics(engine=None, agreement=None, speedup=None)
    assert outcome(job(runtime=None, max_drop=0.1, min_speedup=1.0), unknown, {})[1] == 5


def test_the_gravest_fault_decides():
    everything = job(max_drop=0.0, min_speedup=100.0)
    assert outcome(everything, metrics(), parity(passed=False))[1] == 7
    assert outcome(everything, metrics(), parity())[1] == 5


def test_without_a_runtime_nothing_is_verified():
    missing = job(runtime=None, min_speedup=1.0, max_drop=1.0)
    unknown = metrics(engine=None, agreement=None, speedup=None)
    gates, code = outcome(missing, unknown, {})
    assert gates == {"max_drop": True, "min_speedup": False}  # the drop is the simulation's
    assert code == 8  # what was not measured has not failed
    assert outcome(job(runtime=None), unknown, {}) == ({}, 8)


def test_an_engine_that_is_built_on_the_device_is_owed_only_where_it_is_asked_for():
    unknown = metrics(engine=None, agreement=None, speedup=None)
    assert outcome(job(runtime=None, later=True), unknown, {}) == ({}, 0)
    assert outcome(job(runtime=None, later=True, require_engine=True), unknown, {}) == ({}, 8)
    asked = job(runtime=None, later=True, min_speedup=2.0)
    assert outcome(asked, unknown, {}) == ({"min_speedup": False}, 8)


def test_a_verdict_names_value_and_limit():
    gates = check_gates(job(min_speedup=3.0), metrics(speedup=None), parity())
    manifest = {"gates": gates, "exit_code": 6, "notes": ["other"]}
    assert verdict(manifest) == "gate min_speedup failed: not measured, limit 3"
    assert verdict({"gates": [], "exit_code": 8, "notes": ["no runtime"]}) == "no runtime"
    assert verdict({"gates": [], "exit_code": 0, "notes": []}) == ""


def finished_build(graph, held_out):
    """What the manifest reads of a build about its images, scores as the stages keep them."""
    found = {"synthesize": score(graph, models.images(16)), "holdout": held_out}
    data = {
        stage: {
            "source": "zeroq",
            "images": each.images,
            "info": {"asked": 20, "score": each.to_json() | {"warnings": warnings(each)}},
        }
        for stage, each in found.items()
    }
    build = SimpleNamespace(
        data=lambda stage, file: data.get(stage, {"calib": {"available": 99}}),
        job=SimpleNamespace(recipe=SimpleNamespace(synth="zeroq")),
    )
    return build, found["synthesize"]


def test_calibration_images_have_one_number_its_reasons_and_warnings():
    graph = models.trace_tiny("residual")
    build, ours = finished_build(graph, held_out=score(graph, 2 * models.images(8)))
    calib = _calib(build)
    assert calib["score"] == ours.bn_distance
    assert calib["holdout_score"] == score(graph, 2 * models.images(8)).bn_distance
    assert (calib["images"], calib["holdout_images"], calib["available"]) == (16, 8, 99)
    assert calib["asked"] == 20
    assert calib["warnings"] == warnings(ours) != []
    quality = calib["quality"]
    assert quality["worst_layer_score"] == max(ours.layers.values())
    assert (quality["channels_silent"], quality["twins"]) == (ours.firing.silent, 0)
    assert quality["classes_seen"] == ours.predictions.hit
    assert quality["label_agreement"] is None
    full = _quality(build, {"calib": calib})
    assert full["score"] == calib["score"]
    assert full["calibration_set"]["layers"] == ours.layers
    assert full["held_out_set"]["images"] == 8


def test_without_batch_norms_there_is_no_number():
    graph = models.trace_tiny("no_norm")
    calib = _calib(finished_build(graph, held_out=score(graph, models.images(8)))[0])
    assert (calib["score"], calib["holdout_score"]) == (None, None)
    assert calib["quality"]["worst_layer_score"] is None
    assert calib["quality"]["channels_expected"] == 0


def test_what_a_quantizer_says_of_itself_is_handed_on():
    told = {
        "start": "closed",
        "hessian": "images",
        "images": 12,
        "rounded_to_nearest": ["up"],
        "spilled_bytes": 7,
    }
    about = {"quantizer": "gptq", **told}
    build = SimpleNamespace(data=lambda *_: {"info": about})
    found = describe_quantization(build)
    assert found.items() >= about.items()
    about = {"quantizer": "rtn"}
    assert not describe_quantization(build).keys() & told.keys()


@pytest.mark.parametrize(("fault", "notes"), [("the loss is not a finite number", 1), ("", 0)])
def test_a_training_that_collapsed_is_a_note(fault, notes):
    info = {"quantizer": "qat", "collapsed": fault, "iterations": 40, "kept": "start"}
    found = list_collapses(SimpleNamespace(data=lambda *_: {"info": info}))
    assert len(found) == notes
    assert all(fault in note and "after 40 iterations" in note for note in found)
