"""The content-addressed store: key fields and a function that fills a folder in, an artifact out.

The key of an entry is the SHA-256 of its key fields. Entries are written to a temporary folder and
renamed, so a reader sees a whole entry or none; every file is hashed again when it is found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqc.compiler import machine
from dfqc.compiler.errors import EnvironmentFault
from dfqc.compiler.ownership import is_abandoned, owned_name

DEFAULT_LIMIT = 10 << 30
_RECORD = "artifact.json"
_LAYOUT = "v1"  # bumped when the folder layout changes: old entries are then left alone

log = logging.getLogger("dfqc.store")


def canonical_json(value: object) -> str:
    """Serialize so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest_of(value: object) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def default_root() -> Path:
    """$DFQC_CACHE_DIR, else $XDG_CACHE_HOME/dfqc, else ~/.cache/dfqc."""
    if chosen := os.environ.get("DFQC_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dfqc"


@dataclass(frozen=True)
class Artifact:
    """One stored stage output. `digest` covers its files and nothing else."""

    stage: str
    key: str
    fields: Mapping[str, Any]
    label: str  # what it was made from; groups the entries of one model, not part of the key
    digest: str
    files: Mapping[str, str]
    size_bytes: int
    seconds: float
    peak_rss_bytes: int
    dfqc: str
    folder: Path

    def file(self, name: str) -> Path:
        """Path of one of its files."""
        return self.folder / name


class _CorruptError(Exception):
    """An entry that is not what was written."""


class Store:
    """Artifacts under one folder, shared by any number of concurrent builds.

    `limit_bytes` bounds the folder: the least recently used entries go first, never one that a
    living build has touched.
    """

    def __init__(self, root: Path, *, limit_bytes: int = DEFAULT_LIMIT) -> None:
        self.root = root / _LAYOUT
        self.limit_bytes = limit_bytes
        with _blaming(root):
            for name in ("objects", "temp", "leases"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            self._lease = self.root / "leases" / owned_name()
            self._lease.touch()
        self._sweep()

    def find(self, key: str) -> Artifact | None:
        """Return the entry, or None. An entry that is damaged is reported, removed and None."""
        folder = self._folder(key)
        if not folder.is_dir():
            return None
        self._hold(key)
        try:
            artifact = _read(folder)
            _check(artifact, key)
        except _CorruptError as error:
            log.warning("cache entry %s is damaged (%s): removed, will be made again", key, error)
            self.discard(key)
            return None
        with contextlib.suppress(OSError):  # what was used last is evicted last
            os.utime(folder / _RECORD)
        return artifact

    def write(
        self,
        fields: Mapping[str, Any],
        fill: Callable[[Path], object],
        *,
        label: str = "",
        found: Callable[[], Mapping[str, Any]] = dict,
    ) -> Artifact:
        """Run `fill` on an empty folder and store what it wrote under the key of `fields`.

        `fields` are plain JSON data and name their `stage`; `found` gives fields to add that only
        the making could tell. If another build was faster, its entry is returned: equal keys
        mean equal content.
        """
        key = digest_of(fields)
        temp = self.root / "temp" / owned_name()
        self._hold(key)
        try:
            with _blaming(self.root.parent):
                temp.mkdir()
            with machine.measured() as usage, _blaming_full_disk(self.root.parent):
                fill(temp)
            fields = {**fields, **found()}
            if (made := digest_of(fields)) != key:
                key = made
                self._hold(key)
            with _blaming(self.root.parent):
                _record(temp, key, fields, label, usage)
                return self._publish(temp, key)
        finally:
            shutil.rmtree(temp, ignore_errors=True)

    def discard(self, key: str) -> None:
        """Remove an entry; a reader sees it whole or not at all."""
        doomed = self.root / "temp" / owned_name()
        with contextlib.suppress(OSError):
            self._folder(key).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def entries(self, stage: str | None = None) -> Iterator[Artifact]:
        """Yield the readable entries (of one stage), unverified, latest used first."""
        records = sorted((self.root / "objects").glob(f"*/*/{_RECORD}"), key=_used, reverse=True)
        for record in records:
            with contextlib.suppress(_CorruptError):
                artifact = _read(record.parent)
                if stage in (None, artifact.stage):
                    yield artifact

    def size_bytes(self) -> int:
        """Bytes held by all entries."""
        return sum(artifact.size_bytes for artifact in self.entries())

    def evict(self) -> list[str]:
        """Remove least recently used entries until the limit holds; return their keys."""
        held, removed = self._held(), []
        artifacts = list(self.entries())
        total = sum(a.size_bytes for a in artifacts)
        for artifact in reversed(artifacts):
            if total <= self.limit_bytes:
                break
            if artifact.key in held:
                continue
            self.discard(artifact.key)
            removed.append(artifact.key)
            total -= artifact.size_bytes
        return removed

    def close(self) -> None:
        """Trim the store and give up the hold on this build's entries."""
        self.evict()
        self.release()

    def release(self) -> None:
        """Give up the hold on this build's entries."""
        self._lease.unlink(missing_ok=True)

    def _folder(self, key: str) -> Path:
        return self.root / "objects" / key[:2] / key

    def _hold(self, key: str) -> None:
        with _blaming(self.root.parent), self._lease.open("a") as file:
            file.write(key + "\n")

    def _held(self) -> set[str]:
        keys: set[str] = set()
        for lease in (self.root / "leases").iterdir():
            with contextlib.suppress(OSError):
                keys.update(lease.read_text().split())
        return keys

    def _publish(self, temp: Path, key: str) -> Artifact:
        folder = self._folder(key)
        folder.parent.mkdir(exist_ok=True)
        try:
            temp.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if (theirs := self.find(key)) is not None:
                return theirs
            temp.rename(folder)  # theirs was damaged, and is gone now
        return _read(folder)

    def _sweep(self) -> None:
        """Remove what killed builds left behind."""
        for folder in (self.root / "temp", self.root / "leases"):
            for path in filter(is_abandoned, folder.iterdir()):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _record(
    temp: Path, key: str, fields: Mapping[str, Any], label: str, usage: machine.Usage
) -> None:
    paths = sorted(p for p in temp.rglob("*") if p.is_file())
    files = {p.relative_to(temp).as_posix(): hash_file(p) for p in paths}
    record = {
        "stage": fields["stage"],
        "key": key,
        "fields": fields,
        "label": label,
        "digest": digest_of(files),
        "files": files,
        "size_bytes": sum(p.stat().st_size for p in paths),
        "seconds": usage.seconds,
        "peak_rss_bytes": usage.peak_rss_bytes,
        "dfqc": machine.version("dfqc") or "unknown",
    }
    (temp / _RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _read(folder: Path) -> Artifact:
    try:
        artifact = Artifact(**json.loads((folder / _RECORD).read_text()), folder=folder)
        return dataclasses.replace(artifact, files=dict(artifact.files))
    except (OSError, ValueError, TypeError) as error:
        raise _CorruptError(f"{_RECORD}: {error}") from error


def _check(artifact: Artifact, key: str) -> None:
    if not artifact.key == key == digest_of(artifact.fields):
        raise _CorruptError("its key fields do not give its key")
    if artifact.digest != digest_of(artifact.files):
        raise _CorruptError("its file list does not give its digest")
    for name, expected in artifact.files.items():
        try:
            got = hash_file(artifact.file(name))
        except OSError as error:
            raise _CorruptError(f"{name}: {error.strerror}") from error
        if got != expected:
            raise _CorruptError(f"{name}: sha256 is {got[:12]}, was {expected[:12]}")


def _used(record: Path) -> float:
    try:
        return record.stat().st_mtime
    except OSError:  # removed by another build meanwhile
        return 0.0


@contextlib.contextmanager
def _blaming(root: Path) -> Iterator[None]:
    """Report an unusable cache folder as what it is (exit 8)."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"the cache folder {root} cannot be used: {error.strerror or error}; "
            "choose another with --cache-dir or DFQC_CACHE_DIR"
        ) from error


@contextlib.contextmanager
def _blaming_full_disk(root: Path) -> Iterator[None]:
    """Let a stage's own faults through, but say which folder is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        with _blaming(root):
            raise
