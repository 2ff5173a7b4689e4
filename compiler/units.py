"""Sizes and durations as people write them: `8g` and `20m` in, bytes and seconds out, and back."""

from __future__ import annotations

import re

from dfqc.compiler.errors import UsageError

_SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_TIMES = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str, *, where: str) -> int:
    """Read `512m`, `8g` or `1.5GB` (powers of 1024) as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"{where}: got {text!r}, expected a size such as 200k, 512m or 8g")
    return int(float(match[1]) * _SIZES[match[2]])


def parse_duration(text: str, *, where: str) -> float:
    """Read `90s`, `20m`, `1h30m` or a plain number of seconds as seconds."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh]?)", text.strip().lower())
    seconds = sum(float(number) * _TIMES[unit or "s"] for number, unit in parts)
    # findall skips what it cannot read: nothing may be left over.
    if "".join(n + u for n, u in parts) != text.strip().lower() or seconds <= 0:
        raise UsageError(f"{where}: got {text!r}, expected a time such as 90s, 20m or 1h30m")
    return seconds


def format_size(count: float) -> str:
    """Return `1.5 MB` for bytes."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def format_duration(seconds: float) -> str:
    """Return `0.4 s`, `12 s`, `3 min 20 s` or `1 h 5 min` for seconds."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
