"""Where ONNX Runtime computes: a target and `--provider` in, what opens its models there out."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Protocol

from dfqc.compiler import plugins
from dfqc.compiler.contracts import Runner
from dfqc.compiler.errors import UsageError

HOME = "ort"  # the target whose runtime has execution providers
CPU = "cpu"  # of them, the one that kernels are known of


class Opener(Protocol):
    """`open_runner` of a back end, with the provider chosen."""

    def __call__(self, model: Path, *, threads: int | None = None) -> Runner:
        """Open a model or an engine file."""
        ...


def opener(target: str, provider: str | None) -> Opener:
    """Return what opens models of `target`; `provider` None is the target's own (`ort`: cpu).

    Raises:
        UsageError: the target has no providers to choose from, or none of that name. Whether
            this machine has it is checked when a model is opened.
    """
    if provider is None:
        own: Opener = plugins.load("target", target).open_runner
        return own
    ort = plugins.load("target", HOME)
    if target != ort.TARGET.name:
        raise UsageError(
            f"--provider {provider}: got a package of target '{target}', expected one of target "
            f"'{ort.TARGET.name}', whose runtime has several; leave the flag out"
        )
    if provider not in ort.PROVIDERS:
        raise UsageError(
            f"--provider: got {provider!r}, expected one of {', '.join(ort.PROVIDERS)}"
        )
    chosen: Opener = functools.partial(ort.open_runner, provider=provider)
    return chosen


def provider_of(runner: object) -> str | None:
    """Return the provider that an opened runner computes on; None where there is no choice."""
    name: str | None = getattr(runner, "provider", None)
    return name
