"""Energy counters of a made-up `/sys/class/powercap`, against sums by hand."""

import pytest

from dfqc.compiler.energy import find_meter, joules_per_call


@pytest.fixture
def rapl(tmp_path):
    for name, energy in (("intel-rapl:0", 500), ("intel-rapl:1", 1_000), ("intel-rapl:0:0", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{energy}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000\n")
    return tmp_path


def test_packages_are_read_and_not_their_cores(rapl):
    meter, said = find_meter(rapl)
    assert meter.read() == (500, 1_000)
    assert "intel-rapl:0, intel-rapl:1" in said


def test_a_counter_that_starts_over_is_understood(rapl):
    meter, _ = find_meter(rapl)
    assert meter.joules((500, 1_000), (2_500, 1_500)) == pytest.approx(2_500e-6)
    assert meter.joules((9_000, 1_000), (500, 1_000)) == pytest.approx(1_500e-6)


def test_the_energy_of_a_call_is_that_of_all_over_their_number(rapl):
    meter, _ = find_meter(rapl)
    now = [0.0]

    def call():
        now[0] += 0.25
        counter = rapl / "intel-rapl:0" / "energy_uj"
        counter.write_text(str(int(counter.read_text()) + 300))

    assert joules_per_call(meter, call, seconds=1.0, clock=lambda: now[0]) == pytest.approx(300e-6)
    assert now == [1.0]


def test_a_machine_without_counters_says_so(tmp_path):
    meter, said = find_meter(tmp_path)
    assert meter is None
    assert "not told by this machine" in said


def test_counters_that_cannot_be_read_are_said(rapl):
    (rapl / "intel-rapl:0" / "energy_uj").unlink()
    meter, said = find_meter(rapl)
    assert meter is None
    assert "cannot be read" in said
