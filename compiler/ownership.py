"""Names of temporary files that tell their owner: whether what lies there is still in use."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from pathlib import Path

_SILENCE = 7 * 24 * 3600.0  # seconds; no stage runs for a week


def owned_name() -> str:
    """Name a file so that another process can tell whether its owner still lives."""
    return f"{socket.gethostname()}+{os.getpid()}+{uuid.uuid4().hex[:12]}"


def is_abandoned(path: Path) -> bool:
    """Report whether the owner is dead, or is on another machine and silent for long."""
    host, _, rest = path.name.partition("+")
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _SILENCE:
            return True
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(rest.partition("+")[0]), 0)
    except (ProcessLookupError, ValueError):
        return True
    except PermissionError:
        return False
    return False
