"""Value types and protocols that cross the packages; importing this file imports no torch.

In: nothing. Out: the shapes every synthesizer, quantizer, backend and runner must have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dfqc.compiler.graph import Graph
    from dfqc.compiler.spec import Plan

# checkpoint(part, make, save, load): return make(), which a killed run finds stored when it comes
# back. `part` is plain data that says which part of the work it is; save and load take a folder.
Checkpoint = Callable[
    [Mapping[str, Any], Callable[[], Any], Callable[[Any, Path], None], Callable[[Path], Any]], Any
]
# progress(done, total, note): called by long work; the driver turns it into a bar with an ETA.
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, note: str) -> None:
    """Report nothing: the default `Progress`."""


def forgetful(
    part: Mapping[str, Any],
    make: Callable[[], Any],
    save: Callable[[Any, Path], None],
    load: Callable[[Path], Any],
) -> Any:
    """Make a part and store nothing: the default `Checkpoint`."""
    return make()


@dataclass(frozen=True)
class ImageSpec:
    """Preprocessing of the model: RGB/255, shorter side to `resize`, center crop, (x-mean)/std.

    `size` is (channels, height, width). `assumed` is True when nobody gave mean and std and
    ImageNet's were taken: the report says so.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: int | None = None
    assumed: bool = False

    def pixel_range(self) -> tuple[float, float]:
        """Smallest and largest value a valid image can take in normalized space."""
        low = min((0.0 - m) / s for m, s in zip(self.mean, self.std, strict=True))
        high = max((1.0 - m) / s for m, s in zip(self.mean, self.std, strict=True))
        return low, high


GIVEN = "images/"  # begins the source of images that were given, before the data set's name


@dataclass(frozen=True)
class CalibSet:
    """Calibration images in normalized space, (n, c, h, w) float32, with labels (n,) or None.

    `carry` holds what the next batch of the same run may start from: a trained generator, say.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    source: str  # name of the synthesizer, or of the data set
    info: Mapping[str, Any] = field(default_factory=dict)
    carry: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def synthetic(self) -> bool:
        """Whether a synthesizer made the images from the model; false of given ones."""
        return not self.source.startswith(GIVEN)


@dataclass(frozen=True)
class Supplies:
    """What a synthesizer may use for one batch, beside the model.

    Attributes:
        zoo: other models of the same classes in the same order, traced at the model's input size;
            each has its own preprocessing.
        labels: classes of the images to make, (count,) int64, balanced over the whole set; None
            for a model that does not classify.
        carry: `CalibSet.carry` of the batch before; empty for the first.
        seconds: wall-clock the batch may take. A synthesizer does less work where the planned does
            not fit, and then sets `shortened` in its info to True. None: as long as it takes.
        following: images of the batches after this one, which may start from its `carry`.
        checkpoint: keeps finished parts; those with a true `shortened` for one time limit only.
    """

    zoo: Sequence[Graph] = ()
    labels: torch.Tensor | None = None
    carry: Mapping[str, torch.Tensor] = field(default_factory=dict)
    seconds: float | None = None
    following: int = 0
    checkpoint: Checkpoint = forgetful


@dataclass(frozen=True)
class WeightGrid:
    """The grids of a weight's channels: `scale` and smallest code `low`, both (channels,) float32.

    Every channel has `levels` codes, low .. low + levels - 1, zero among them.
    """

    scale: torch.Tensor
    low: torch.Tensor
    levels: int


@dataclass(frozen=True)
class QTensor:
    """Integer codes of a weight (int8) with `scale` (channels,) float32; zero point is 0."""

    codes: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class QParams:
    """Per-tensor grid of an activation: real = (code - zero_point) * scale."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class QuantState:
    """What a quantizer decided, as data: everything the simulation and the QDQ writer need.

    `weights` and `biases` are keyed by module path (biases are float, before they are snapped to
    the int32 grid), `acts` by quantizer name.
    """

    plan: Plan
    weights: Mapping[str, QTensor]
    biases: Mapping[str, torch.Tensor]
    acts: Mapping[str, QParams]
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pruned:
    """What a pruned graph was: the unfolded original, and the channels kept, by group's name."""

    graph: Graph
    keep: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class QuantizerSupplies:
    """What a quantizer may use beside the folded graph and the calibration set.

    Attributes:
        unfolded: the same model with its batch norms, for methods that read their statistics.
        unpruned: what a pruned model was, for methods that restore pruned channels themselves;
            None: nothing was pruned, or it is to be taken as it is.
        held_out: images (n, c, h, w) made in another way: nothing is fitted to them, they choose
            between results. None: a part of the calibration set is put aside for that.
        fitting: how many of them, from the first on, look like the model's data, as far as can be
            told; None: all of them.
        memory_bytes: what the run may use in all; caches spill to disk beyond their share.
        seconds: wall-clock the quantizer may take. It does less work where the planned does not
            fit, and then sets `shortened` in its info to True. None: as long as it takes.
        checkpoint: keeps finished parts of long work.
        scratch: folder for what does not fit into memory; None: the system's temporary folder.
        bias_correction: how biases are corrected before anything is learned; the recipe's word.
    """

    unfolded: Graph | None = None
    unpruned: Pruned | None = None
    held_out: torch.Tensor | None = None
    fitting: int | None = None
    memory_bytes: int | None = None
    seconds: float | None = None
    checkpoint: Checkpoint = forgetful
    scratch: Path | None = None
    bias_correction: str = "auto"


@dataclass(frozen=True)
class Lowered:
    """A serialized ONNX model and the name map from our names to its values.

    `taps` gives, per quantizer, the ONNX value that holds its integer codes (a target may write
    one that repeats another's grid without a value of its own); `layers`, per module path, the
    ONNX value that the layer computes.
    """

    model: bytes
    taps: Mapping[str, str]
    layers: Mapping[str, str]


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call of one engine, with everything needed to read the figure."""

    median_ms: float
    p90_ms: float
    mean_ms: float
    batch: int
    threads: int
    runs: int
    warmup: int


class Model(Protocol):
    """What can be timed: feed normalized float32 (n, c, h, w), get the first output back."""

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Run one batch."""
        ...


class Runner(Model, Protocol):
    """An opened engine."""

    def codes(self, images: np.ndarray, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Run one batch and return the named inner values too (for parity), and `output`."""
        ...

    def close(self) -> None:
        """Free the engine."""
        ...


class Dataset(Protocol):
    """Labelled images, preprocessed: what `dfqc eval` reads."""

    labels: np.ndarray
    image: ImageSpec
    source: str

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield normalized float32 (n, c, h, w) and int64 labels (n,)."""
        ...
