"""`dfqc distill` from end to end on tiny nets, its faults, and a build of what it wrote."""

import csv
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import models
from command import ARCHITECTURES, Workspace, labelled_by_float, run
from dfqc.compiler.distill_options import IMAGES
from dfqc.compiler.loading import load_model

STUDENT = f"{ARCHITECTURES}:{models.TINY['residual'].__name__}"
PLAIN = f"{ARCHITECTURES}:{models.TINY['plain'].__name__}"
QUICK = ("--samples", "8", "--synth-option", "iterations=3")
SHORT = ("--effort", "quick", "--distill-option", "steps=6", "--distill-option", "points=3",
         "--distill-option", "batch_size=8")  # fmt: skip
SMALL_DAFL = ("--synth-option", "channels=8", "--synth-option", "train_batch=8")


def arguments(workspace, *more, student=STUDENT, images=QUICK):
    return ("distill", *workspace.weights(), "--student", student, *SHORT, *images,
            "--cache-dir", workspace.cache, *more)  # fmt: skip


def distill(capsys, workspace, *more, code=0, **kind):
    file = workspace.root / "student.pt2"
    done = run(capsys, workspace, *arguments(workspace, *more, "-o", file, "--json", **kind))
    assert done.code == code, done.err
    return done.json


def test_the_help_states_how_many_images_a_training_gets(capsys, workspace):
    page = " ".join(run(capsys, workspace, "distill", "--help").out.split())
    counts = ", ".join(map(str, IMAGES.values()))
    assert f"[default: {counts} by --effort, with --method images; of --calib-data all]" in page
    assert "[default: zeroq, with --method images]" in page


def refuse(capsys, workspace, code, *more, **kind):
    done = run(capsys, workspace, *arguments(workspace, *more, **kind))
    assert done.code == code, done.err
    assert "distill  " not in done.err
    return done.user_fault


