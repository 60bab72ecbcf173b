"""Digests: content digests of local files, with a record in the cache, so that unchanged files are not read again.

For each file the record holds its digest and what the file system reports about it: size, times of modification and of
status change, and inode. As long as these are equal, the recorded digest is trusted: a write always changes the time of
status change, which no program can set back. The device number is not compared, because each machine numbers the
network file systems that it mounts in its own way, and machines may share the record.
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
from switchcli.processor import available_processors
from switchcli.user_files import open_regular

WHOLE_BYTES: Final = 2**34
"""Bytes of a stream's files above which samples of them are digested: reading all would delay the first step."""
SAMPLES: Final = 64
"""Samples of a file, at equal distances from its beginning to its end."""
SAMPLE_BYTES: Final = 2**16
_WHOLE, _SAMPLES, _SAMPLES_WITHOUT_TIMES = "sha256", "samples", "samples without times"
"""What a digest covers: all of a file; its size, samples and time of modification; or its size and samples."""
_BLOCK_BYTES: Final = 2**20
_FRESH_NS: Final = 2 * 10**9
"""Nanoseconds after a change during which another change may not show in the file's times: file systems keep times to
2 s or better. The digest of such a file is recorded, but not trusted later."""
_STAT_THREADS: Final = 16
"""Threads for stat calls: each may take a millisecond on a network file system, and a stream may have many files."""
_HASH_THREADS: Final = 8
_PROGRESS_BYTES: Final = 2**30
"""Bytes to read above which a progress bar is shown."""

T = TypeVar("T")


class Track(Protocol):
    """A progress bar: yields the items and shows how many were yielded, and out of `total` if that is known."""

    def __call__(self, items: Iterable[T], label: str, total: int | None, /) -> Iterator[T]: ...


