import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dfqc.compiler.artifact import Store
from dfqc.compiler.driver import Driver, Limits, Stage
from dfqc.compiler.errors import EnvironmentFault, Interrupted, UnsupportedError


def save(value, folder: Path) -> None:
    (folder / "value.json").write_text(json.dumps(value))


def load(folder: Path):
    return json.loads((folder / "value.json").read_text())


class Line:
    """Three fake stages (numbers -> doubled, derived -> total) that count their runs."""

    def __init__(self):
        self.ran = []
        self.stages = (
            Stage("numbers", (), self.numbers, save, load, options=self.pick("count"), seeded=True),
            Stage("doubled", ("numbers",), self.doubled),
            Stage("total", ("doubled",), self.total, save, load, options=self.pick("extra")),
        )

    def pick(self, *names):
        return lambda settings: {name: settings[name] for name in names}

    def numbers(self, context):
        self.ran.append("numbers")
        return [context.seed(i) % 100 for i in range(context.settings["count"])]

    def doubled(self, context):
        self.ran.append("doubled")
        return [2 * x for x in context.value("numbers")]

    def total(self, context):
        self.ran.append("total")
        return sum(context.value("doubled")) + context.settings["extra"]

    def drive(self, root, *, count=3, extra=0, **options):
        self.ran.clear()
        driver = Driver(self.stages, {"count": count, "extra": extra}, Store(root), **options)
        driver.run()
        driver.store.close()
        return driver


@pytest.fixture
def line():
    return Line()


def statuses(driver):
    return [e.status for e in driver.explain()]


def test_stages_run_in_order_and_values_flow(line, tmp_path):
    driver = line.drive(tmp_path)
    assert line.ran == ["numbers", "total", "doubled"]  # a derived value is computed when read
    assert driver.value("total") == 2 * sum(driver.value("numbers"))
    assert [(r.name, r.cached) for r in driver.records] == [
        ("numbers", False), ("doubled", False), ("total", False)
    ]  # fmt: skip
    assert all(r.peak_rss_bytes > 0 for r in driver.records)


def test_a_second_identical_run_hits_every_stage(line, tmp_path):
    first = line.drive(tmp_path)
    second = line.drive(tmp_path)
    assert line.ran == []
    assert all(r.cached for r in second.records)
    assert [r.key for r in first.records] == [r.key for r in second.records]
    assert first.value("total") == second.value("total")


def test_a_changed_option_reruns_from_its_stage_on(line, tmp_path):
    line.drive(tmp_path)
    line.drive(tmp_path, extra=1)
    assert line.ran == ["total", "doubled"]
    line.drive(tmp_path, count=4)
    assert line.ran == ["numbers", "total", "doubled"]


def test_the_seed_matters_only_to_seeded_stages(line, tmp_path):
    line.drive(tmp_path, count=0)
    line.drive(tmp_path, count=0, seed=1)
    assert line.ran == ["numbers"]  # made again, but equal: what follows is a hit


def test_equal_content_made_another_way_is_a_hit_downstream(line, tmp_path):
    line.drive(tmp_path)
    line.stages = (
        Stage("numbers", (), line.numbers, save, load, options=line.pick("count"), seeded=True,
              version=2),
        *line.stages[1:],
    )  # fmt: skip
    line.drive(tmp_path)
    assert line.ran == ["numbers"]


def test_a_changed_environment_reruns(line, tmp_path):
    for version in ("1", "2"):
        line.stages = (
            *line.stages[:2],
            Stage("total", ("doubled",), line.total, save, load, options=line.pick("extra"),
                  environment=lambda settings, version=version: {"runtime": version}),
        )  # fmt: skip
        line.drive(tmp_path)
    assert line.ran == ["total", "doubled"]


def test_a_changed_source_file_reruns(line, tmp_path, monkeypatch):
    from dfqc.compiler import keys

    line.drive(tmp_path)
    monkeypatch.setattr(keys, "code_digest", lambda modules, alone: "edited")
    line.drive(tmp_path)
    assert "numbers" in line.ran


