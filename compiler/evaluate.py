"""How right an engine is: runners and labelled images in, top-1, agreement and SQNR out (no torch).

Images stream through batch by batch; only predictions are kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dfqc.compiler.contracts import Dataset, Progress, Runner, silent
from dfqc.compiler.errors import LoadError
from dfqc.compiler.package import open_package
from dfqc.compiler.providers import opener, provider_of

BATCH = 64
MIN_AGREEMENT = 99.0  # percent of the images on which simulation and engine predict the same


@dataclass(frozen=True)
class Top1:
    """Share of right predictions. `standard_error` is binomial; both are in percent."""

    percent: float
    images: int
    standard_error: float


@dataclass(frozen=True)
class Comparison:
    """How far a second engine is from a first; `agreement` is the percent of equal arg-max."""

    agreement: float
    sqnr_db: float
    max_abs: float
    images: int


@dataclass(frozen=True)
class Scores:
    """Predictions (n,) of several engines on the same images, in the same order."""

    labels: np.ndarray
    predictions: Mapping[str, np.ndarray]

    def top1(self, name: str) -> Top1:
        """Return the accuracy of one engine."""
        right = float((self.predictions[name] == self.labels).mean())
        count = len(self.labels)
        return Top1(100 * right, count, 100 * math.sqrt(right * (1 - right) / count))

    def agreement(self, first: str, second: str) -> float:
        """Return the percent of images on which two engines predict the same class."""
        return _percent_equal(self.predictions[first], self.predictions[second])

    def paired_error(self, first: str, second: str) -> float:
        """Return the standard error, in points, of the difference of two engines' top-1."""
        return paired_standard_error(self.agreement(first, second), len(self.labels))


def agrees(percent: float, images: int) -> bool:
    """Report whether simulation and engine predict alike: on 99 %, or on all images but one.

    One tie that rounding decides otherwise is no fault, also among few images.
    """
    different = images * (100.0 - percent) / 100.0
    return percent >= MIN_AGREEMENT or different <= 1 + 1e-6


def score(
    runners: Mapping[str, Runner],
    dataset: Dataset,
    *,
    batch: int = BATCH,
    progress: Progress = silent,
) -> Scores:
    """Run every engine over the data set once.

    Raises:
        LoadError: no images, labels outside of the model's classes, outputs that are not finite.
    """
    if len(dataset) == 0:
        raise LoadError(f"{dataset.source}: no images; expected at least one to evaluate on")
    labels: list[np.ndarray] = []
    found: dict[str, list[np.ndarray]] = {name: [] for name in runners}
    done = 0
    for images, truth in dataset.batches(batch):
        for name, runner in runners.items():
            logits = _checked_logits(runner.infer(images), name)
            _check_labels(truth, logits.shape[1], dataset.source)
            found[name].append(logits.argmax(1))
        labels.append(truth)
        done += len(truth)
        progress(done, len(dataset), "images")
    return Scores(
        np.concatenate(labels), {name: np.concatenate(parts) for name, parts in found.items()}
    )


def top1(runner: Runner, dataset: Dataset, *, batch: int = BATCH) -> Top1:
    """Return the accuracy of one engine on a labelled data set."""
    return score({"engine": runner}, dataset, batch=batch).top1("engine")


