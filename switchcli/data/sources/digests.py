"""Digests of local files, by which prepared text depends on its sources."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from switchcli.data.sources.io_errors import data_errors
from switchcli.system.processor import available_processors
from switchcli.system.user_files import open_regular

CONTENT_BYTES: Final = 2**30
"""Bytes of several files together above which only their sizes and times count: reading them would delay a start."""

Stamp = tuple[int, int, int]
"""Size of a file in bytes, and the times of its last change of content and of attributes, in nanoseconds."""


def stamp(path: Path) -> Stamp:
    """Return what changes whenever a program writes to a file. Raises OSError if there is none."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def digests_of(paths: Sequence[Path]) -> list[str]:
    """Return KIND:DIGEST of each file: of its content, or of its stamp if all have more than CONTENT_BYTES together.

    Raises DataError for a file that cannot be read.
    """
    stamps = []
    for path in paths:
        with _read_errors(path):
            stamps.append(stamp(path))
    if sum(size for size, _, _ in stamps) > CONTENT_BYTES:
        return [f"stamp:{each}" for each in stamps]
    with ThreadPoolExecutor(available_processors()) as pool:  # hashing needs no lock
        return [*pool.map(_content_digest, paths)]


def _content_digest(path: Path) -> str:
    with _read_errors(path), open_regular(path) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _read_errors(path: Path) -> AbstractContextManager[None]:
    return data_errors(f"data: {path}: cannot be read", "check that it is there and may be read")
