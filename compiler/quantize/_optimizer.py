"""What an optimizer has gathered: an optimizer in, tensors by name out, and back again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimizer has gathered, by the place of its parameter, on the CPU."""
    places = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{place}/{name}": value.detach().cpu().clone()
        for place, parameter in enumerate(places)
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer what `pack_optimizer` returned."""
    places = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for key, value in tensors.items():
        place, _, name = key.partition("/")
        parameter = places[int(place)]
        counter = value.dim() == 0 and not optimizer.defaults.get("fused")
        device = value.device if counter else parameter.device
        optimizer.state[parameter][name] = value.to(device).clone()
