"""VerifiedFolder: files of prepared data whose content matches the manifest, in memory or mapped.

A mapped file may change while a run reads it. Three checks guard against that. The content is compared with its digest
when the file is mapped. The size is compared before each read, because reading a mapping beyond the end of its file
kills the process (SIGBUS). And `VerifiedFolder.check`, which a run calls before each save, finds every file that was
written to since it was verified: all that a run read before a successful check is what was prepared.
"""

import hashlib
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from switchcli.data.prepare.digests import FileStat
from switchcli.errors import DataError, NumericsError, SwitchError

IN_MEMORY_BYTES: Final = 2**26
"""Bytes of all texts of a run up to which they are held in memory, a copy on each rank. This is enough for short runs
and less than PyTorch itself takes. Longer texts are mapped."""
CHECKED_MEBIBYTES: Final = 1024
"""Mebibytes at the start of each file that are digested. Beyond them only the size counts; shards are smaller."""
_MAX_UNCHECKED: Final = 32
"""Mapped files that may wait for a check. Each keeps two file descriptors open; checking one takes an fstat call."""
_WRITE_SECONDS: Final = 0.05
"""Seconds until a write that already shows in a file's times is finished."""


class MappedFile:
    """A file that is mapped into memory. The descriptor stays open, so a file that is renamed over it has no effect."""

    def __init__(self, path: Path, identity: object) -> None:
        """Open and verify the file. Raises DataError if its size and digest are not `identity`."""
        self._path, self._identity = path, identity
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise changed_data_error(path) from error
        weakref.finalize(self, os.close, self._descriptor)
        self._verify()

    def content(self) -> mmap.mmap:
        """Map the file, read only. Raises DataError if the system refuses."""
        try:
            return mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        except (ValueError, OSError) as error:
            raise changed_data_error(self._path) from error

    def check_size(self) -> None:
        """Raise DataError if the file is shorter than when it was verified."""
        if self._read_stat().size < self._stat.size:
            raise changed_data_error(self._path)

    def check(self) -> None:
        """Raise DataError if the file was written to since it was verified and its content differs now."""
        if self._read_stat() != self._stat:
            time.sleep(_WRITE_SECONDS)
            self._verify()

    def _verify(self) -> None:
        stat = self._read_stat()
        try:
            identity = identity_of(self._descriptor)
        except OSError as error:
            raise changed_data_error(self._path) from error
        # The stat must be the same after the read, or a write during the read could go unnoticed.
        if identity != self._identity or self._read_stat() != stat:
            raise changed_data_error(self._path)
        self._stat = stat  # only after success: the next check of a damaged file must read it again

    def _read_stat(self) -> FileStat:
        try:
            return FileStat.of(os.fstat(self._descriptor))
        except OSError as error:  # ESTALE: another machine removed the file from a network file system
            raise changed_data_error(self._path) from error


class VerifiedFolder:
    """The files of a folder with a manifest. Several threads may read at the same time."""

    def __init__(self, folder: Path, files: Mapping[str, object], *, in_memory: bool) -> None:
        """
        Args:
            files: the size and digest of each file by name, from the folder's manifest.
            in_memory: read files into memory; otherwise they are mapped.
        """
        self._folder, self._files, self._in_memory = folder, files, in_memory
        self._contents: dict[str, bytes] = {}
        """Content of the files that were read into memory."""
        self._unchecked: set[MappedFile] = set()
        """Mapped files that were read since the last check."""
        self._lock = threading.Lock()
        """Guards `_unchecked`."""
        self._check_lock = threading.Lock()
        """Held during a check."""

    def path(self, name: str) -> Path:
        return self._folder / name

    def open(self, name: str) -> tuple[bytes | mmap.mmap, MappedFile | None]:
        """Return a file's content in memory, the same object at each call; or mapped, with the mapped file.

        Only `gather` may read arrays over a mapping. Raises DataError if the content does not match the manifest.
        """
        if not self._in_memory:
            mapped = MappedFile(self.path(name), self._files[name])
            return mapped.content(), mapped
        if name not in self._contents:
            self._contents[name] = self._load(name)
        return self._contents[name], None

    def head(self, name: str, num_bytes: int) -> NDArray[np.uint8]:
        """Return a buffer of the file's size that holds the file's first `num_bytes` bytes, and then zeros.

        The zeros take no memory. The file is read and not mapped, so that a disk error is an exception, not a SIGBUS.
        Raises DataError if the file cannot be read or its size is not in the manifest. The content is not compared.
        """
        path, expected = self.path(name), self._files[name]
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = os.pread(file.fileno(), min(num_bytes, size), 0)
        except OSError as error:
            raise changed_data_error(path) from error
        if not isinstance(expected, Mapping) or size != expected.get("bytes"):
            raise changed_data_error(path)
        content = np.zeros(size, np.uint8)
        content[: len(head)] = np.frombuffer(head, np.uint8)
        return content

    def _load(self, name: str) -> bytes:
        """Read a file, and verify the bytes that are returned, rather than the file in a second read."""
        path = self.path(name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise changed_data_error(path) from error
        digest = hashlib.sha256(content[: CHECKED_MEBIBYTES * 2**20]).hexdigest()
        if {"bytes": len(content), "sha256": digest} != self._files[name]:
            raise changed_data_error(path)
        return content

    def gather(self, array: NDArray[Any], mapped: MappedFile, positions: NDArray[np.int64] | slice) -> NDArray[Any]:
        """Return a copy of a mapped array at these positions. Raises DataError if its file was truncated."""
        mapped.check_size()
        try:
            values = array[positions]
            return values.copy() if isinstance(positions, slice) else values  # indexing with an array copies already
        finally:  # after the read, because a check before it would not cover it
            with self._lock:
                self._unchecked.add(mapped)
                is_check_due = len(self._unchecked) > _MAX_UNCHECKED
            if is_check_due:
                self.check()

    def check(self) -> None:
        """Raise DataError if a mapped file that was read since the last check has changed since it was verified.

        A file with an unchanged stat was not written to, and is not read again.
        """
        with self._check_lock:  # files that another thread is checking are not in `_unchecked`: wait for its result
            with self._lock:
                unchecked, self._unchecked = self._unchecked, set()
            try:
                for mapped in unchecked:
                    mapped.check()
            except DataError:
                with self._lock:
                    self._unchecked |= unchecked  # so that the next check fails too
                raise


@contextmanager
def explain_changed_data(check: Callable[[], None]) -> Iterator[None]:
    """Raise the error of `check`, if it has one, in place of an error that changed data may have caused.

    Such errors are those that are not meant for the user, for example an IndexError, and a NaN.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, NumericsError) or not isinstance(error, SwitchError):
            check()
        raise


def identity_of(descriptor: int) -> dict[str, object]:
    """Return the size and digest of an open file, in the form that manifests hold."""
    digest = hashlib.sha256()
    for number in range(CHECKED_MEBIBYTES):
        block = os.pread(descriptor, 2**20, number * 2**20)
        if not block:
            break
        digest.update(block)
    return {"bytes": os.fstat(descriptor).st_size, "sha256": digest.hexdigest()}


def changed_data_error(path: Path) -> DataError:
    """Return the error for a file of prepared data that is missing or does not match its manifest."""
    return DataError(
        f"{path}: the file was removed, truncated or changed after it was prepared: run the same command again, which "
        "prepares the text again and goes on from the last checkpoint; a text of more than 1 GiB is prepared again by "
        "`switchcli data prepare RECIPE --check`"
    )