def test_seeds_differ_by_stage_batch_and_run(line, tmp_path):
    seen = set()

    def collect(context):
        seen.update(context.seed(i) for i in range(3))
        return 0

    stages = [Stage(name, (), collect, save, load, seeded=True) for name in ("a", "b")]
    for seed in (0, 1):
        Driver(stages, None, Store(tmp_path), seed=seed).run()
    assert len(seen) == 12
    assert all(0 <= s < 2**63 for s in seen)


def test_reading_an_undeclared_input_is_refused(tmp_path):
    stages = (
        Stage("a", (), lambda context: 1, save, load),
        Stage("b", (), lambda context: context.value("a"), save, load),
    )
    with pytest.raises(KeyError, match="without declaring"):
        Driver(stages, None, Store(tmp_path)).run()


def test_a_value_that_fails_its_check_is_not_stored(tmp_path):
    def check(value):
        raise UnsupportedError("no")

    stage = Stage("a", (), lambda context: 1, save, load, check=check)
    store = Store(tmp_path)
    with pytest.raises(UnsupportedError):
        Driver([stage], None, store).run()
    assert list(store.entries()) == []


def test_a_damaged_entry_is_made_again_and_the_rest_hits(line, tmp_path, caplog):
    driver = line.drive(tmp_path)
    driver.artifact("numbers").file("value.json").write_text("[1, 2]")
    line.drive(tmp_path)
    assert line.ran == ["numbers"]
    assert "damaged" in caplog.text


def test_values_are_forgotten_once_nobody_needs_them(line, tmp_path):
    assert line.drive(tmp_path)._values == {}


def test_explain_before_any_run(line, tmp_path):
    driver = Driver(line.stages, {"count": 3, "extra": 0}, Store(tmp_path))
    numbers, doubled, total = driver.explain()
    assert (numbers.status, numbers.reasons) == ("miss", ("never made for this model",))
    assert (doubled.status, total.status) == ("waits", "waits")
    assert "numbers" in doubled.reasons[0]
    assert line.ran == []


def test_explain_names_the_field_that_differs(line, tmp_path):
    line.drive(tmp_path, extra=1)
    driver = Driver(line.stages, {"count": 3, "extra": 5}, Store(tmp_path))
    numbers, doubled, total = driver.explain()
    assert (numbers.status, doubled.status) == ("hit", "derived")
    assert (total.status, total.reasons) == ("miss", ("options.extra: 1 -> 5",))


def test_explain_compares_with_the_nearest_entry_of_the_same_model(line, tmp_path):
    line.drive(tmp_path, count=3, seed=1, label="net")
    line.drive(tmp_path, count=9, seed=9, label="net")
    line.drive(tmp_path, count=4, seed=0, label="other")
    driver = Driver(line.stages, {"count": 3, "extra": 0}, Store(tmp_path), label="net")
    assert next(driver.explain()).reasons == ("seed: 1 -> 0",)


def test_explain_agrees_with_the_run(line, tmp_path):
    line.drive(tmp_path)
    driver = Driver(line.stages, {"count": 3, "extra": 0}, Store(tmp_path))
    assert statuses(driver) == ["hit", "derived", "hit"]


def part_line(ran, before=lambda index: None, batches=4):
    """One stage of several parts; `before` is called with the index of each before it is made."""

    def make(index):
        before(index)
        ran.append(index)
        return index * 10

    def run(context):
        report = context.progress()
        parts = []
        for i in range(batches):
            part = {"index": i}
            parts.append(
                context.checkpoint(part, lambda i=i: make(i), save, load, without=("batches",))
            )
            report(i + 1, batches, "")
        return parts

    return [Stage("batched", (), run, save, load, options=lambda s: {"batches": batches})]


def raise_at(position, fault):
    def before(index):
        if index == position:
            raise fault

    return before


def test_an_interrupted_stage_goes_on_from_its_last_part(tmp_path):
    ran = []
    with pytest.raises(Interrupted, match=r"batched.*run the same command again"):
        Driver(part_line(ran, raise_at(2, KeyboardInterrupt)), None, Store(tmp_path)).run()
    assert ran == [0, 1]
    resumed = Driver(part_line(ran), None, Store(tmp_path))
    resumed.run()
    assert ran == [0, 1, 2, 3]
    assert resumed.value("batched") == [0, 10, 20, 30]


