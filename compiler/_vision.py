"""Import torchvision and timm beside any torch build, also where torchvision's binary does not fit.

torchvision's registry wheel is compiled against the CUDA build of torch. Beside a CPU-only torch
its binary cannot be loaded, its operators are missing, and the import itself fails with "operator
torchvision::nms does not exist" although no classification model uses them. Declaring the schemas
of the two operators that the import looks up is enough; calling them still fails, as it should.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

from dfqc.compiler.errors import EnvironmentFault

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache  # also keeps the declarations alive: they end with the Library object
def enable_torchvision() -> torch.library.Library | None:
    """Declare torchvision's operators if its binary cannot; safe to call any number of times."""
    if "torchvision" in sys.modules or _load_binary():
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        if not _is_declared(schema.partition("(")[0]):
            library.define(schema)
    return library


def import_zoo(name: str) -> ModuleType:
    """Import `torchvision` or `timm`; raises `EnvironmentFault` if it is not installed."""
    enable_torchvision()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing image codecs, deprecations among the two
            return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentFault(
            f"{name}: cannot be imported ({error}); install it: pip install 'dfqc[compile]'"
        ) from error


def _load_binary() -> bool:
    """Load torchvision's operators the way its own import does."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # not installed: nothing to enable
    binaries = sorted(Path(spec.origin).parent.glob("_C*.so")) or sorted(
        Path(spec.origin).parent.glob("_C*.pyd")
    )
    try:
        for binary in binaries:
            torch.ops.load_library(str(binary))
    except OSError:
        return False
    return bool(binaries)


def _is_declared(name: str) -> bool:
    return bool(torch._C._dispatch_has_kernel(f"torchvision::{name}")) or (
        f"torchvision::{name}" in torch._C._dispatch_get_all_op_names()
    )
