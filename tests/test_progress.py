import io
import re
import subprocess
import sys

import pytest

from dfqc.compiler.contracts import silent
from dfqc.compiler.progress import INTERVAL, Bar, Lines, reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        """Everything drawn so far, without colors and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def test_the_stream_decides_the_form(capsys):
    assert isinstance(reporter("zeroq", stream=Terminal()), Bar)
    assert isinstance(reporter("zeroq", stream=io.StringIO()), Lines)
    assert reporter("zeroq", quiet=True, stream=Terminal()) is silent
    assert reporter("zeroq").stream is sys.stderr


def test_lines_are_sparse_and_say_the_time_left(clock):
    stream = io.StringIO()
    report = Lines("zeroq", stream, clock)
    for step in range(1, 101):
        clock.now += 1.0
        report(step, 100, f"loss {step}")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "zeroq: 10 %, 10/100, 1 min 30 s left, loss 10"
    assert lines[-1] == "zeroq: 100 %, 100/100, 0.0 s left, loss 100"


def test_what_came_before_the_first_step_is_no_measure_of_it(clock):
    stream = io.StringIO()
    report = Lines("quantize", stream, clock)
    clock.now += 100.0
    report(0, 10, "")
    clock.now += 20.0
    report(2, 10, "")
    assert stream.getvalue().splitlines()[-1] == "quantize: 20 %, 2/10, 1 min 20 s left"


def test_short_work_writes_nothing(clock):
    stream = io.StringIO()
    report = Lines("zeroq", stream, clock)
    for step in range(1, 6):
        clock.now += INTERVAL / 6
        report(step, 5, "")
    assert stream.getvalue() == ""


def test_the_next_batch_starts_a_new_estimate(clock):
    stream = io.StringIO()
    report = Lines("zeroq", stream, clock)
    clock.now += 1
    report(10, 10, "")
    report(0, 10, "")
    clock.now += 20
    report(5, 10, "")
    assert stream.getvalue() == "zeroq: 50 %, 5/10, 20 s left\n"


def test_unknown_totals_are_written_as_they_are(clock):
    stream = io.StringIO()
    report = Lines("read", stream, clock)
    clock.now += 11
    report(3, 0, "file")
    assert stream.getvalue() == "read: 3/0, file\n"


def test_a_bar_is_drawn_and_erased():
    stream = Terminal()
    report = reporter("zeroq", stream=stream)
    report(1, 4, "loss 3")
    report(2, 4, "loss 2")
    assert report.bars is not None
    report(4, 4, "loss 1")
    assert report.bars is None
    shown = stream.shown()
    assert "zeroq" in shown
    assert "100%" in shown
    assert "loss 1" in shown
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1


def test_a_bar_starts_again_for_the_next_batch():
    stream = Terminal()
    report = reporter("zeroq", stream=stream)
    for batch in range(2):
        for step in (1, 2):
            report(step, 2, f"batch {batch}")
    report(1, 2, "cut off")
    report.close()
    assert report.bars is None
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 3


def test_stdout_and_its_cursor_are_left_alone():
    code = (
        "import sys; from dfqc.compiler.progress import reporter\n"
        "sys.stderr.isatty = lambda: True\n"
        "report = reporter('zeroq'); report(1, 2, ''); print('result'); raise SystemExit(3)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (3, "result\n")
    assert run.stderr.count("\x1b[?25l") == run.stderr.count("\x1b[?25h") == 1


def test_nothing_heavy_is_loaded():
    code = (
        "import sys, dfqc.compiler.progress as p; p.reporter('x')(1, 2, '')\n"
        "sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