def test_parts_are_shared_by_runs_of_other_lengths(tmp_path):
    ran = []
    Driver(part_line(ran, batches=2), None, Store(tmp_path)).run()
    Driver(part_line(ran, batches=3), None, Store(tmp_path)).run()
    assert ran == [0, 1, 2]


def test_kill_minus_nine_loses_only_the_running_part(tmp_path):
    code = (
        "import os, signal, sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "import test_driver as t\n"
        "kill_at_3 = lambda index: index == 3 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "store = t.Store(pathlib.Path(sys.argv[2]))\n"
        "t.Driver(t.part_line([], kill_at_3), None, store).run()\n"
    )
    here = Path(__file__).parent
    killed = subprocess.run([sys.executable, "-c", code, here, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    ran = []
    Driver(part_line(ran), None, Store(tmp_path)).run()
    assert ran == [3]


def test_out_of_memory_is_the_environments_fault(tmp_path):
    with pytest.raises(EnvironmentFault, match=r"batched ran out of memory"):
        Driver(part_line([], raise_at(1, MemoryError)), None, Store(tmp_path)).run()


def test_other_runtime_faults_pass_through(tmp_path):
    with pytest.raises(RuntimeError):
        Driver(part_line([], raise_at(1, RuntimeError)), None, Store(tmp_path)).run()


def test_a_spent_budget_stops_inside_a_stage_and_keeps_its_parts(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("dfqc.compiler.driver.time.monotonic", lambda: next(clock))
    ran = []
    driver = Driver(part_line(ran), None, Store(tmp_path), limits=Limits(seconds=25))
    with pytest.raises(EnvironmentFault, match=r"budget of 25 s.*batched.*of 4 done.*run again"):
        driver.run()
    assert ran == [0, 1]
    Driver(part_line(ran), None, Store(tmp_path)).run()
    assert ran == [0, 1, 2, 3]


def test_memory_over_the_limit_stops_the_run(tmp_path):
    driver = Driver(part_line([]), None, Store(tmp_path), limits=Limits(memory_bytes=1 << 20))
    with pytest.raises(EnvironmentFault, match=r"over --memory 1\.0 MB; give more$"):
        driver.run()


@pytest.mark.parametrize(
    ("stage", "way"),
    [("synthesize", "--samples or its batch size"), ("correct", "--samples")],
)
def test_what_would_take_less_memory_is_said_of_the_stage(tmp_path, stage, way):
    driver = Driver(part_line([]), None, Store(tmp_path), limits=Limits(memory_bytes=1 << 20))
    with pytest.raises(EnvironmentFault, match=f"; give more, or lower {way}$"):
        driver.enforce(stage, "1 of 4 done")


def test_finished_stages_are_announced(line, tmp_path):
    seen = []
    line.drive(tmp_path, finished=lambda record: seen.append((record.name, record.cached)))
    line.drive(tmp_path, finished=lambda record: seen.append((record.name, record.cached)))
    assert seen == [("numbers", False), ("total", False), ("numbers", True), ("total", True)]


def test_a_part_that_was_cut_short_serves_only_runs_of_the_same_limit(tmp_path):
    made = []

    def run(context):
        def make():
            made.append(context.driver.limits.seconds)
            return {"short": context.driver.limits.seconds is not None}

        return context.checkpoint(
            {"index": 0}, make, save, load, without=("run",), cut_short=lambda v: v["short"]
        )

    def drive(seconds, number):
        # Its number makes every run's stage a new one, so that only the part can be found.
        stage = Stage("images", (), run, save, load, options=lambda settings: {"run": number})
        store = Store(tmp_path)
        driver = Driver([stage], {}, store, limits=Limits(seconds))
        driver.run()
        store.close()
        return driver.value("images")["short"]

    assert [drive(100.0, 0), drive(100.0, 1), drive(200.0, 2)] == [True, True, True]
    assert made == [100.0, 200.0]
    assert [drive(None, 3), drive(None, 4)] == [False, False]
    assert drive(100.0, 5) is False  # a whole one is better, and there now
    assert made == [100.0, 200.0, None]
