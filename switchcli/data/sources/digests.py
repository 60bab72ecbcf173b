"""Digests: content digests of local files, with a record in the cache, so that unchanged files are not read again."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Final, Protocol, TypeVar

from switchcli.data.sources.io_errors import data_errors
from switchcli.errors import DataError
from switchcli.system import publish
from switchcli.system.processor import available_processors
from switchcli.system.user_files import open_regular

WHOLE_BYTES: Final = 2**34
"""Bytes of a stream's files above which samples of them are digested: reading all would delay the first step."""
SAMPLES: Final = 64
"""Samples of a file, at equal distances from its beginning to its end."""
SAMPLE_BYTES: Final = 2**16
FRESH_NS: Final = 2 * 10**9
"""Nanoseconds after a change during which another change may not show in the file's times: file systems keep times to
2 s or better. The digest of such a file is not recorded."""

T = TypeVar("T")


class Track(Protocol):
    """A progress bar: yields the items and shows how many were yielded, and out of `total` if that is known."""

    def __call__(self, items: Iterable[T], label: str, total: int | None, /) -> Iterator[T]: ...


Entry = tuple[list[int], str]
"""The attributes and the digest of a file. The record has one for each kind of digest and path."""


class Digests:
    """Content digests of local files. A file is read again only if one of its attributes changes.

    The digest of a copy, or of the same file under another mount, is the same.
    """

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
            sampled: of files that have more than WHOLE_BYTES together only the size and samples are digested.
            check: read every file, whatever the record holds.
            warn: called with a line for each file whose content differs from the record's.
            track: shows progress over the paths.
        """
        self._file = None if cache is None else cache / "sources.json"
        self._sampled, self._check, self._warn, self._track = sampled, check, warn, track

    def of(self, paths: Sequence[Path]) -> list[str]:
        """Return KIND:DIGEST of each file, where the kind is sha256 or samples. Raises DataError for unreadable files.

        Also raises DataError if a file changes while it is read.
        """
        stats: dict[Path, os.stat_result] = {}
        for path in paths:
            with _read_errors(path):
                stats[path] = path.stat()
        is_large = sum(stat.st_size for stat in stats.values()) > WHOLE_BYTES
        kind = "samples" if self._sampled and is_large else "sha256"
        names = {path: f"{kind}:{path.absolute()}" for path in stats}
        record = self._read()
        found: dict[Path, str] = {}
        if not self._check:
            for path, name in names.items():
                if name in record and record[name][0] == _attributes(stats[path]):
                    found[path] = record[name][1]
        if missing := [path for path in stats if path not in found]:
            with ThreadPoolExecutor(min(len(missing), available_processors())) as pool:  # hashing needs no lock
                entries = pool.map(lambda path: _digest(path, kind), missing)
                tracked = self._track(entries, "reading sources", len(missing))
                for path, (entry, is_settled) in zip(missing, tracked, strict=True):
                    _, found[path] = entry
                    before = record.pop(names[path], None)
                    if before is not None and before[1] != found[path]:
                        self._warn(f"{path}: its content changed since it was last prepared: it is prepared again")
                    if is_settled:
                        record[names[path]] = entry
            self._write(record)
        return [f"{kind}:{found[path]}" for path in paths]

    def _read(self) -> dict[str, Entry]:
        with suppress(OSError, ValueError, TypeError, AttributeError):  # a damaged record is made anew
            if self._file is not None:
                record = json.loads(self._file.read_bytes())
                return {name: ([*map(int, stat)], str(digest)) for name, (stat, digest) in record.items()}
        return {}

    def _write(self, record: dict[str, Entry]) -> None:
        with suppress(OSError):  # without a record the files are read again
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                publish.write_file(self._file, json.dumps(record))


def _attributes(stat: os.stat_result) -> list[int]:
    """Return what the file system reports about a file. Any change of the content changes one of these numbers."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read_errors(path: Path) -> AbstractContextManager[None]:
    return data_errors(f"data: {path}: cannot be read", "check that it is there and may be read")


def _digest(path: Path, kind: str) -> tuple[Entry, bool]:
    """Return the entry of a file, and whether any later change must show in its attributes; see FRESH_NS."""
    with _read_errors(path), open_regular(path) as file:
        now, stat = time.time_ns(), os.fstat(file.fileno())
        if kind == "samples":
            digest = hashlib.sha256(str(stat.st_size).encode())
            for number in range(SAMPLES):
                # From 0 for the first sample to size - SAMPLE_BYTES for the last, which ends with the file.
                file.seek(number * max(0, stat.st_size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
        else:
            digest = hashlib.file_digest(file, "sha256")
        if _attributes(os.fstat(file.fileno())) != _attributes(stat):
            raise DataError(f"{path}: changes while it is read: begin again when no other program writes to it")
    return (_attributes(stat), digest.hexdigest()), now - stat.st_ctime_ns >= FRESH_NS
