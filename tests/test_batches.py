import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from pydantic import BaseModel

import models
from dfqc.compiler import batches, driver, plugins
from dfqc.compiler.contracts import CalibSet


class Options(BaseModel):
    batch_size: int = 4


class Recorder:
    """A synthesizer that notes what it is given; a batch takes `each` seconds of a fake clock."""

    Options, NEEDS_BN, NEEDS_CLASSES, USES_ZOO, CARRIES = Options, False, True, True, True

    def __init__(self, each=0.0):
        self.now, self.each, self.calls = 0.0, each, []
        self.carried = 1.0  # work of a batch after the first

    def count_carried(self, options):
        return self.carried

    def synthesize(self, graph, count, options, *, rng, device, progress, supplies):
        self.calls.append((count, rng.initial_seed(), supplies))
        granted = supplies.seconds
        self.now += self.each if granted is None else min(self.each, granted)
        progress(1, 2, "half")
        progress(2, 2, "done")
        short = granted is not None and granted < self.each
        return CalibSet(
            torch.full((count, *graph.image.size), float(len(self.calls))), supplies.labels, "rec",
            {"shortened": short}, {"state": torch.tensor([float(len(self.calls))])},
        )  # fmt: skip


class Context:
    """What `make_images` uses of a driver's context."""

    def __init__(self, folder, classes=10):
        self.folder, self.reports, self.parts = folder, [], []
        self.settings = SimpleNamespace(recipe=SimpleNamespace(device="cpu"))
        (folder / "facts.json").write_text(json.dumps({"classes": classes}))

    def value(self, name):
        return models.trace_tiny("plain")

    def path(self, name, file):
        return self.folder / file

    def seed(self, index=0):
        return 1000 + index

    def progress(self):
        return lambda *report: self.reports.append(report)

    def checkpoint(self, part, make, save, load, *, without, cut_short):
        value = make()
        self.parts.append((part, cut_short(value)))
        return value


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setattr(plugins, "load", lambda kind, name: made)
    monkeypatch.setattr(batches.time, "monotonic", lambda: made.now)
    return made


def test_batches_have_their_sizes_seeds_labels_and_carry(recorder, tmp_path):
    context, zoo = Context(tmp_path), [models.trace_tiny("plain")]
    calib = batches.make_images(context, "rec", Options(), 10, zoo=zoo)
    assert [c for c, _, _ in recorder.calls] == [4, 3, 3]
    assert [s for _, s, _ in recorder.calls] == [1000, 1001, 1002]
    assert all(s.zoo is zoo and s.seconds is None for _, _, s in recorder.calls)
    assert [dict(s.carry) for _, _, s in recorder.calls] == [
        {}, {"state": torch.tensor([1.0])}, {"state": torch.tensor([2.0])}
    ]  # fmt: skip
    assert calib.images.shape[0] == 10
    assert calib.images[:, 0, 0, 0].tolist() == [1.0] * 4 + [2.0] * 3 + [3.0] * 3
    assert calib.carry == {}  # only the next batch needs it
    firsts = [part["first"] for part, _ in context.parts]
    carries = [part["carry"] for part, _ in context.parts]
    assert firsts == [0, 4, 7]
    assert carries[0] is None
    assert len(set(carries)) == 3  # what a batch starts from is part of its key
    assert sorted(calib.labels.tolist()) == list(range(10))  # one round: every class once
    assert context.reports[-1][:2] == (6, 6)
    assert calib.info["asked"] == 10


@pytest.mark.parametrize(("count", "sizes"), [(4, [4]), (5, [3, 2]), (8, [4, 4]), (9, [3, 3, 3])])
def test_no_batch_is_a_left_over(count, sizes):
    assert batches.split_evenly(count, 4) == sizes


def test_a_note_is_told_once(recorder, tmp_path, caplog, monkeypatch):
    make = recorder.synthesize

    def noting(*arguments, **more):
        made = make(*arguments, **more)
        return dataclasses.replace(made, info={"note": "one net alone"})

    monkeypatch.setattr(recorder, "synthesize", noting, raising=False)
    batches.make_images(Context(tmp_path), "rec", Options(), 12)
    assert caplog.text.count("one net alone") == 1


def test_labels_of_an_image_do_not_depend_on_how_many_follow(recorder, tmp_path):
    context = Context(tmp_path)
    few = batches.make_images(context, "rec", Options(), 8).labels
    many = batches.make_images(context, "rec", Options(), 40).labels
    assert torch.equal(few, many[:8])
    assert torch.bincount(many).tolist() == [4] * 10


