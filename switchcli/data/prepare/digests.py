"""Content digests of local files. A record beside the cache keeps them, so that a start reads no unchanged file again.

The record holds, for each file, what the file system says of it (size, times of modification and of status change,
inode) and the digest of its content. As long as the former is the same, the digest is trusted. A write always changes
the time of status change, which no program can set back. The device does not count: each machine numbers the network
file systems that it mounts in its own way, and the record is shared like the cache.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, Protocol, Self, TypeVar

from switchcli.data.sources.io_errors import data_errors
from switchcli.errors import DataError

WHOLE_BYTES: Final = 2**34
"""A stream of more bytes than this is digested by samples: reading all of it would delay the first step."""
SAMPLES: Final = 64
SAMPLE_BYTES: Final = 2**16
_BLOCK_BYTES: Final = 2**20
_FRESH_NS: Final = 2 * 10**9
"""File systems keep times to 2 s or better. A file that changed less than this before it was read might change again
and show the same time: its digest is recorded for comparison, but not trusted."""
_STATS_AT_ONCE: Final = 16
"""A network file system takes up to a millisecond for each stat, and a stream may have many thousand files."""
_SHOWN_FROM: Final = 2**30
"""Bytes to read from which a progress bar is shown."""

T = TypeVar("T")


class Track(Protocol):
    """A progress bar: yields the items, showing how many went by, of how many if that is known."""

    def __call__(self, items: Iterable[T], label: str, total: int | None, /) -> Iterator[T]: ...


class FileStat(NamedTuple):
    """What the file system says of a file. Any change of its content changes it."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Self:
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


class _Known(NamedTuple):
    stat: FileStat
    digest: str
    settled: bool
    """Whether a later change of the file must show in its stat."""


class Digests:
    """Content digests of local files, computed once per content."""

    def __init__(
        self,
        cache: Path | None = None,
        *,
        sampled: bool = False,
        check: bool = False,
        warn: Callable[[str], None] = lambda text: None,
        track: Track = lambda paths, label, total: iter(paths),
    ) -> None:
        """
        Args:
            cache: the folder that keeps the record; None: no record.
            sampled: digest a set of files of more than WHOLE_BYTES by samples.
            check: read every file, whatever the record says.
            warn: called with a line for each file whose content differs from the record's.
            track: shows progress over the paths.
        """
        self._cache, self._sampled, self._check, self._warn, self._track = cache, sampled, check, warn, track
        self._known: dict[str, _Known] = {}
        """Digests that this object returned, by kind and path."""

    def of(self, paths: Sequence[Path]) -> list[str]:
        """Return the digest of each file, which names how it was made. Raises DataError for a file that cannot be read.

        Samples do not cover the whole content, so that those digests hold the time of modification too.
        """
        with data_errors("data: a file cannot be read", "check that it is there and may be read"):
            stats = {path: FileStat.of(path.stat()) for path in paths}
        kind = "samples" if self._sampled and sum(stat.size for stat in stats.values()) > WHOLE_BYTES else "sha256"
        names = {path: f"{kind}:{path.absolute()}" for path in paths}
        if all(_is_known(self._known, names[path], stats[path]) for path in paths):
            return [f"{kind}:{self._known[names[path]].digest}" for path in paths]
        record = self._record(names.values())
        recorded = _read(record)
        trusted = {} if self._check else {name: one for name, one in recorded.items() if one.settled}
        trusted |= self._known
        before = {**recorded, **self._known}
        missing = [path for path in dict.fromkeys(paths) if not _is_known(trusted, names[path], stats[path])]
        found = self._digested(missing, kind, sum(stats[path].size for path in missing))
        for path, one in found.items():
            last = before.get(names[path])
            if last is not None and last.digest != one.digest:
                self._warn(f"{path}: its content changed since it was last prepared: it is prepared again")
        self._known |= {names[path]: found.get(path) or trusted[names[path]] for path in paths}
        if record is not None:
            _append(record, {names[path]: one for path, one in found.items() if before.get(names[path]) != one})
        return [f"{kind}:{self._known[names[path]].digest}" for path in paths]

    def check(self) -> None:
        """Raise DataError if the content of a file whose digest was returned is another now. Reads changed files."""
        names = [*self._known]
        if names:
            with ThreadPoolExecutor(min(_STATS_AT_ONCE, len(names))) as pool:
                self._known.update(zip(names, pool.map(self._unchanged, names), strict=True))

    def _unchanged(self, name: str) -> _Known:
        kind, _, path = name.partition(":")
        known = self._known[name]
        try:
            if FileStat.of(Path(path).stat()) == known.stat:
                return known
            now = _digest(Path(path), kind)
        except OSError as error:
            raise DataError(f"{path}: cannot be read any more ({error.strerror}): bring the file back") from error
        if now.digest != known.digest:
            raise DataError(
                f"{path}: its content changed while it was in use: bring the former content back and run the same "
                "command again, or begin a new run on the new content"
            )
        return now

    def _record(self, names: Iterable[str]) -> Path | None:
        """One file for each set of files: it is read and written at once."""
        if self._cache is None:
            return None
        key = hashlib.sha256("\n".join(sorted(names)).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self._cache / "sources" / f"{key}.jsonl"

    def _digested(self, paths: Sequence[Path], kind: str, size: int) -> dict[Path, _Known]:
        if not paths:
            return {}
        with (
            data_errors("data: a file cannot be read", "check that it is there and may be read"),
            ThreadPoolExecutor(min(8, len(paths), os.cpu_count() or 1)) as pool,  # hashing releases the interpreter
        ):
            found = pool.map(lambda path: _digest(path, kind), paths)
            shown = self._track(paths, "reading sources", len(paths)) if size >= _SHOWN_FROM else iter(paths)
            return dict(zip(shown, found, strict=True))


def _is_known(known: dict[str, _Known], name: str, stat: FileStat) -> bool:
    return name in known and known[name].stat == stat


def _digest(path: Path, kind: str) -> _Known:
    """The digest of a file with the stat that goes with it. Raises DataError if the file changes meanwhile."""
    with path.open("rb") as file:
        now = time.time_ns()
        stat = FileStat.of(os.fstat(file.fileno()))
        digest = hashlib.sha256()
        if kind == "samples":
            digest.update(f"{stat.size} {stat.mtime_ns}".encode())
            for number in range(SAMPLES):
                file.seek(number * max(0, stat.size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
        else:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        after = FileStat.of(os.fstat(file.fileno()))
    if stat != after:
        raise DataError(f"{path}: changes while it is read: begin again when no other program writes to it")
    return _Known(stat, digest.hexdigest(), now - stat.ctime_ns >= _FRESH_NS)


def _read(record: Path | None) -> dict[str, _Known]:
    """The record's entries, the last of each name. Lines that are damaged or cut off are left out."""
    if record is None:
        return {}
    found: dict[str, _Known] = {}
    with suppress(OSError):
        for line in record.read_text("utf-8", "surrogateescape").splitlines():
            text, _, seal = line.rpartition(" ")
            if seal != _seal(text):
                continue
            with suppress(TypeError, ValueError):  # a line of another version
                name, stat, digest, settled = json.loads(text)
                found[name] = _Known(FileStat(*stat), digest, settled)
    return found


def _append(record: Path, entries: dict[str, _Known]) -> None:
    """Add entries to the record in one write. A cache that cannot be written has none: files are then read again."""
    texts = [json.dumps([name, *one]) for name, one in entries.items()]
    if not texts:
        return
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(handle, "ab", buffering=0) as file:
            file.write("".join(f"{text} {_seal(text)}\n" for text in texts).encode("utf-8", "surrogateescape"))


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
