import json
import logging
import os
import subprocess
import sys

import pytest

from command import run
from dfqc.compiler import cli, errors, machine
from dfqc.compiler.errors import DfqcError


def test_help_loads_neither_torch_nor_anything_else_that_is_heavy():
    code = (
        "import sys; from dfqc.compiler.cli import main; code = main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'pydantic', 'yaml', 'rich'}\n"
        "sys.exit(repr(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("build", "plan", "synth", "distill", "eval", "bench", "verify", "inspect",
                 "targets", "list", "doctor"):  # fmt: skip
        assert f"\n  {verb}" in done.stdout


@pytest.mark.parametrize(
    "verb",
    ["build", "plan", "synth", "distill", "eval", "bench", "verify", "inspect", "targets", "list"],
)
def test_every_verb_has_help(verb, capsys, workspace):
    done = run(capsys, workspace, verb, "--help")
    assert done.code == 0
    assert "--json" in done.out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dfqc {machine.version('dfqc')}\n"


def test_without_a_verb_the_help_is_shown(capsys):
    assert cli.main([]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "m.pt", "--bitz", "w4a4"), "No such option: --bitz. Did you mean --bits?"),
        (("build", "m.pt", "--prone", "0.5"), "No such option: --prone"),
        (("biuld", "m.pt"), "Did you mean 'build'?"),
        (("build", "m.pt", "--samples", "many"), "Invalid value for '--samples'"),
        (("build", "m.pt", "n.pt"), "unexpected extra argument"),
        (("build", "m.pt", "--bits"), "argument"),
        (("eval",), "Missing argument 'PACKAGE"),
    ],
)
def test_usage_faults_exit_with_2_and_a_suggestion(arguments, message, capsys, workspace):
    done = run(capsys, workspace, *arguments)
    assert done.code == 2
    assert message in done.user_fault
    assert done.out == ""
    done = run(capsys, workspace, *arguments[:1], "--json", *arguments[1:])
    assert done.code == 2
    assert done.json["exit_code"] == 2
    assert message in done.json["error"] or "--json" in done.json["error"]


def raised_by_targets(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr("dfqc.compiler.doctor.describe_targets", fail)


FAULTS = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, DfqcError)]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_become_their_exit_codes_without_a_traceback(fault, capsys, monkeypatch):
    raised_by_targets(monkeypatch, fault("conv1: what was got; what to do"))
    assert cli.main(["targets", "--json"]) == fault.exit_code
    streams = capsys.readouterr()
    assert streams.err == "dfqc: conv1: what was got; what to do\n"
    assert json.loads(streams.out) == {
        "error": "conv1: what was got; what to do", "exit_code": fault.exit_code
    }  # fmt: skip


def test_exit_codes_are_those_of_the_contract():
    codes = {fault.__name__: fault.exit_code for fault in FAULTS}
    assert codes == {
        "DfqcError": 1, "UsageError": 2, "LoadError": 3, "UnsupportedError": 4,
        "AccuracyGateError": 5, "SpeedGateError": 6, "ParityGateError": 7, "EnvironmentFault": 8,
        "Interrupted": 130,
    }  # fmt: skip


def test_a_bug_is_said_to_be_one(capsys, monkeypatch):
    raised_by_targets(monkeypatch, ZeroDivisionError("oops"))
    assert cli.main(["targets", "--json"]) == 1
    streams = capsys.readouterr()
    assert "Traceback" in streams.err
    assert "internal error, a bug of dfqc: ZeroDivisionError: oops" in streams.err
    assert json.loads(streams.out)["exit_code"] == 1


def test_an_interrupt_exits_with_130(capsys, monkeypatch):
    raised_by_targets(monkeypatch, KeyboardInterrupt)
    assert cli.main(["targets", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["exit_code"] == 130


def test_sigterm_is_an_interrupt():
    code = (
        "import os, signal, sys; from dfqc.compiler import cli, doctor\n"
        "doctor.describe_targets = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(cli.main(['targets']))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 130


def test_a_reader_that_has_seen_enough_is_no_fault():
    code = "import sys; from dfqc.compiler.cli import main; sys.exit(main(['list']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0, done.stderr


def test_warnings_go_to_stderr(capsys, monkeypatch):
    def warn():
        logging.getLogger("dfqc.store").warning("entry %s is damaged", "x")
        logging.getLogger("dfqc.store").info("a detail")
        return {}

    monkeypatch.setattr("dfqc.compiler.doctor.describe_targets", warn)
    assert cli.main(["targets", "--json"]) == 0
    streams = capsys.readouterr()
    assert streams.err == "dfqc: warning: entry x is damaged\n"
    assert json.loads(streams.out) == {"targets": {}}
    cli.main(["--verbose", "targets"])
    assert "dfqc: info: a detail" in capsys.readouterr().err


def test_targets_and_plugins_are_listed(capsys):
    assert cli.main(["targets", "--json"]) == 0
    targets = json.loads(capsys.readouterr().out)["targets"]
    assert set(targets["ort"]["weight_bits"]) == set(range(2, 9))
    assert cli.main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"zeroq", "noise", "images"} <= listed["synthesizer"].keys()
    assert "rtn" in listed["quantizer"]
    assert all(text for kind in listed.values() for text in kind.values())
    cli.main(["list"])
    assert "zeroq" in capsys.readouterr().out


def test_listing_loads_no_torch():
    code = (
        "import sys; from dfqc.compiler.cli import main\n"
        "main(['list']); main(['targets']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_doctor(capsys, tmp_path):
    assert cli.main(["doctor", "--cache-dir", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == []
    assert found["can_build"] is True
    assert found["cache"]["folder"] == str(tmp_path)
    assert found["versions"]["core"]["onnxruntime"]
    cli.main(["doctor", "--cache-dir", str(tmp_path)])
    assert "all well" in capsys.readouterr().out


def test_doctor_exits_with_8_where_something_is_missing(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert cli.main(["doctor", "--cache-dir", str(tmp_path / "file" / "x"), "--json"]) == 8
    assert json.loads(capsys.readouterr().out)["missing"] == ["a usable cache folder"]
    monkeypatch.setattr(machine, "version", lambda name: None if name == "onnx" else "1")
    assert cli.main(["doctor", "--cache-dir", str(tmp_path), "--json"]) == 8
    assert json.loads(capsys.readouterr().out)["missing"] == ["onnx"]


def test_signal_handlers_are_set_in_the_main_thread_only(tmp_path):
    code = (
        "import threading; from dfqc.compiler.cli import main\n"
        "codes = []\n"
        "t = threading.Thread(target=lambda: codes.append(main(['--version'])))\n"
        "t.start(); t.join(); assert codes == [0]\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    code = (
        "import signal; from dfqc.compiler.cli import main\n"
        "assert main(['--version']) == 0\n"
        "try: signal.raise_signal(signal.SIGTERM)\n"
        "except KeyboardInterrupt: raise SystemExit(42)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 42
