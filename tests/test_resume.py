import json
import signal
import subprocess
import time

from command import FEW, QUICK, SLOW, Workspace, build, run, stored_stages


def test_a_corrupted_stage_is_found_and_made_again(workspace, capsys):
    first = build(capsys, workspace)
    records = workspace.cache.rglob("artifact.json")
    entry = next(p for p in records if json.loads(p.read_text())["stage"] == "synthesize")
    damaged = entry.parent / "calib.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    done = run(
        capsys, workspace, "build", *workspace.weights(), *QUICK, *FEW,
        "-o", workspace.root / "package", "--json",
    )  # fmt: skip
    assert "is damaged (calib.safetensors" in done.err
    assert "synthesize" not in stored_stages(done.json)
    assert "quantize" in stored_stages(done.json)  # made again, it is the same
    assert done.json["files"]["model.onnx"] == first["files"]["model.onnx"]


def parts(workspace):
    found = []
    for path in workspace.cache.glob("v1/objects/*/*/artifact.json"):
        record = json.loads(path.read_text())
        if record["stage"] == "synthesize.part":
            found.append(record["key"])
    return found


def kill_after_parts(workspace, count, sig):
    command = workspace.command(
        "build", *workspace.weights(), *SLOW, "-o", workspace.root / "package", "--json"
    )
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while len(parts(workspace)) < count and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(sig)
    out, err = process.communicate()
    return process.returncode, out, err


def resumed(workspace):
    """Build in a process of its own, as the killed one was: with as many threads as that had."""
    done = workspace.dfqc(
        "build", *workspace.weights(), *SLOW, "-o", workspace.root / "package", "--json"
    )
    assert done.code == 0, done.err
    return done.json


def test_kill_minus_nine_loses_only_the_running_batch(tmp_path):
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    killed, whole = Workspace(tmp_path / "killed"), Workspace(tmp_path / "whole")
    code, _, _ = kill_after_parts(killed, 2, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (killed.root / "package").exists()
    before = parts(killed)
    assert 2 <= len(before) < 6
    manifest = resumed(killed)
    assert stored_stages(manifest) >= {"trace", "plan", "data"}
    assert set(before) < set(parts(killed))
    assert len(parts(killed)) == 6
    assert manifest["files"]["model.onnx"] == resumed(whole)["files"]["model.onnx"]


def test_an_interrupt_exits_with_130_and_resumes(workspace):
    code, out, err = kill_after_parts(workspace, 1, signal.SIGINT)
    assert code == 130, err
    assert "interrupted in stage synthesize" in json.loads(out)["error"]
    assert "run the same command again" in err
    assert "Traceback" not in err
    assert len(parts(workspace)) < 6
    resumed(workspace)


def test_a_spent_budget_exits_with_8_and_resumes(workspace, capsys):
    done = run(
        capsys, workspace, "build", *workspace.weights(), *SLOW, "--budget", "0.001",
        "-o", workspace.root / "package", "--json",
    )  # fmt: skip
    assert done.code == 8
    assert "the budget of 0.0 s is used up" in done.json["error"]
    assert resumed(workspace)["status"] == "passed"
