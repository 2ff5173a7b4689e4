"""What a CI system shows of a build: the manifest in, JUnit XML out.

One test case per gate, also per gate that nobody set (skipped, so that it can be seen), and one per
stage with its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

# Gates by the flag that sets them; the others are always set where an engine can be run.
_OPTIONAL = {"max_drop": "--max-drop", "min_speedup": "--min-speedup"}


def junit_xml(manifest: Mapping[str, Any]) -> bytes:
    """Return `junit.xml` of a package."""
    root = ElementTree.Element("testsuites", name="dfqc")
    label = f"{manifest.get('bits', '')} {manifest.get('target', '')}".strip()
    _add_suite(root, f"dfqc gates ({label})", _gate_cases(manifest))
    _add_suite(root, f"dfqc stages ({label})", _stage_cases(manifest))
    _add_totals(root, list(root.iter("testcase")))
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _gate_cases(manifest: Mapping[str, Any]) -> list[ElementTree.Element]:
    gates = {gate["name"]: gate for gate in manifest.get("gates", [])}
    cases = [_gate_case(gate, manifest) for gate in gates.values()]
    if "parity" not in gates:
        reason = next(iter(manifest.get("notes", [])), "the engine was not run")
        cases.append(_skipped("parity", str(reason)))
    for name, flag in _OPTIONAL.items():
        if not any(gate.startswith(name) for gate in gates):
            cases.append(_skipped(name, f"not set: {flag}"))
    return cases


def _gate_case(gate: Mapping[str, Any], manifest: Mapping[str, Any]) -> ElementTree.Element:
    if gate.get("value") is None and _get(manifest, "environment", "runtime") is None:
        return _skipped(gate["name"], "not measured: the engine was not run here")
    case = _case("dfqc.gates", gate["name"])
    text = f"{_number(gate.get('value'))}, limit {_number(gate.get('limit'))}"
    if not gate.get("passed"):
        failure = ElementTree.SubElement(case, "failure", type="gate", message=text)
        failure.text = f"gate {gate['name']}: {text}"
    ElementTree.SubElement(case, "system-out").text = text
    return case


def _stage_cases(manifest: Mapping[str, Any]) -> list[ElementTree.Element]:
    cases = []
    for stage in manifest.get("stages", []):
        case = _case("dfqc.stages", stage["name"])
        # A stored stage took no time in this run; how long it once took is in the manifest.
        seconds = 0.0 if stage.get("cached") else stage.get("seconds") or 0.0
        case.set("time", f"{seconds:.3f}")
        if stage.get("cached"):
            ElementTree.SubElement(case, "system-out").text = "taken from the store"
        cases.append(case)
    return cases


def _skipped(name: str, reason: str) -> ElementTree.Element:
    case = _case("dfqc.gates", name)
    ElementTree.SubElement(case, "skipped", message=_printable(reason))
    return case


def _case(group: str, name: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=group, name=_printable(name), time="0")


def _add_suite(root: ElementTree.Element, name: str, cases: list[ElementTree.Element]) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=_printable(name))
    _add_totals(suite, cases)
    suite.extend(cases)


def _add_totals(element: ElementTree.Element, cases: list[ElementTree.Element]) -> None:
    element.set("tests", str(len(cases)))
    element.set("failures", str(sum(case.find("failure") is not None for case in cases)))
    element.set("errors", "0")
    element.set("skipped", str(sum(case.find("skipped") is not None for case in cases)))
    element.set("time", f"{sum(float(case.get('time', '0')) for case in cases):.3f}")


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _printable(text: str) -> str:
    """Leave out the control characters that XML 1.0 cannot hold."""
    return "".join(sign for sign in text if sign.isprintable() or sign in "\t\n")


def _get(values: Mapping[str, Any], *path: str) -> Any:
    current: Any = values
    for name in path:
        current = current.get(name) if isinstance(current, Mapping) else None
    return current
