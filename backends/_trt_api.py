"""Is there a TensorRT here that can be used: the import, the driver, the log; versions out.

Without a driver a deserialization crashes the process, so the driver is asked first, and in a
process of its own: a broken one can take its caller down.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from dfqc.compiler.errors import EnvironmentFault

log = logging.getLogger("dfqc.trt")

MAJORS = (10, 11)
NEXT = (
    "on a machine with an NVIDIA GPU and its driver, pip install 'dfqc[trt]' and run "
    "dfqc engine PACKAGE"
)
_PROBE_SECONDS = 60
# The driver's C interface by hand: no package of NVIDIA's is needed to ask for it.
_PROBE = """
import ctypes, json, sys
name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
try:
    cuda = ctypes.CDLL(name)
except OSError:
    sys.exit(f"no NVIDIA driver ({name} cannot be loaded)")
def ask(function, *arguments):
    code = getattr(cuda, function)(*arguments)
    if code:
        sys.exit(f"the NVIDIA driver answers {function} with error {code}")
def number(function, *arguments):
    value = ctypes.c_int()
    ask(function, ctypes.byref(value), *arguments)
    return value.value
ask("cuInit", 0)
if not number("cuDeviceGetCount"):
    sys.exit("the NVIDIA driver knows no GPU")
device = number("cuDeviceGet", 0)
text = ctypes.create_string_buffer(256)
ask("cuDeviceGetName", text, 256, device)
major, minor = (number("cuDeviceGetAttribute", what, device) for what in (75, 76))
version = number("cuDriverGetVersion")
print(json.dumps({"gpu": text.value.decode(), "capability": f"{major}.{minor}",
                  "cuda": f"{version // 1000}.{version % 1000 // 10}"}))
"""


@dataclass(frozen=True)
class Driver:
    """What the driver says: first GPU, its compute capability, newest CUDA that it runs."""

    gpu: str
    capability: str
    cuda: str


def available() -> tuple[bool, str]:
    """Return (True, versions and GPU), or (False, the first thing that is missing)."""
    if importlib.util.find_spec("tensorrt") is None:
        return False, "tensorrt is not installed"
    try:
        trt, driver = tensorrt(), require_driver()
    except EnvironmentFault as fault:
        return False, str(fault)
    return True, f"TensorRT {trt.__version__}, {driver.gpu}, CUDA {driver.cuda}"


def tensorrt() -> Any:
    """Return the module `tensorrt`, of a version that is known; `EnvironmentFault` without."""
    try:
        import tensorrt as trt
    except Exception as error:  # a missing libnvinfer is no ImportError on every platform
        raise EnvironmentFault(f"tensorrt cannot be imported ({error}); {NEXT}") from error
    version = str(trt.__version__)
    if not hasattr(trt, "Builder") or int(version.partition(".")[0]) not in MAJORS:
        known = " or ".join(map(str, MAJORS))
        raise EnvironmentFault(f"got TensorRT {version}, expected a full {known}.x; {NEXT}")
    return trt


def require_driver() -> Driver:
    """Return the driver's facts; `EnvironmentFault` where there is none to talk to."""
    driver, reason = probe()
    if driver is None:
        raise EnvironmentFault(f"{reason}; {NEXT}")
    return driver


@functools.cache
def probe() -> tuple[Driver | None, str]:
    """Ask the driver in a process of its own; return it, or None and why."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"the NVIDIA driver does not answer within {_PROBE_SECONDS} s"
    if done.returncode < 0:
        return None, f"asking the NVIDIA driver crashed (signal {-done.returncode})"
    if done.returncode:
        return None, (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    return Driver(**json.loads(done.stdout)), ""


def make_logger(trt: Any) -> Any:
    """Return a TensorRT logger that writes to ours and keeps the errors in `errors`.

    TensorRT's own one writes to stdout, where results go.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(text)
            if severity == trt.ILogger.Severity.WARNING:
                log.info("TensorRT: %s", text)

    return Logger()