def compare(reference: Runner, other: Runner, batches: Iterable[np.ndarray]) -> Comparison:
    """Run two engines on the same images (float32, n×c×h×w), labels not needed."""
    equal, images, largest = 0.0, 0, 0.0
    signal = noise = 0.0
    for chunk in batches:
        ours, theirs = reference.infer(chunk), other.infer(chunk)
        same = ours.argmax(1) == theirs.argmax(1)
        equal += float(same.reshape(len(chunk), -1).mean(1).sum())  # a map counts as one image
        images += len(chunk)
        largest = max(largest, float(np.abs(ours - theirs).max()))
        power = _powers(ours, theirs)
        signal, noise = signal + power[0], noise + power[1]
    if images == 0:
        raise LoadError("no images to compare two engines on; expected at least one")
    return Comparison(100 * equal / images, _decibels(signal, noise), largest, images)


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Return the percent of rows of two logit arrays (n, classes) with equal arg-max."""
    return _percent_equal(first.argmax(1), second.argmax(1))


def sqnr_db(reference: np.ndarray, value: np.ndarray) -> float:
    """Signal-to-quantization-noise ratio in dB; infinite where the arrays are equal."""
    return _decibels(*_powers(reference, value))


def paired_standard_error(agreement_percent: float, images: int) -> float:
    """Return the standard error, in points, of a top-1 difference measured on the same images.

    Only images on which the two disagree can make a difference: sqrt(disagreement / n).
    """
    return 100 * math.sqrt((1 - agreement_percent / 100) / images)


def run_eval(
    folder: Path,
    data: Path,
    *,
    batch: int = BATCH,
    threads: int | None = None,
    provider: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate a package on labelled images: what `dfqc eval PACKAGE --data PATH` prints.

    Where the package brings its float model, that is run on the same images beside it.
    `provider` is where ONNX Runtime computes (`dfqc.backends.ort.PROVIDERS`), None the CPU; for
    other targets it raises `UsageError`.
    """
    from dfqc.compiler.dataset import open_dataset

    package = open_package(folder)
    open_runner = opener(package.target, provider)
    dataset = open_dataset(data, package.image)
    models = {"engine": package.engine}
    if package.float_model is not None:
        models["float"] = package.float_model
    runners = {name: open_runner(path, threads=threads) for name, path in models.items()}
    try:
        scores = score(runners, dataset, batch=batch, progress=progress)
    finally:
        for runner in runners.values():
            runner.close()
    result: dict[str, Any] = {"package": str(folder), "data": dataset.source, "top1": {}}
    result["provider"] = provider_of(runners["engine"])
    for name in models:
        result["top1"][name] = dataclasses.asdict(scores.top1(name))
    if "float" in models:
        result["agreement"] = scores.agreement("float", "engine")
        result["drop"] = scores.top1("float").percent - scores.top1("engine").percent
        result["drop_standard_error"] = scores.paired_error("float", "engine")
    return result


def describe_eval(result: Mapping[str, Any]) -> list[str]:
    """Return the lines that `dfqc eval` shows for a result of `run_eval`."""
    lines = [
        f"{name:<7} top-1 {row['percent']:6.2f} %  ± {row['standard_error']:.2f}  "
        f"({row['images']} images)"
        for name, row in result["top1"].items()
    ]
    if "drop" in result:
        lines.append(
            f"drop    {result['drop']:.2f} ± {result['drop_standard_error']:.2f} points (paired); "
            f"{result['agreement']:.2f} % of predictions as in float"
        )
    if result["provider"]:
        lines.append(f"ran on  {result['provider']}")
    return lines


def _checked_logits(logits: np.ndarray, name: str) -> np.ndarray:
    if logits.ndim != 2:
        shape = "×".join(map(str, logits.shape))
        raise LoadError(f"{name}: got an output of shape {shape}, expected (images, classes)")
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(1).sum())
        raise LoadError(
            f"{name}: {bad} of {len(logits)} outputs hold NaN or Inf; expected finite logits. "
            "Check the model's weights and the preprocessing"
        )
    return logits


def _check_labels(labels: np.ndarray, classes: int, source: str) -> None:
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise LoadError(
            f"{source}: got label {int(wrong[0])}, expected 0..{classes - 1}: "
            f"the model has {classes} classes; use the data set it was trained for"
        )


def _percent_equal(first: np.ndarray, second: np.ndarray) -> float:
    return 100 * float((first == second).mean())


def _powers(reference: np.ndarray, value: np.ndarray) -> tuple[float, float]:
    reference, value = reference.astype(np.float64), value.astype(np.float64)
    return float((reference**2).sum()), float(((reference - value) ** 2).sum())


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(signal, 1e-300) / noise)