class FileStat(NamedTuple):
    """Attributes of a file as the file system reports them. Any change of the content changes one of them."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Self:
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


class _FileDigest(NamedTuple):
    """The digest of a file, and the attributes that the file had then."""

    stat: FileStat
    digest: str
    settled: bool
    """Whether any later change of the file must show in its attributes; see _FRESH_NS."""


class Digests:
    """Content digests of local files, computed once per content."""

    def __init__(
        self,
        cache: Path | None = None,
        *,
        sampled: bool = False,
        times: bool = True,
        check: bool = False,
        warn: Callable[[str], None] = lambda text: None,
        track: Track = lambda paths, label, total: iter(paths),
    ) -> None:
        """
        Args:
            cache: the folder that keeps the record; None: no record.
            sampled: digest samples of files that have more than WHOLE_BYTES together.
            times: the digest of samples covers the time of modification. Copies of a file differ in it.
            check: read every file, whatever the record holds.
            warn: called with a line for each file whose content differs from the record's.
            track: shows progress over the paths.
        """
        self._cache, self._check, self._warn, self._track = cache, check, warn, track
        self._sampled_kind = (_SAMPLES if times else _SAMPLES_WITHOUT_TIMES) if sampled else _WHOLE
        self._returned: dict[str, _FileDigest] = {}
        """Digests that this object returned, by KIND:PATH."""

    def of(self, paths: Sequence[Path]) -> list[str]:
        """Return KIND:DIGEST of each file, where the kind is sha256, or samples. Raises DataError for unreadable files.

        Samples do not cover all of the content, so their digest covers the time of modification too, unless `times` is
        false.
        """
        with data_errors("data: a file cannot be read", "check that it is there and may be read"):
            stats = {path: FileStat.of(path.stat()) for path in paths}
        kind = self._sampled_kind if sum(stat.size for stat in stats.values()) > WHOLE_BYTES else _WHOLE
        names = {path: f"{kind}:{path.absolute()}" for path in paths}
        if not all(_matches(self._returned, names[path], stats[path]) for path in paths):
            self._add_missing(names, stats, kind)
        return [f"{kind}:{self._returned[names[path]].digest}" for path in paths]

    def _add_missing(self, names: dict[Path, str], stats: dict[Path, FileStat], kind: str) -> None:
        """Add these files to the returned digests, from the record, or by reading those that it does not know."""
        record = self._record_path(names.values())
        recorded = _read_record(record)
        trusted = {} if self._check else {name: entry for name, entry in recorded.items() if entry.settled}
        trusted |= self._returned
        missing = [path for path, name in names.items() if not _matches(trusted, name, stats[path])]
        computed = self._compute(missing, kind, sum(stats[path].size for path in missing))

        earlier = {**recorded, **self._returned}
        new_entries = {}
        for path, entry in computed.items():
            last = earlier.get(names[path])
            if last is not None and last.digest != entry.digest:
                self._warn(f"{path}: its content changed since it was last prepared: it is prepared again")
            if last != entry:
                new_entries[names[path]] = entry
        self._returned |= {name: computed.get(path) or trusted[name] for path, name in names.items()}
        if record is not None:
            _append_to_record(record, new_entries)

    def check(self) -> None:
        """Raise DataError if the content of a file has changed since its digest was returned. Reads changed files."""
        names = [*self._returned]
        if names:
            with ThreadPoolExecutor(min(_STAT_THREADS, len(names))) as pool:
                self._returned.update(zip(names, pool.map(self._check_file, names), strict=True))

    def _check_file(self, name: str) -> _FileDigest:
        """Return the entry of a file whose content is unchanged, with its attributes now."""
        kind, _, path = name.partition(":")
        returned = self._returned[name]
        try:
            if FileStat.of(Path(path).stat()) == returned.stat:
                return returned
            current = _digest(Path(path), kind)
        except OSError as error:
            raise DataError(f"{path}: cannot be read any more ({error.strerror}): bring the file back") from error
        if current.digest != returned.digest:
            raise DataError(
                f"{path}: its content changed while it was in use: bring the former content back and run the same "
                "command again, or begin a new run on the new content"
            )
        return current

    def _record_path(self, names: Iterable[str]) -> Path | None:
        """Return the record for this set of files. Each set has its own, which is read and written at once."""
        if self._cache is None:
            return None
        key = hashlib.sha256("\n".join(sorted(names)).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self._cache / "sources" / f"{key}.jsonl"

    def _compute(self, paths: Sequence[Path], kind: str, size: int) -> dict[Path, _FileDigest]:
        if not paths:
            return {}
        with (
            data_errors("data: a file cannot be read", "check that it is there and may be read"),
            # Threads are enough, because hashing releases the interpreter lock.
            ThreadPoolExecutor(min(_HASH_THREADS, len(paths), available_processors())) as pool,
        ):
            entries = pool.map(lambda path: _digest(path, kind), paths)
            shown = self._track(paths, "reading sources", len(paths)) if size >= _PROGRESS_BYTES else iter(paths)
            return dict(zip(shown, entries, strict=True))


def _matches(entries: dict[str, _FileDigest], name: str, stat: FileStat) -> bool:
    """Return whether there is an entry for the file as it is now."""
    return name in entries and entries[name].stat == stat


def _digest(path: Path, kind: str) -> _FileDigest:
    """Digest a file. Raises DataError if it changes meanwhile."""
    with open_regular(path) as file:
        now = time.time_ns()
        stat = FileStat.of(os.fstat(file.fileno()))
        digest = hashlib.sha256()
        if kind != _WHOLE:
            digest.update(f"{stat.size} {stat.mtime_ns if kind == _SAMPLES else ''}".encode())
            for number in range(SAMPLES):
                # From 0 for the first sample to size - SAMPLE_BYTES for the last: it ends with the file.
                file.seek(number * max(0, stat.size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
        else:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        after = FileStat.of(os.fstat(file.fileno()))
    if stat != after:
        raise DataError(f"{path}: changes while it is read: begin again when no other program writes to it")
    return _FileDigest(stat, digest.hexdigest(), now - stat.ctime_ns >= _FRESH_NS)


def _read_record(record: Path | None) -> dict[str, _FileDigest]:
    """Return the record's entries by name; the last one counts. Damaged or truncated lines are skipped."""
    if record is None:
        return {}
    entries: dict[str, _FileDigest] = {}
    with suppress(OSError):
        for line in record.read_text("utf-8", "surrogateescape").splitlines():
            text, _, checksum = line.rpartition(" ")
            if checksum != _checksum(text):
                continue
            with suppress(TypeError, ValueError):  # a line of another version
                name, stat, digest, settled = json.loads(text)
                entries[name] = _FileDigest(FileStat(*stat), digest, settled)
    return entries


def _append_to_record(record: Path, entries: dict[str, _FileDigest]) -> None:
    """Append entries to the record in one write, so that several processes may append.

    If the cache cannot be written, there is no record, and the files are read again.
    """
    texts = [json.dumps([name, *entry]) for name, entry in entries.items()]
    if not texts:
        return
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(record, flags, 0o644), "ab", buffering=0) as file:
            file.write("".join(f"{text} {_checksum(text)}\n" for text in texts).encode("utf-8", "surrogateescape"))


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
