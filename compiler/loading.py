"""A model as the user names it in; a module or exported program with its preprocessing out.

Every form of the contract: `.pt2` archives, state_dicts with `--arch`, pickled modules (only with
`--unsafe-load`), `timm:NAME` and `torchvision:NAME`. Reading weights never executes code.
"""

from __future__ import annotations

import logging
import math
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from dfqc.compiler._archive import (
    EXPORT,
    SAFETENSORS,
    TORCHSCRIPT,
    check_archive,
    read_preprocessing,
    sniff,
)
from dfqc.compiler._blame import first_line
from dfqc.compiler._identity import file_sha256, is_zoo, model_digest
from dfqc.compiler._weights import find_weights, load_weights
from dfqc.compiler._zoo import Preprocessing, build_arch
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import LoadError, UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageOverrides:
    """Preprocessing given on the command line; None where nothing was given."""

    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | None = None


@dataclass(frozen=True)
class LoadedModel:
    """What was loaded. `sha256` is the file's for files, `model_digest` for zoo names."""

    model: nn.Module | ExportedProgram
    image: ImageSpec
    source: str
    sha256: str


def load_model(
    source: str,
    *,
    arch: str | None = None,
    unsafe_load: bool = False,
    pretrained: bool = True,
    image: ImageOverrides = ImageOverrides(),
    seed: int = 0,
) -> LoadedModel:
    """Load any accepted model form, in eval mode and float32.

    Raises `LoadError` (exit 3) for files that are missing, truncated, of a refused kind, do not
    fit `arch`, or hold NaN or Inf; `UsageError` for preprocessing that contradicts itself.
    """
    if is_zoo(source):
        if arch is not None:
            raise UsageError(f"--arch: got {arch!r} for {source}, expected it with a file only")
        model, images = build_arch(source, pretrained=pretrained, seed=seed, size=image.input_size)
        sha256 = model_digest(source, None, pretrained, seed)
        loaded: nn.Module | ExportedProgram = model
    else:
        loaded, images = _load_file(Path(source), arch, unsafe_load, image, seed)
        sha256 = file_sha256(Path(source))
    if isinstance(loaded, nn.Module):
        loaded = _to_float32(loaded.eval())
    _check_finite(loaded, source)
    return LoadedModel(loaded, resolve_image(images, image), source, sha256)


def resolve_image(images: Preprocessing, given: ImageOverrides) -> ImageSpec:
    """Combine what the architecture says with what the user gave; the user wins."""
    size = given.input_size or images.size
    mean, std = given.mean or images.mean, given.std or images.std
    for flag, values in (("--mean", mean), ("--std", std)):
        if len(values) != size[0]:
            raise UsageError(
                f"{flag}: {len(values)} values for {size[0]} channels (image {_show(size)}); "
                "give --mean and --std with one value per channel"
            )
    if min(std) <= 0:
        raise UsageError(f"--std: got {std}, expected positive values")
    resize = given.resize
    if resize is None and images.resize_ratio is not None:
        resize = math.floor(min(size[1:]) * images.resize_ratio + 1e-6)
    assumed = not images.known and (given.mean is None or given.std is None)
    return ImageSpec(size, mean, std, resize, assumed)


def _load_file(
    path: Path, arch: str | None, unsafe_load: bool, image: ImageOverrides, seed: int
) -> tuple[nn.Module | ExportedProgram, Preprocessing]:
    kind = sniff(path)
    if kind == TORCHSCRIPT:
        raise LoadError(
            f"{path}: is a TorchScript file, which keeps no traceable module; expected a .pt2 "
            "(torch.export.save(torch.export.export(model, (example,)), 'model.pt2')) or the "
            "model's state_dict with --arch"
        )
    if kind == EXPORT:
        return _load_export(path, arch, unsafe_load, image)
    content = _load_safetensors(path) if kind == SAFETENSORS else _load_pickle(path, unsafe_load)
    weights = find_weights(content)
    if isinstance(weights, nn.Module):
        if arch is not None:
            weights = weights.state_dict()
        else:
            return weights, Preprocessing()
    if weights is None:
        raise LoadError(
            f"{path}: holds a {type(content).__name__}, expected a state_dict "
            "(torch.save(model.state_dict(), path))"
        )
    if arch is None:
        raise LoadError(
            f"{path}: is a state_dict: weights without a network; say which with "
            "--arch timm:NAME, --arch torchvision:NAME or --arch path/to/file.py:factory"
        )
    return load_weights(weights, arch, where=str(path), size=image.input_size, seed=seed)


