"""How far a share can be trusted: a percentage of some images in, its confidence interval out."""

from __future__ import annotations

import math

Z95 = 1.959963984540054


def wilson(percent: float, images: int, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's score interval in percent (Wilson 1927), 95 % by default.

    Unlike percent ± z standard errors it stays within 0 to 100, and is not empty at the ends.
    """
    share = percent / 100
    middle = share + z**2 / (2 * images)
    spread = z * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    scale = 100 / (1 + z**2 / images)
    return max(scale * (middle - spread), 0.0), min(scale * (middle + spread), 100.0)
