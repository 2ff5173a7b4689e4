"""How much energy the processor says it used: its counters in, joules out; None where it says none.

Linux tells it through RAPL (`/sys/class/powercap`), in most systems to root alone. The counters are
those of whole processor packages: everything else that runs is in them, and idle power too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
SECONDS = 1.0  # of uninterrupted calls: the counters are updated about every millisecond


@dataclass(frozen=True)
class Meter:
    """The readable counters of whole processor packages (not their cores, which are parts)."""

    domains: tuple[Path, ...]

    def read(self) -> tuple[int, ...]:
        """Return the microjoules of every counter; they start over at their range."""
        return tuple(int((domain / "energy_uj").read_text()) for domain in self.domains)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Return the energy between two readings, of which each counter may have wrapped once."""
        total = 0
        for domain, start, end in zip(self.domains, before, after, strict=True):
            if end < start:
                end += int((domain / "max_energy_range_uj").read_text())
            total += end - start
        return total / 1e6


def find_meter(root: Path = POWERCAP) -> tuple[Meter | None, str]:
    """Return the meter and what it is; or None, and why there is none."""
    domains = sorted(p for p in root.glob("*-rapl:*") if p.name.count(":") == 1)
    if not domains:
        return None, f"not told by this machine (no RAPL counters under {root})"
    meter = Meter(tuple(domains))
    try:
        meter.read()
    except (OSError, ValueError) as error:
        return None, f"the RAPL counters under {root} cannot be read ({error}); try as root"
    names = ", ".join(domain.name for domain in domains)
    return meter, f"RAPL ({names}): whole processor packages, idle power and neighbors included"


def joules_per_call(
    meter: Meter,
    call: Callable[[], object],
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Repeat a call for some time and return the energy of one."""
    calls, start, before = 0, clock(), meter.read()
    while calls == 0 or clock() - start < seconds:
        call()
        calls += 1
    return meter.joules(before, meter.read()) / calls
