"""Run stages in order against the store: a tuple of stages and settings in, artifacts out.

The driver owns what no stage should know of: keys, atomic storage, resume, seeds, progress,
timing, memory and time limits. A stage reads earlier values through its `Context` and returns one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfqc.compiler import keys, machine
from dfqc.compiler.artifact import Artifact, Store, digest_of
from dfqc.compiler.contracts import Progress, silent
from dfqc.compiler.errors import EnvironmentFault, Interrupted
from dfqc.compiler.units import format_duration, format_size


@dataclass(frozen=True)
class Stage:
    """One step. `settings` below is whatever object the driver was given (a recipe).

    `inputs` name the earlier stages it reads, and nothing else may be read. A stage without
    `save` is derived: cheap, recomputed when somebody reads it, and known by its key.
    """

    name: str
    inputs: tuple[str, ...]
    run: Callable[[Context], Any]
    save: Callable[[Any, Path], None] | None = None
    load: Callable[[Path], Any] | None = None
    check: Callable[[Any], None] | None = None  # verifies the value before it is stored
    version: int = 1  # of what it stores; raised when `load` expects something else
    options: Callable[[Any], Mapping[str, Any]] = lambda settings: {}
    environment: Callable[[Any], Mapping[str, Any]] = lambda settings: {}
    code: Callable[[Any], Sequence[str]] = lambda settings: ()  # beside the file of `run`
    seeded: bool = False  # its output depends on the seed


_BEFORE = "before it began"
_LESS = "lower --samples"
_SMALLER = dict.fromkeys(("synthesize", "quantize"), f"{_LESS} or its batch size")


@dataclass(frozen=True)
class Limits:
    """Wall-clock and memory a run may use; None: no limit."""

    seconds: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class StageRecord:
    """What became of a stage. `seconds` and the peak are those of making it, cached or not."""

    name: str
    key: str
    seconds: float
    cached: bool
    peak_rss_bytes: int


@dataclass(frozen=True)
class Explanation:
    """Why a stage would be reused or not: `status` is hit, miss, waits or derived."""

    name: str
    status: str
    key: str | None
    reasons: tuple[str, ...] = ()


@dataclass
class Driver:
    """One run of `stages` under `settings`. `label` groups the entries of one model."""

    stages: Sequence[Stage]
    settings: Any
    store: Store
    seed: int = 0
    label: str = ""
    limits: Limits = Limits()
    reporter: Callable[[str], Progress] = lambda stage: silent
    finished: Callable[[StageRecord], None] = lambda record: None
    records: list[StageRecord] = field(default_factory=list, init=False)
    _artifacts: dict[str, Artifact] = field(default_factory=dict, init=False)
    _digests: dict[str, str] = field(default_factory=dict, init=False)
    _values: dict[str, Any] = field(default_factory=dict, init=False)
    _start: float = field(default=0.0, init=False)

    def run(self) -> None:
        """Bring every stage up to date, in order; finished work survives any fault."""
        self._start = time.monotonic()
        for position, stage in enumerate(self.stages):
            self.enforce(stage.name, _BEFORE)
            try:
                record = self._settle(stage)
            except KeyboardInterrupt:
                raise Interrupted(
                    f"interrupted in stage {stage.name}; everything finished before is stored: "
                    "run the same command again to go on from there"
                ) from None
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                raise EnvironmentFault(
                    f"stage {stage.name} ran out of memory ({error}); finished stages are stored: "
                    f"free memory, or {_SMALLER.get(stage.name, _LESS)}"
                ) from error
            self.records.append(record)
            if stage.save is not None:  # whether a derived stage runs at all shows only later
                self.finished(record)
            self._forget_unneeded(position)

    def value(self, name: str) -> Any:
        """Return a stage's value, loaded from the store (or derived) the first time."""
        if name not in self._values:
            stage = self._stage(name)
            if stage.load is not None:
                # Always read back, also right after it was made: an interrupted and an
                # uninterrupted build then go through the very same values.
                self._values[name] = stage.load(self._artifacts[name].folder)
            else:
                self._values[name] = self._derive(stage)
        return self._values[name]

    def artifact(self, name: str) -> Artifact:
        """Return what is stored for a finished stage."""
        return self._artifacts[name]

    def explain(self) -> Iterator[Explanation]:
        """Say for every stage whether it would be reused, without running anything."""
        waiting: set[str] = set()
        for stage in self.stages:
            missing = [name for name in stage.inputs if name in waiting]
            if missing:
                waiting.add(stage.name)
                reason = f"its key needs the output of {', '.join(missing)}"
                yield Explanation(stage.name, "waits", None, (reason,))
                continue
            fields = self.fields(stage)
            key = digest_of(fields)
            if stage.save is None:
                self._digests[stage.name] = key
                yield Explanation(stage.name, "derived", key)
            elif (artifact := self.store.find(key)) is not None:
                self._digests[stage.name] = artifact.digest
                self._artifacts[stage.name] = artifact
                yield Explanation(stage.name, "hit", key)
            else:
                waiting.add(stage.name)
                yield Explanation(stage.name, "miss", key, self._why_missing(fields))

    def fields(self, stage: Stage) -> dict[str, Any]:
        """Return everything a stage's output depends on."""
        return {
            "stage": stage.name,
            "version": stage.version,
            "code": keys.code_digest(stage.code(self.settings), (stage.run.__module__,)),
            "options": dict(stage.options(self.settings)),
            "seed": self.seed if stage.seeded else None,
            "inputs": {name: self._digests[name] for name in stage.inputs},
            "environment": dict(stage.environment(self.settings)),
        }

    def elapsed(self) -> float:
        """Return the seconds since the run began."""
        return time.monotonic() - self._start

    def enforce(self, stage: str, when: str) -> None:
        """Stop a run that is over its time or memory (exit 8); stored work is kept."""
        seconds, memory = self.limits.seconds, self.limits.memory_bytes
        if seconds is not None and self.elapsed() > seconds:
            raise EnvironmentFault(
                f"the budget of {format_duration(seconds)} is used up in stage {stage} ({when}); "
                "finished work is stored: run again to go on, or lower --samples or --effort"
            )
        if memory is not None and (used := machine.current_rss()) > memory:
            way = "" if when == _BEFORE else f", or {_SMALLER.get(stage, _LESS)}"
            raise EnvironmentFault(
                f"stage {stage} ({when}) uses {format_size(used)}, over --memory "
                f"{format_size(memory)}; give more{way}"
            )

    def _settle(self, stage: Stage) -> StageRecord:
        fields = self.fields(stage)
        key = digest_of(fields)
        if stage.save is None:
            self._digests[stage.name] = key
            return StageRecord(stage.name, key, 0.0, True, 0)
        artifact = self.store.find(key)
        cached = artifact is not None
        if artifact is None:
            artifact = self._make(stage, fields)
        self._artifacts[stage.name] = artifact
        self._digests[stage.name] = artifact.digest
        return StageRecord(stage.name, key, artifact.seconds, cached, artifact.peak_rss_bytes)

    def _make(self, stage: Stage, fields: Mapping[str, Any]) -> Artifact:
        def fill(folder: Path) -> None:
            assert stage.save is not None
            stage.save(self._compute(stage), folder)

        return self.store.write(fields, fill, label=self.label)

    def _derive(self, stage: Stage) -> Any:
        """Compute a derived value, and correct its record: it was taken for unneeded."""
        with machine.measured() as usage:
            value = self._compute(stage)
        for place, record in enumerate(self.records):
            if record.name == stage.name:
                self.records[place] = StageRecord(
                    stage.name, record.key, usage.seconds, False, usage.peak_rss_bytes
                )
        return value

    def _compute(self, stage: Stage) -> Any:
        value = stage.run(Context(self, stage))
        if stage.check is not None:
            stage.check(value)
        return value

    def _forget_unneeded(self, position: int) -> None:
        needed = {name for stage in self.stages[position + 1 :] for name in stage.inputs}
        for name in set(self._values) - needed - self._derived_needs(needed):
            del self._values[name]

    def _derived_needs(self, needed: set[str]) -> set[str]:
        derived = [s for s in self.stages if s.save is None and s.name in needed]
        return {name for stage in derived for name in stage.inputs}

    def _stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def _why_missing(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """Compare with the most similar entry of the same stage and model."""
        stored = [a for a in self.store.entries(fields["stage"]) if a.label == self.label]
        if not stored:
            return ("never made for this model",)
        candidates = [keys.differences(artifact.fields, fields) for artifact in stored]
        nearest = min(candidates, key=len)
        return tuple(nearest)


@dataclass(frozen=True)
class Context:
    """What a running stage may use: its settings, its declared inputs, seeds and checkpoints."""

    driver: Driver
    stage: Stage

    @property
    def settings(self) -> Any:
        """The settings the driver was given."""
        return self.driver.settings

    def value(self, name: str) -> Any:
        """Return the value of an input; one that is not declared would be missing in the key."""
        if name not in self.stage.inputs:
            raise KeyError(f"stage {self.stage.name} reads {name} without declaring it")
        return self.driver.value(name)

    def path(self, name: str, file: str) -> Path:
        """Return a file of an input's artifact."""
        if name not in self.stage.inputs:
            raise KeyError(f"stage {self.stage.name} reads {name} without declaring it")
        return self.driver.artifact(name).file(file)

    def seed(self, index: int = 0) -> int:
        """Derive the seed of a batch from the run's seed, the stage's name and an index."""
        text = f"{self.driver.seed}/{self.stage.name}/{index}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

    def progress(self, title: str | None = None) -> Progress:
        """Return the reporter of this stage; it also enforces the limits."""
        report = self.driver.reporter(title or self.stage.name)

        def checked(done: int, total: int, note: str) -> None:
            self.driver.enforce(self.stage.name, f"{done} of {total} done")
            report(done, total, note)

        return checked

    def share_of_time(self, fraction: float) -> float | None:
        """Return that part of what is left of the run's time limit; None without one."""
        limit = self.driver.limits.seconds
        return None if limit is None else max(0.0, fraction * (limit - self.driver.elapsed()))

    @property
    def scratch(self) -> Path:
        """Return a folder for what does not fit into memory: beside the store, on its disk."""
        return self.driver.store.root / "temp"

    @property
    def is_last(self) -> bool:
        """Report whether nothing comes after this stage, as when only images are made."""
        return self.driver.stages[-1] is self.stage

    def checkpoint(
        self,
        part: Mapping[str, Any],
        make: Callable[[], Any],
        save: Callable[[Any, Path], None],
        load: Callable[[Path], Any],
        *,
        without: Sequence[str] = (),
        cut_short: Callable[[Any], bool] = lambda value: False,
    ) -> Any:
        """Return one part of a long stage; once made, it survives a kill.

        `part` says which part it is; `without` lists options that parts do not depend on, so that
        they are shared between runs that differ only in those. A part that `cut_short` finds
        unfinished for lack of time serves only runs with the same time limit.
        """
        fields = self.driver.fields(self.stage)
        options = {k: v for k, v in fields["options"].items() if k not in without}
        fields |= {"stage": f"{self.stage.name}.part", "options": options, "part": dict(part)}
        limit = {"seconds": self.driver.limits.seconds}
        store = self.driver.store

        found: dict[str, Any] = {}

        def fill(folder: Path) -> None:
            value = make()
            save(value, folder)
            found.update(limit if cut_short(value) else {})

        artifact = store.find(digest_of(fields)) or store.find(digest_of({**fields, **limit}))
        if artifact is None:
            label = self.driver.label
            artifact = store.write(fields, fill, label=label, found=lambda: found)
        return load(artifact.folder)


def _is_out_of_memory(error: Exception) -> bool:
    """Recognize torch's faults by name: this file must not import torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
