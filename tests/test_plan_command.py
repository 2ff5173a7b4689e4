"""`dfqc plan` on tiny nets: what it says of memory, and of given images."""

import pytest

from command import QUICK, run


def test_a_plan_over_the_memory_is_warned_of(capsys, workspace):
    given = (*workspace.weights(), *QUICK, "--synth", "noise", "--quantizer", "rtn")
    done = run(capsys, workspace, "plan", *given, "--memory", "2g")
    assert (done.code, "may end there" in done.err) == (0, False)
    done = run(capsys, workspace, "plan", *given, "--memory", "2g", "--samples", "2000000")
    assert done.code == 0
    assert "is estimated to need" in done.err
    assert "--memory is 2.0 GB: the build may end there with exit code 8" in done.err


@pytest.mark.parametrize("quantizer", ["rtn", "gptq", "reconstruct"])
def test_given_images_are_planned(capsys, workspace, quantizer):
    given = ("--calib-data", workspace.images(), "--quantizer", quantizer)
    done = run(capsys, workspace, "plan", *workspace.weights(), *QUICK, *given, "--json")
    assert done.code == 0
    assert {row["stage"] for row in done.json["estimate"]} >= {"synthesize", "quantize"}
