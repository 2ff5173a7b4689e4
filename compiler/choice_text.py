"""What a quantizer chose between, in words: `quantization` of a manifest in, a sentence out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the states are called that a quantizer chooses between.
_STATES = {
    "nearest": "rounding to nearest",
    "closed": "the closed form (gptq)",
    "squant": "SQuant",
    "reconstructed": "learned block by block",
    "tuned": "learned, then tuned as a whole",
    "start": "what training began with",
    "trained": "the last state of the training",
    "best": "a state on the way of the training",
}


def describe_choice(quantization: Mapping[str, Any]) -> str | None:
    """Say in words what of a quantizer's states is in the package; None where it has but one.

    Args:
        quantization: of a manifest, see `ledger.describe_quantization`.
    """
    found, kept = quantization.get("heldout_distance"), quantization.get("kept")
    if not found or kept not in found:
        return None
    others = sorted((n for n in found if n != kept), key=lambda n: float(found[n]))
    rest = ", ".join(f"{_STATES.get(name, name)} {found[name]:.3g}" for name in others)
    beside = f"; beside it {rest}" if rest else ""
    name = _STATES.get(str(kept), str(kept))
    text = f"{name}, divergence {found[kept]:.3g} from float on held-out images{beside}"
    distance = quantization.get("matched_distance") or {}
    for other in quantization.get("led_astray") or ():
        text += (
            f"; {_STATES.get(other, other)} is out for {distance[other]:.3g} on images that match "
            f"the batch norms in another way, where the closed form has {distance['start']:.3g}"
        )
    return text
