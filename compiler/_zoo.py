"""The name of an architecture in, a freshly built module and its preprocessing out."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfqc.compiler._blame import blame_error, first_line
from dfqc.compiler._identity import is_zoo, split_factory
from dfqc.compiler._vision import import_zoo
from dfqc.compiler.errors import LoadError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What an architecture says about its images; `known` is False where nobody said it.

    `resize_ratio` is resized shorter side / crop.
    """

    size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize_ratio: float | None = None
    known: bool = False


def build_arch(
    arch: str,
    *,
    pretrained: bool = False,
    seed: int = 0,
    size: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
) -> tuple[nn.Module, Preprocessing]:
    """Build `timm:NAME`, `torchvision:NAME` or `file.py:factory`, in eval mode.

    Without `pretrained` the weights are random under `seed`. Raises `LoadError` for unknown names
    (with the nearest ones), failing factories and weights that cannot be fetched.
    """
    with _seeded(seed):
        if not is_zoo(arch):
            module, images = _build_factory(arch), Preprocessing()
        elif arch.startswith("timm:"):
            module, images = _build_timm(arch, pretrained, size, num_classes)
        else:
            module, images = _build_torchvision(arch, pretrained, num_classes)
    return module.eval(), images


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator inside the block only: nothing outside changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _build_timm(
    arch: str, pretrained: bool, size: tuple[int, int, int] | None, num_classes: int | None
) -> tuple[nn.Module, Preprocessing]:
    timm = import_zoo("timm")
    name = arch.partition(":")[2]
    if not timm.is_model(name):
        raise _unknown(arch, timm.list_models())
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    config = timm.get_pretrained_cfg(name)
    if size is not None and config is not None:
        if size[0] != config.input_size[0]:
            options["in_chans"] = size[0]
        if config.fixed_input_size and size != config.input_size:
            options["img_size"] = size[1:]
    module = _create(arch, pretrained, lambda: timm.create_model(name, pretrained, **options))
    data = import_zoo("timm.data").resolve_model_data_config(module)
    images = Preprocessing(
        tuple(data["input_size"]),
        tuple(data["mean"]),
        tuple(data["std"]),
        1 / data["crop_pct"],
        True,
    )
    return module, images


def _build_torchvision(
    arch: str, pretrained: bool, num_classes: int | None
) -> tuple[nn.Module, Preprocessing]:
    models = import_zoo("torchvision.models")
    name = arch.partition(":")[2]
    if name not in models.list_models():
        raise _unknown(arch, models.list_models())
    default = getattr(models.get_model_weights(name), "DEFAULT", None)
    options: dict[str, Any] = {"weights": default if pretrained else None}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if name in ("inception_v3", "googlenet") and not pretrained:
        options["init_weights"] = True  # what they do anyway, without the warning about it
    module = _create(arch, pretrained, lambda: models.get_model(name, **options))
    return module, _read_transforms(default)


def _read_transforms(weights: Any) -> Preprocessing:
    """Read the preprocessing that torchvision publishes with the weights; ImageNet's otherwise."""
    transforms = weights.transforms() if weights is not None else None
    crop = getattr(transforms, "crop_size", [224])[0]
    resize = getattr(transforms, "resize_size", [256])[0]
    mean = tuple(getattr(transforms, "mean", IMAGENET_MEAN))
    std = tuple(getattr(transforms, "std", IMAGENET_STD))
    return Preprocessing((3, crop, crop), mean, std, resize / crop, True)


def _create(arch: str, pretrained: bool, make: Any) -> nn.Module:
    """Call a zoo's constructor; without a network the message says what else can be done."""
    try:
        module = make()
    except Exception as error:
        if not pretrained:
            raise LoadError(f"{arch}: cannot be built: {first_line(error)}") from error
        raise LoadError(
            f"{arch}: the pretrained weights cannot be fetched "
            f"({type(error).__name__}: {first_line(error)}); is there a network? Else pass a file "
            f"of weights with --arch {arch}, or --no-pretrained for random weights"
        ) from error
    assert isinstance(module, nn.Module)
    return module


def _build_factory(arch: str) -> nn.Module:
    """Run the factory of a file that the user named: it is the user's own code."""
    path, name = split_factory(arch)
    if not path.is_file():
        raise LoadError(f"--arch {arch!r}: {path} does not exist")
    try:
        made = getattr(_import_file(path), name)()
    except AttributeError as error:
        if error.name != name:
            raise _failed(arch, error) from error
        raise LoadError(f"--arch {arch!r}: {path} defines no {name!r}") from error
    except Exception as error:
        raise _failed(arch, error) from error
    if not isinstance(made, nn.Module):
        raise LoadError(
            f"--arch {arch!r}: {name}() returned a {type(made).__name__}, expected a module"
        )
    return made


def _import_file(path: Path) -> Any:
    """Import a file under a name of its own; files beside it can be imported by it."""
    folder = str(path.resolve().parent)
    name = f"dfqc_arch_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def _failed(arch: str, error: Exception) -> LoadError:
    return LoadError(
        f"--arch {arch!r}: failed{blame_error(error)}: {type(error).__name__}: {first_line(error)}"
    )


def _unknown(arch: str, names: list[str]) -> LoadError:
    zoo, _, name = arch.partition(":")
    near = difflib.get_close_matches(name, names, 3, 0.5)
    return LoadError(f"{arch}: unknown model; nearest: {', '.join(f'{zoo}:{n}' for n in near)}")
