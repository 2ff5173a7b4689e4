"""The CI examples: YAML that says what dfqc takes, and shell that a shell takes."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from dfqc.compiler import errors
from dfqc.compiler.cli import app

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "ci"
EXAMPLES = ("github.yml", "gitlab.yml")


def scripts(name):
    """Return every piece of shell in an example."""
    data = yaml.safe_load((FOLDER / name).read_text())
    if name == "github.yml":
        return [step["run"] for step in data["jobs"]["compress"]["steps"] if "run" in step]
    return [*data["compress"]["before_script"], *data["compress"]["script"]]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_dfqc_command_is_one_that_dfqc_takes(name):
    verbs = typer.main.get_command(app).commands
    found = []
    for line in "\n".join(scripts(name)).splitlines():
        for text in re.findall(r"\bdfqc (?:build|diff|bench|verify|eval)\b[^|>;]*", line):
            words = shlex.split(text)
            found.append(words[1])
            context = verbs[words[1]].make_context(words[1], words[2:], resilient_parsing=False)
            assert context.command.name == words[1]
    assert found == ["build", "diff"]


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_the_shell_is_valid(name):
    for script in scripts(name):
        text = re.sub(r"\$\{\{.*?\}\}", "X", script)  # what GitHub fills in
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
@pytest.mark.parametrize(
    ("code", "goes_on"), [(0, True), (5, True), (7, True), (3, False), (8, False)]
)
def test_failed_gates_are_compared_and_other_faults_end_the_job(name, code, goes_on, tmp_path):
    (build,) = [script for script in scripts(name) if "dfqc build" in script]
    stand_in = f"dfqc() {{ return {code}; }}\nGITHUB_OUTPUT={tmp_path / 'output'}\n"
    done = subprocess.run(["bash", "-e", "-c", f"{stand_in}{build}\necho on"], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == ("on" if goes_on else "")
    assert done.returncode == (0 if goes_on else code)
    if name == "github.yml":
        assert (tmp_path / "output").read_text() == f"code={code}\n"


def test_the_exit_codes_are_the_documented_ones():
    text = (FOLDER / "README.md").read_text()
    named = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", text, re.M)
             for code in row.split(",")}  # fmt: skip
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    known = {kind.exit_code for kind in kinds if issubclass(kind, errors.DfqcError)}
    assert named == (known - {1}) | {0}
    assert {5, 6, 7} == {
        kind.exit_code
        for kind in (errors.AccuracyGateError, errors.SpeedGateError, errors.ParityGateError)
    }
