import math

import numpy as np
import pytest

from dfqc.compiler import evaluate
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import LoadError
from qdq_models import CLASSES as CLASSES_OF_NET
from qdq_models import SIZE, tiny_net, write_tiny_package

CLASSES = 4


class Table:
    """A data set whose images hold nothing but their own number."""

    image = ImageSpec((1, 1, 1))
    source = "table.npz"

    def __init__(self, labels):
        self.labels = np.array(labels, np.int64)

    def __len__(self):
        return len(self.labels)

    def batches(self, size):
        for start in range(0, len(self), size):
            labels = self.labels[start : start + size]
            numbers = np.arange(start, start + len(labels), dtype=np.float32)
            yield numbers.reshape(-1, 1, 1, 1), labels


class Says:
    """A runner that looks its logits up by the number in the image."""

    def __init__(self, logits):
        self.logits = np.asarray(logits, np.float32)

    def infer(self, images):
        return self.logits[images.reshape(-1).astype(int)]


def one_hot(classes):
    return np.eye(CLASSES, dtype=np.float32)[list(classes)]


def test_top1_counts_right_predictions():
    runner = Says(one_hot([0, 1, 2, 3, 0, 0, 0, 0]))
    result = evaluate.top1(runner, Table([0, 1, 2, 3, 1, 0, 1, 0]))
    assert (result.percent, result.images) == (75.0, 8)
    assert result.standard_error == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 8))


@pytest.mark.parametrize("batch", [1, 3, 8, 100])
def test_the_batch_size_does_not_change_the_result(batch):
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, CLASSES, 20), rng.normal(size=(20, CLASSES))
    result = evaluate.top1(Says(logits), Table(labels), batch=batch)
    assert result.percent == pytest.approx(100 * (logits.argmax(1) == labels).mean())


def test_scores_of_two_engines_are_paired():
    labels = [0] * 100
    scores = evaluate.score(
        {"float": Says(one_hot([0] * 90 + [1] * 10)), "engine": Says(one_hot([0] * 86 + [1] * 14))},
        Table(labels),
    )
    assert scores.top1("float").percent == pytest.approx(90)
    assert scores.top1("engine").percent == pytest.approx(86)
    assert scores.agreement("float", "engine") == pytest.approx(96)
    assert scores.paired_error("float", "engine") == pytest.approx(100 * math.sqrt(0.04 / 100))


def test_paired_error_covers_the_spread_of_many_draws():
    # Two engines that disagree on 5 % of the images, either of them right there.
    rng = np.random.default_rng(0)
    images = 400
    disagree = rng.random((4000, images)) < 0.05
    first_is_right = rng.random((4000, images)) < 0.5
    difference = np.where(disagree, np.where(first_is_right, 1, -1), 0).mean(1)
    expected = evaluate.paired_standard_error(95.0, images)
    assert 100 * difference.std() == pytest.approx(expected, rel=0.05)


def test_progress_reaches_the_end():
    calls = []
    evaluate.score(
        {"engine": Says(one_hot([0] * 5))},
        Table([0] * 5),
        batch=2,
        progress=lambda done, total, note: calls.append((done, total)),
    )
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_agreement_is_the_percent_of_equal_argmax():
    assert evaluate.agreement(one_hot([0, 1, 2, 3]), 5 * one_hot([0, 1, 2, 0])) == 75.0


def test_sqnr_of_a_known_error():
    reference = np.random.default_rng(0).normal(size=(50, CLASSES)).astype(np.float64)
    assert evaluate.sqnr_db(reference, reference * 1.01) == pytest.approx(40.0)
    assert evaluate.sqnr_db(reference, reference) == math.inf


def test_sqnr_of_uniform_rounding_is_that_of_theory():
    # 6.02 dB a bit: noise step²/12 under a full-scale uniform signal of 2**bits steps.
    signal = np.random.default_rng(0).uniform(-128, 128, 100_000)
    expected = 10 * math.log10((256**2 / 12) / (1 / 12))
    assert evaluate.sqnr_db(signal, np.rint(signal)) == pytest.approx(expected, abs=0.05)


