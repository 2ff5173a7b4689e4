"""What `dfqc doctor` says of a machine, on machines that are made up."""

import pytest

from dfqc.compiler import abilities, cli, doctor, machine

COMPILE = dict.fromkeys(doctor.COMPILE, "1.0")
TARGETS = {
    "ort": {"available": True, "runtime": "1.31"},
    "trt": {"available": False, "runtime": "no driver"},
}


def find(word, compiling=COMPILE, targets=TARGETS):
    (found,) = [a for a in abilities.list_abilities(compiling, targets) if word in a.name]
    return found


def test_what_is_missing_says_how_to_get_it():
    assert find("build packages").available
    lacking = find("build packages", COMPILE | {"timm": None})
    assert (lacking.available, lacking.detail) == (False, "missing: timm")
    assert lacking.get == "pip install 'dfqc[compile]'"
    assert find("target ort").get == ""
    assert "dfqc[trt]" in find("target trt").get
    other = {"new": {"available": False, "runtime": "why not"}}
    assert "dfqc targets" in find("target new", targets=other).get


@pytest.mark.parametrize("able", [True, False])
def test_every_ability_that_is_missing_has_a_way_to_it(able, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "integer_flags", lambda: ("avx512_vnni",) if able else ())
    found = abilities.list_abilities(COMPILE, TARGETS)
    assert all(bool(one.get) != one.available for one in found)


@pytest.mark.parametrize(
    ("torch", "driver", "available", "said"),
    [
        (None, True, False, "torch is missing"),
        ("2.13.0", False, False, "no NVIDIA driver"),
        ("2.13.0+cpu", True, False, "build for CPUs"),
        ("2.13.0+cu130", True, True, "not tried here"),
    ],
)
def test_a_gpu_needs_a_driver_and_its_torch(torch, driver, available, said, monkeypatch, tmp_path):
    if driver:
        (tmp_path / "version").write_text("NVRM version: 1")
    monkeypatch.setattr(abilities, "NVIDIA_DRIVER", tmp_path / "version")
    found = find("--device cuda", COMPILE | {"torch": torch})
    assert (found.available, said in found.detail) == (available, True)


@pytest.mark.parametrize(
    ("system", "flags", "fast"),
    [
        ("x86_64", ("avx2",), False),
        ("x86_64", ("avx2", "avx_vnni"), True),
        ("AMD64", ("avx2", "amx_int8"), True),
        ("aarch64", ("asimddp",), True),
        ("aarch64", (), False),
    ],
)
def test_fast_integers_depend_on_the_processor(system, flags, fast, monkeypatch):
    monkeypatch.setattr(abilities.platform, "machine", lambda: system)
    monkeypatch.setattr(machine, "integer_flags", lambda: flags)
    assert find("INT8 faster").available == fast


@pytest.mark.parametrize(("load", "quiet"), [(0.4, True), (1.9, True), (2.1, False)])
def test_a_busy_machine_is_said(load, quiet, monkeypatch):
    monkeypatch.setattr(abilities.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(machine, "cpu_count", lambda: 4)
    assert find("timings").available == quiet


def test_doctor_shows_all_of_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "describe_targets", lambda: TARGETS)
    cli.main(["doctor", "--cache-dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "yes      run and time packages of target ort: 1.31" in lines
    place = lines.index("no       run and time packages of target trt: no driver")
    assert lines[place + 1].startswith("         get it: an NVIDIA driver")
    assert any(line.startswith("cache") and line.endswith(" free") for line in lines)