def _load_export(
    path: Path, arch: str | None, unsafe_load: bool, image: ImageOverrides
) -> tuple[ExportedProgram, Preprocessing]:
    """Read a .pt2 archive; its input size is the archive's own, and so is preprocessing in it."""
    if arch is not None:
        raise UsageError(f"--arch: got {arch!r}, but {path} is a .pt2 archive with its own network")
    if not unsafe_load:
        check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
    except Exception as error:
        raise LoadError(
            f"{path}: cannot be read as a .pt2 archive ({first_line(error)}); expected one that "
            f"torch {torch.__version__} reads: export the model again with torch.export.save"
        ) from error
    size = input_size(program)
    fixed = tuple(
        s if s is not None else g for s, g in zip(size, image.input_size or size, strict=True)
    )
    if image.input_size is not None and fixed != image.input_size:
        raise LoadError(
            f"{path}: was exported for images of {_show(fixed)}, got --input-size "
            f"{_show(image.input_size)}; leave it out, or export again with that size"
        )
    channels, height, width = (s or d for s, d in zip(fixed, Preprocessing.size, strict=True))
    said = read_preprocessing(path)
    if not said or len(said["mean"]) != channels:
        return program, Preprocessing((channels, height, width))
    ratio = said["resize"] / min(height, width) if said["resize"] else None
    mean, std = tuple(said["mean"]), tuple(said["std"])
    known = not said.get("assumed", False)
    return program, Preprocessing((channels, height, width), mean, std, ratio, known)


def input_size(program: ExportedProgram) -> tuple[int | None, int | None, int | None]:
    """Return (channels, height, width) of an exported program's image; None where dynamic."""
    names = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    }
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            shape = node.meta["val"].shape
            if len(shape) == 4:
                fixed = [s if isinstance(s, int) else None for s in shape[1:]]
                return (fixed[0], fixed[1], fixed[2])
            raise LoadError(f"model: takes a tensor of rank {len(shape)}, expected (n, c, h, w)")
    raise LoadError("model: takes no tensor, expected one image tensor (n, c, h, w)")


def _load_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise LoadError(f"{path}: is truncated or damaged ({error}); copy it again") from error


def _load_pickle(path: Path, unsafe_load: bool) -> Any:
    """Read what torch.save wrote; code in it is refused unless the user vouches for the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not unsafe_load:
            raise _refused(path, error) from error
    except Exception as error:
        raise _damaged(path, error) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise LoadError(
            f"{path}: cannot be unpickled: {type(error).__name__}: {first_line(error)}; its "
            "classes must be importable: put their folder on PYTHONPATH, or pass a state_dict "
            "with --arch"
        ) from error


def _refused(path: Path, error: pickle.UnpicklingError) -> LoadError:
    names = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"needs {names[1]}" if names else "needs code"
    return LoadError(
        f"{path}: this pickle {what}, and unpickling it could run any code, so nothing of it was "
        "executed; expected plain tensors: save torch.save(model.state_dict(), ...) and pass "
        "--arch, or pass --unsafe-load if you trust where the file comes from"
    )


def _damaged(path: Path, error: Exception) -> LoadError:
    return LoadError(
        f"{path}: is truncated or damaged ({first_line(error)}); expected a file that torch.save "
        "wrote: copy it again"
    )


def _to_float32(module: nn.Module) -> nn.Module:
    """Convert half-precision weights: everything downstream computes in float32."""
    kinds = {t.dtype for _, t in _tensors(module) if t.is_floating_point()}
    if kinds - {torch.float32}:
        log.info("model: weights of %s converted to float32", sorted(str(k) for k in kinds))
        return module.float()
    return module


def _check_finite(model: nn.Module | ExportedProgram, source: str) -> None:
    for name, tensor in _tensors(model):
        if not tensor.is_floating_point():
            continue
        if isinstance(model, ExportedProgram) and tensor.dtype != torch.float32:
            raise LoadError(
                f"{source}: {name} is {tensor.dtype}, expected torch.float32; export model.float()"
            )
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise LoadError(
                f"{source}: {name} has {bad} of {tensor.numel()} values that are NaN or Inf; "
                "expected finite weights: the training diverged or the file is damaged"
            )


def _tensors(model: nn.Module | ExportedProgram) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(model, ExportedProgram):
        items: Mapping[str, Any] = model.state_dict
        yield from ((k, t) for k, t in items.items() if isinstance(t, torch.Tensor))
    else:
        yield from model.named_parameters()
        yield from model.named_buffers()


def _show(size: tuple[int | None, ...]) -> str:
    return "x".join("any" if n is None else str(n) for n in size)
