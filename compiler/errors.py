"""The faults a user can cause or meet, each with the exit code documented in the README.

Every message answers four questions: where, what was got, what was expected, what to do.
"""

from __future__ import annotations


class DfqcError(Exception):
    """A fault that is reported without a traceback; `exit_code` is what the process returns."""

    exit_code = 1


class UsageError(DfqcError):
    """A flag, recipe key or value that cannot be used (exit 2)."""

    exit_code = 2


class LoadError(DfqcError):
    """A model or data set that cannot be read, or is not what it is said to be (exit 3)."""

    exit_code = 3


class UnsupportedError(DfqcError):
    """A plan or graph the target (or the compiler) does not support (exit 4)."""

    exit_code = 4


class AccuracyGateError(DfqcError):
    """The accuracy or fidelity gate failed; the package is written and marked (exit 5)."""

    exit_code = 5


class SpeedGateError(DfqcError):
    """The speed gate failed; the package is written and marked (exit 6)."""

    exit_code = 6


class ParityGateError(DfqcError):
    """Simulation and engine disagree; the package is written and marked (exit 7)."""

    exit_code = 7


class EnvironmentFault(DfqcError):
    """Something this machine lacks: a runtime, memory, time, a writable folder (exit 8)."""

    exit_code = 8


class Interrupted(DfqcError):
    """The run was interrupted; finished stages are stored and the next run resumes (exit 130)."""

    exit_code = 130
