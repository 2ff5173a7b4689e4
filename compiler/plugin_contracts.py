"""What a plug-in module must have: a synthesizer, a quantizer, a backend; imports no torch.

In: nothing. Out: the protocols by which `dfqc.compiler.plugins` loads modules by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dfqc.compiler.contracts import (
    CalibSet,
    Lowered,
    Progress,
    QuantizerSupplies,
    QuantState,
    Runner,
    Supplies,
    silent,
)

if TYPE_CHECKING:
    import torch

    from dfqc.compiler.graph import Graph
    from dfqc.compiler.spec import Plan, TargetSpec


class Synthesizer(Protocol):
    """A module `dfqc.calib.<name>`: `Options` (frozen pydantic), four constants, `synthesize`.

    `synthesize` makes ONE batch of `count` images; the driver splits a request into batches of
    `Options.batch_size`, gives each its own seeded `rng` and stores each as it is finished.
    """

    Options: type[Any]
    NEEDS_BN: bool  # matches batch-norm statistics
    NEEDS_CLASSES: bool  # makes images of given classes
    USES_ZOO: bool  # reads `Supplies.zoo`
    # A batch may start from the `carry` before. Then there is `count_carried(options) -> float`,
    # its work by the first one's; 0: the first has all the time, and leaves some for `following`.
    CARRIES: bool

    def count_passes(self, options: Any, size: tuple[int, int, int], nets: int) -> float:
        """Return the forward-and-backward passes per image, for estimates; 0 without a model.

        `size` is the image's (c, h, w); `nets` counts the model and its zoo. Passes at less than
        the full resolution count by their pixels.
        """
        ...

    def count_bytes(self, options: Any, size: tuple[int, int, int], count: int) -> int:
        """Return what a batch of `count` images keeps beside the model and its activations.

        For estimates of memory; a zoo's networks run one at a time and are not counted.
        """
        ...

    def synthesize(
        self,
        graph: Graph,
        count: int,
        options: Any,
        *,
        rng: torch.Generator,
        device: torch.device,
        progress: Progress = silent,
        supplies: Supplies = Supplies(),
    ) -> CalibSet:
        """Return `count` images; the graph is unfolded (batch norms present)."""
        ...


class QuantizerPlugin(Protocol):
    """A module `dfqc.compiler.quantize.<name>`: `Options` and `quantize`; the graph is folded."""

    Options: type[Any]

    def count_passes(self, options: Any, samples: int, narrow: float = 1.0) -> float:
        """Return the images that go through the network in all, a backward pass counted as two.

        Args:
            options: of this plug-in.
            samples: calibration images.
            narrow: the share of the layers that have less than 8 bits.
        """
        ...

    def count_bytes(
        self,
        options: Any,
        graph: Graph,
        samples: int,
        memory_bytes: int | None = None,
        unpruned: Graph | None = None,
    ) -> int:
        """Return what is kept beside the model, the images and one batch's activations.

        Args:
            options: of this plug-in.
            graph: what is quantized.
            samples: calibration images.
            memory_bytes: `--memory`.
            unpruned: what it was before channels were removed, if any were.
        """
        ...

    def quantize(
        self,
        graph: Graph,
        calib: CalibSet,
        plan: Plan,
        options: Any,
        *,
        rng: torch.Generator,
        device: torch.device,
        progress: Progress = silent,
        supplies: QuantizerSupplies = QuantizerSupplies(),
    ) -> QuantState:
        """Choose weights' codes and activations' grids."""
        ...


class Backend(Protocol):
    """A module `dfqc.backends.<name>` that lowers for one target and runs what it lowered."""

    TARGET: TargetSpec

    def available(self) -> tuple[bool, str]:
        """Return (True, version) if the runtime can be used here, else (False, the reason)."""
        ...

    def lower(self, graph: Graph, state: QuantState, *, metadata: Mapping[str, str]) -> Lowered:
        """Return the QDQ model of a folded graph, written the way this target runs fastest."""
        ...

    def lower_float(self, graph: Graph) -> bytes:
        """Return the unquantized model: the control that every benchmark runs beside."""
        ...

    def open_runner(self, model: Path, *, threads: int | None = None) -> Runner:
        """Open `model.onnx` (or an engine file) for inference."""
        ...

    def open_half(self, model: Path, *, threads: int | None = None) -> tuple[str, Runner] | None:
        """Open the float model in the half precision that the engine has here, and name that.

        The second control of the latency: whoever has it would not serve float32. None where the
        engine has no such kernels here.
        """
        ...

    def executed(self, model: Path, layers: Mapping[str, str]) -> Mapping[str, str]:
        """Return, per layer (module path), the kernel the optimized engine really runs.

        `layers` is `Lowered.layers`.
        """
        ...
