"""What is known about the machine without loading a framework: CPU, memory, versions, peak RSS.

In: nothing but the operating system. Out: plain values for cache keys, manifests and `doctor`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_INTEGER_FLAGS = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass
class Usage:
    """Wall-clock and peak resident memory of a `measured()` block, filled in when it ends."""

    seconds: float = 0.0
    peak_rss_bytes: int = 0


# Peaks of the enclosing blocks so far: an inner block resets the system's counter.
_outer_peaks: list[int] = []


@contextlib.contextmanager
def measured() -> Iterator[Usage]:
    """Measure the enclosed block; blocks may be nested, but not run in parallel."""
    usage = Usage()
    if _outer_peaks:
        _outer_peaks[-1] = max(_outer_peaks[-1], peak_rss())
    _outer_peaks.append(0)
    _reset_peak()
    start = time.perf_counter()
    try:
        yield usage
    finally:
        usage.seconds = time.perf_counter() - start
        usage.peak_rss_bytes = max(_outer_peaks.pop(), peak_rss())
        if _outer_peaks:
            _outer_peaks[-1] = max(_outer_peaks[-1], usage.peak_rss_bytes)


def _reset_peak() -> None:
    # Linux only; elsewhere, and in locked-down containers, the peak is that of the process so far.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Peak resident memory in bytes since the last reset (or since the process started)."""
    return _status("VmHWM") or _max_rss()


def current_rss() -> int:
    """Resident memory in bytes now."""
    return _status("VmRSS") or _max_rss()


def _status(field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def _max_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory() -> int:
    """Physical memory in bytes, or the container's limit where that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


@functools.cache
def cpu_model() -> str:
    """Name of the processor, for example `Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz`."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


@functools.cache
def integer_flags() -> tuple[str, ...]:
    """Instructions of this CPU that integer kernels use, of those known here."""
    cpu = _cpuinfo()
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return tuple(flag for flag in _INTEGER_FLAGS if flag in flags)


def _cpuinfo() -> dict[str, str]:
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return {}


def cpu_count() -> int:
    """Cores this process may use: its affinity, or its container's quota where that is less."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(cores, cpu_quota(CGROUP_QUOTA) or cores)


def cpu_quota(file: Path) -> int | None:
    """Return the whole cores that a cgroup v2 `cpu.max` file grants (at least 1), or None."""
    try:
        quota, period = file.read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or `max`: no limit
        return None


@functools.cache
def version(distribution: str) -> str | None:
    """Installed version of a distribution, read without importing it; None if it is missing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(*distributions: str) -> dict[str, str | None]:
    """Installed versions by name."""
    return {name: version(name) for name in distributions}