def test_compare_streams_and_gives_what_the_whole_would():
    rng = np.random.default_rng(0)
    ours = rng.normal(size=(10, CLASSES)).astype(np.float32)
    theirs = ours + 0.3 * rng.normal(size=ours.shape).astype(np.float32)
    pieces = [images for images, _ in Table(range(10)).batches(4)]
    result = evaluate.compare(Says(ours), Says(theirs), pieces)
    assert result.images == 10
    assert result.agreement == pytest.approx(100 * (ours.argmax(1) == theirs.argmax(1)).mean())
    assert result.max_abs == pytest.approx(float(np.abs(ours - theirs).max()))
    noise = ((ours.astype(np.float64) - theirs) ** 2).sum()
    expected = 10 * math.log10((ours.astype(np.float64) ** 2).sum() / noise)
    assert result.sqnr_db == pytest.approx(expected)


def test_a_map_of_predictions_counts_as_one_image():
    ours = np.zeros((2, CLASSES, 2, 2), np.float32)
    ours[:, 0] = 1
    theirs = ours.copy()
    theirs[1, 1, 0, 0] = 2  # one of the four positions of the second image
    pieces = [images for images, _ in Table(range(2)).batches(2)]
    result = evaluate.compare(Says(ours), Says(theirs), pieces)
    assert result.agreement == pytest.approx(100 * 7 / 8)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(LoadError, match="no images"):
        evaluate.compare(Says(one_hot([0])), Says(one_hot([0])), [])


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_out_of_range_are_refused(label):
    with pytest.raises(LoadError, match=rf"table.npz: got label {label}, expected 0\.\.3"):
        evaluate.top1(Says(one_hot([0, 0])), Table([0, label]))


def test_an_empty_data_set_is_refused():
    with pytest.raises(LoadError, match=r"table\.npz: no images"):
        evaluate.top1(Says(one_hot([0])), Table([]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_refused(bad):
    logits = one_hot([0, 1, 2])
    logits[1, 2] = bad
    with pytest.raises(LoadError, match="1 of 3 outputs hold NaN or Inf"):
        evaluate.top1(Says(logits), Table([0, 1, 2]))


def test_outputs_that_are_no_classes_are_refused():
    with pytest.raises(LoadError, match="shape 2×4×1, expected"):
        evaluate.top1(Says(one_hot([0, 1])[..., None]), Table([0, 1]))


@pytest.fixture
def images(tmp_path):
    """Labelled images, and what the float network of `tiny_net` makes of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, *SIZE[1:], 3), dtype=np.uint8)
    normalized = ((pixels / 255 - 0.5) / 0.25).astype(np.float32).transpose(0, 3, 1, 2)
    predicted = tiny_net(float32=True, images=normalized).outputs.argmax(1)
    labels = np.where(np.arange(24) < 18, predicted, (predicted + 1) % CLASSES_OF_NET)
    np.savez(tmp_path / "data.npz", images=pixels, labels=labels.astype(np.int64))
    return tmp_path / "data.npz"


def test_a_package_is_evaluated_beside_its_float_model(images, tmp_path):
    write_tiny_package(tmp_path / "net")
    result = evaluate.run_eval(tmp_path / "net", images, batch=7, threads=1)
    assert result["top1"]["float"]["percent"] == 75.0
    assert result["drop"] == 75.0 - result["top1"]["engine"]["percent"]
    disagree = 1 - result["agreement"] / 100
    assert result["drop_standard_error"] == pytest.approx(100 * math.sqrt(disagree / 24))
    lines = evaluate.describe_eval(result)
    assert [line.split()[0] for line in lines] == ["engine", "float", "drop", "ran"]
    assert "75.00 %" in lines[1]


def test_a_package_without_float_model_is_evaluated_alone(images, tmp_path):
    write_tiny_package(tmp_path / "net", float32=True)
    (tmp_path / "net" / "float.onnx").unlink()
    result = evaluate.run_eval(tmp_path / "net", images)
    assert set(result) == {"package", "data", "top1", "provider"}
    assert result["top1"]["engine"]["percent"] == 75.0
    assert len(evaluate.describe_eval(result)) == 2  # and where it ran