def test_a_model_without_classes_gets_no_labels(recorder, tmp_path):
    calib = batches.make_images(Context(tmp_path, classes=None), "rec", Options(), 4)
    assert recorder.calls[0][2].labels is None
    assert calib.labels is None


@pytest.mark.parametrize("count", [1, 9, 10, 25, 1000])
def test_labels_are_balanced(count):
    labels = batches.balance_labels(count, 10, range(-(-count // 10)))
    counts = torch.bincount(labels, minlength=10)
    assert len(labels) == count
    assert counts.max() - counts.min() <= 1


def test_time_enough_makes_all_and_shortens_none(recorder, tmp_path):
    recorder.each = 1.0
    context = Context(tmp_path)
    calib = batches.make_images(context, "rec", Options(), 16, seconds=10)
    assert len(calib.images) == 16
    assert [short for _, short in context.parts] == [False] * 4


def test_too_little_time_makes_fewer_images_with_a_fair_share_each(recorder, tmp_path, caplog):
    recorder.each = 8.0
    context = Context(tmp_path)
    calib = batches.make_images(context, "rec", Options(), 64, seconds=20)
    assert [s.seconds for _, _, s in recorder.calls] == pytest.approx([5, 5, 5, 5])
    assert len(calib.images) == 16
    assert recorder.now <= 20
    assert all(short for _, short in context.parts)  # stored for runs of the same limit only
    assert "16 of 64 were made, 4 of 4 batches with fewer iterations" in caplog.text
    assert calib.info["asked"] == 64


def test_a_first_batch_that_does_nearly_all_gets_nearly_all_of_the_time(recorder, tmp_path):
    recorder.each, recorder.carried = 1000.0, 0.05
    calib = batches.make_images(Context(tmp_path), "rec", Options(), 16, seconds=23)
    granted = [s.seconds for _, _, s in recorder.calls]
    assert granted == pytest.approx([20, 1, 1, 1])
    assert len(calib.images) == 16  # the others are not given up for its sake


def test_batches_that_are_only_drawn_are_made_whatever_time_is_left(recorder, tmp_path):
    recorder.each, recorder.carried = 1000.0, 0.0
    context = Context(tmp_path)
    calib = batches.make_images(context, "rec", Options(), 14, seconds=23)
    assert [s.seconds for _, _, s in recorder.calls] == [23, 0, 0, 0]
    assert [s.following for _, _, s in recorder.calls] == [10, 6, 3, 0]
    assert len(calib.images) == 14
    assert context.reports[:2] == [(1, 2, "half"), (2, 2, "done")]
    assert all(done == total for done, total, _ in context.reports[2:])


def test_work_that_a_batch_keeps_is_known_by_the_batch(recorder, tmp_path, monkeypatch):
    kept = []

    def working(graph, count, options, *, supplies, **more):
        for short in (False, True):
            value = supplies.checkpoint(
                {"game": 0}, lambda short=short: SimpleNamespace(shortened=short), None, None
            )
            kept.append(value.shortened)
        return CalibSet(torch.zeros(count, 3, 4, 4), None, "rec")

    monkeypatch.setattr(recorder, "synthesize", working, raising=False)
    context = Context(tmp_path, classes=None)
    batches.make_images(context, "rec", Options(), 8)
    inner, outer = ([p for p in context.parts if ("part" in p[0]) == own] for own in (True, False))
    assert kept == [False, True] * 2
    assert [short for _, short in inner] == kept  # one cut short serves its own limit only
    assert [part["index"] for part, _ in inner] == [0, 0, 1, 1]
    assert [part["part"] for part, _ in inner] == [{"game": 0}] * 4
    wholes = [part for part, _ in outer]
    assert all({k: v for k, v in part.items() if k != "part"} in wholes for part, _ in inner)


def test_no_time_at_all_still_makes_one_batch(recorder, tmp_path):
    recorder.each = 8.0
    calib = batches.make_images(Context(tmp_path), "rec", Options(), 64, seconds=0.0)
    assert len(calib.images) == 4


def test_the_share_of_the_time_left():
    def context(seconds, elapsed):
        limits = SimpleNamespace(seconds=seconds)
        return driver.Context(SimpleNamespace(limits=limits, elapsed=lambda: elapsed), None)

    assert context(None, 5.0).share_of_time(0.5) is None
    assert context(10.0, 2.0).share_of_time(0.5) == 4.0
    assert context(10.0, 18.0).share_of_time(0.5) == 0.0
