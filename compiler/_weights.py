"""The content of a checkpoint in, a module of the named architecture with these weights out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dfqc.compiler._identity import is_zoo
from dfqc.compiler._zoo import Preprocessing, build_arch
from dfqc.compiler.errors import LoadError

log = logging.getLogger(__name__)

# Where training scripts put the weights, the most usual first.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "ema")
_SHOWN = 3


def find_weights(content: Any) -> dict[str, torch.Tensor] | nn.Module | None:
    """Look into the usual wrappers for a state_dict or (in a trusted pickle) a module."""
    if isinstance(content, nn.Module):
        if isinstance(content, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            return content.get_submodule("module")
        return content
    if not isinstance(content, Mapping):
        return None
    tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    for key in WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, (Mapping, nn.Module)):
            found = find_weights(inner)
            if found is not None:
                return found
    return tensors or None


def load_weights(
    weights: Mapping[str, torch.Tensor],
    arch: str,
    *,
    where: str,
    size: tuple[int, int, int] | None,
    seed: int,
) -> tuple[nn.Module, Preprocessing]:
    """Build `arch` and load `weights` into it; a zoo model gets as many classes as they have.

    Prefixes that all keys share and the network does not know (`module.`, `_orig_mod.`) are
    dropped. Raises `LoadError` with some of the keys that do not fit.
    """
    model, images = build_arch(arch, seed=seed, size=size)
    own = model.state_dict()
    weights = _strip_prefixes(weights, own)
    classes = _count_classes(weights, own) if is_zoo(arch) else None
    if classes is not None:
        log.info("%s: %d classes, as in %s", arch, classes, where)
        model, images = build_arch(arch, seed=seed, size=size, num_classes=classes)
        own = model.state_dict()
    problems = _compare(weights, own)
    if problems:
        raise LoadError(
            f"{where}: does not fit --arch {arch}: {'; '.join(problems)}; expected the state_dict "
            "of exactly this network"
        )
    model.load_state_dict(dict(weights), strict=False)  # compared above, with better messages
    return model.eval(), images


def _strip_prefixes(
    weights: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    stripped = dict(weights)
    while stripped:
        prefix = next(iter(stripped)).partition(".")[0] + "."
        if not all(k.startswith(prefix) for k in stripped):
            break
        if any(k.startswith(prefix) for k in own):
            break
        stripped = {k[len(prefix) :]: v for k, v in stripped.items()}
    return stripped


def _count_classes(
    weights: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> int | None:
    """Return the checkpoint's number of classes if nothing but the classifier's rows differ."""
    differing = [k for k in own if k in weights and weights[k].shape != own[k].shape]
    rows = {weights[k].shape[0] for k in differing if weights[k].dim()}
    layers = {k.rpartition(".")[0] for k in differing}
    same_columns = all(weights[k].shape[1:] == own[k].shape[1:] for k in differing)
    return rows.pop() if len(rows) == 1 and len(layers) <= 2 and same_columns else None


def _compare(weights: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> list[str]:
    """Describe missing, unexpected and differently shaped keys; an empty list means: they fit."""
    counter = "num_batches_tracked"  # absent from old checkpoints, and not used in eval mode
    missing = [k for k in own if k not in weights and not k.endswith(counter)]
    unexpected = [k for k in weights if k not in own and not k.endswith(counter)]
    shapes = [
        f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("mismatched", shapes))
    return [f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in kinds if keys]


def _some(keys: list[str]) -> str:
    more = ", …" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