def test_a_student_is_trained_told_of_and_built(shared, capsys):
    data = labelled_by_float(shared)
    made = distill(capsys, shared, "--eval-data", data)
    assert made["steps"] == {"done": 6, "planned": 6, "shortened": False}
    assert made["top1"]["teacher"] == 100
    assert made["top1"]["student"] == pytest.approx(made["agreement"]["evaluation"])
    assert made["taken_over"]["layer2"] == "layer2"
    assert [tuple(h["shape"]) for h in made["hints"]] == [(8, 16, 16), (16, 8, 8)]
    assert made["images"] == {"source": "zeroq", "count": 8}
    with Path(made["curve_file"]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [p["step"] for p in made["curve"]] == [0, 2, 4, 6]

    done = run(
        capsys, shared, "build", made["file"], "--samples", "8", "--effort", "quick",
        "--eval-data", data, "--threads", "1", "-o", shared.root / "built", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "assumed" not in done.err  # the file says how its images are prepared
    assert done.json["metrics"]["top1"]["float"] == pytest.approx(made["top1"]["student"])
    assert done.json["parity"]["argmax_agreement"] >= 99
    assert done.json["model"]["params"] == made["student"]["params"]


def test_the_file_keeps_batch_norms_and_preprocessing(shared, capsys):
    made = distill(capsys, shared)
    loaded = load_model(made["file"])
    assert loaded.image == models.IMAGE
    names = [name for name in loaded.model.state_dict if name.endswith("running_mean")]
    assert len(names) == 6
    again = distill(capsys, shared)
    assert all(stage["cached"] for stage in again["stages"] if stage["name"] != "zoo")
    assert again["sha256"] == made["sha256"]


def test_methods_and_other_architectures(shared, capsys):
    member = shared.root / "member.pt"
    torch.save(models.build("plain", 1).state_dict(), member)
    zoo = f"{member}@{PLAIN}"
    digests = set()
    for more in (("--method", "dafl"), ("--method", "mix", "--zoo", zoo)):
        made = distill(capsys, shared, *more, images=SMALL_DAFL, student=PLAIN)
        assert made["images"] == "dafl"
        assert made["taken_over"] == {"stem.0": "conv1"}  # of the same shape
        digests.add(made["sha256"])
    assert len(digests) == 2


def test_a_zoo_architecture_gets_the_teachers_classes_and_size(shared, capsys):
    made = distill(capsys, shared, "--distill-option", "steps=1", student="timm:test_resnet")
    assert made["student"]["classes"] == 10
    assert load_model(made["file"]).image.size == models.IMAGE.size


def test_starting_at_random_takes_nothing(shared, capsys):
    made = distill(capsys, shared, "--init", "random", "--distill-option", "hint=0")
    assert (made["taken_over"], made["hints"]) == ({}, [])


POOLED = """
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(F.adaptive_max_pool2d(self.conv(x).relu(), 1).flatten(1))
"""


def test_another_student_of_the_same_size_is_trained_anew(shared, capsys):
    path = shared.root / "pooled.py"
    path.write_text(POOLED)
    first = distill(capsys, shared, student=f"{path}:Net")
    path.write_text(POOLED.replace("adaptive_max_pool2d", "adaptive_avg_pool2d"))
    second = distill(capsys, shared, student=f"{path}:Net")
    cached = {stage["name"]: stage["cached"] for stage in second["stages"]}
    assert cached["synthesize"]
    assert not cached["distill"]
    assert not cached["judge"]
    assert [row["loss"] for row in first["curve"]] != [row["loss"] for row in second["curve"]]


FACTORY = """
from torch import nn

class Net(nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(features, classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().flatten(1))

def seven():
    return Net(4 * 14 * 14, 7)

def larger():
    return Net(4 * 30 * 30, 10)
"""


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("seven", "--student .*: gives 7 class scores and the teacher 10"),
        ("larger", "does not run on images of 3x16x16"),
        ("missing", "--student .*: .* defines no 'missing'"),
    ],
)
def test_students_that_do_not_fit_are_refused_before_images_are_made(
    factory, message, shared, capsys
):
    path = shared.root / "students.py"
    path.write_text(FACTORY)
    assert re.search(message, refuse(capsys, shared, 3, student=f"{path}:{factory}"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "images2"), "expected one of images, dafl, mix"),
        (("--method", "dafl", "--samples", "9"), "--samples: --method dafl trains a generator"),
        (("--method", "mix"), "--method mix: images are judged by the models of a zoo"),
        (("--distill-option", "speed=3"), "distill has no option 'speed'"),
        (("--distill-option", "lr=-1"), "option lr: got -1"),
        (("--init", "zero"), "option init: got 'zero'"),
        (("-o", "student.onnx"), "expected a file ending in .pt2"),
    ],
)
def test_what_contradicts_itself_is_refused(more, message, shared, capsys):
    images = () if "--method" in more else QUICK
    assert message in refuse(capsys, shared, 2, *more, images=images)


def test_a_broken_training_exits_with_5_and_leaves_the_best_student(shared, capsys):
    made = distill(capsys, shared, "--distill-option", "lr=1e30", code=5)
    assert "no number" in made["stopped"]
    assert made["exit_code"] == 5
    load_model(made["file"])  # has finite weights


def segments(workspace):
    records = workspace.cache.glob("v1/objects/*/*/artifact.json")
    return [r for r in map(json.loads, (p.read_text() for p in records)) if r["stage"] ==
            "distill.part"]  # fmt: skip


def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path, capsys):
    digests = []
    torch.set_num_threads(1)  # as the killed process
    slow = ("--distill-option", "steps=16", "--distill-option", "points=16", "--json")
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
        workspace = Workspace(tmp_path / name)
        words = arguments(workspace, *slow, "-o", workspace.root / "student.pt2")
        if name == "killed":
            process = subprocess.Popen(
                workspace.command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            deadline = time.monotonic() + 120
            while len(segments(workspace)) < 3 and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert 3 <= len(segments(workspace)) < 17
        done = run(capsys, workspace, *words)
        assert done.code == 0, done.err
        digests.append(done.json["sha256"])
        assert len(segments(workspace)) == 17
    assert digests[0] == digests[1]
