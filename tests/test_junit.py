"""`junit.xml`: what CI systems read of it."""

from xml.etree import ElementTree

import pytest

from dfqc.compiler.junit import junit_xml
from test_report import MANIFEST


def cases(manifest):
    root = ElementTree.fromstring(junit_xml(manifest))
    for element in (root, *root.iter("testsuite")):
        found = list(element.iter("testcase"))
        assert int(element.get("tests")) == len(found)
        assert int(element.get("failures")) == len(list(element.iter("failure")))
        assert int(element.get("skipped")) == len(list(element.iter("skipped")))
    return {(c.get("classname"), c.get("name")): c for c in root.iter("testcase")}


def gate(name="parity", value=100.0, limit=99.0, passed=True):
    return {"name": name, "value": value, "limit": limit, "passed": passed}


def test_a_failed_gate_is_a_failure_with_its_figures():
    gates = [gate(), gate("max_drop", 2.5, 1.0, False)]
    found = cases(MANIFEST | {"gates": gates})
    assert found["dfqc.gates", "parity"].find("failure") is None
    failure = found["dfqc.gates", "max_drop"].find("failure")
    assert failure.get("message") == "2.5, limit 1"


def test_gates_that_nobody_set_are_skipped_and_name_their_flag():
    found = cases(MANIFEST | {"gates": [gate()]})
    assert (
        found["dfqc.gates", "min_speedup"].find("skipped").get("message").endswith("--min-speedup")
    )
    found = cases(MANIFEST | {"gates": [gate(), gate("max_drop_agreement")]})
    assert ("dfqc.gates", "max_drop") not in found


@pytest.mark.parametrize(("runtime", "tag"), [(None, "skipped"), ("1.31", "failure")])
def test_an_unmeasured_gate_fails_where_there_was_an_engine(runtime, tag):
    environment = {"runtime": runtime}
    gates = [gate("min_speedup", None, 2.0, False)]
    found = cases(MANIFEST | {"gates": gates, "environment": environment})
    assert found["dfqc.gates", "min_speedup"].find(tag) is not None
    assert found["dfqc.gates", "parity"].find("skipped") is not None


def test_stages_have_the_time_of_this_run():
    found = cases(MANIFEST)
    assert float(found["dfqc.stages", "synthesize"].get("time")) == 83.0
    assert float(found["dfqc.stages", "trace"].get("time")) == 0.0  # from the store


def test_text_cannot_break_the_file():
    found = cases(MANIFEST | {"gates": [gate("<&\x00\x1b>")]})
    assert ("dfqc.gates", "<&>") in found
