"""Files of a sealed folder with verified content only: in memory, or mapped and checked again before each save.

A mapped file may change while a run reads it. Three things guard against that: its content is compared with its digest
when it is mapped; its size is compared before each read, because reading a mapping beyond the end of its file ends the
process (SIGBUS); and `Verified.check` finds every file that was written to since it was verified. What a run read up to
a successful check is what was prepared.
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
"""Bytes of all texts of a run up to which they are held in memory: a copy on each rank, less than what PyTorch itself
takes, and enough for the texts of all short runs. Longer texts are mapped."""
CHECKED_MEBIBYTES: Final = 1024
"""The part of each file that is digested. Beyond it only the size counts; shards are smaller."""
_MOST_USED: Final = 32
"""Mapped files of a text that may wait for a check; each keeps two file descriptors open. A check of one is a call of
fstat."""
_WRITE_SECONDS: Final = 0.05
"""A write that already shows in a file's time is done after this."""


class MappedFile:
    """A file that is mapped into memory, held open by its descriptor: a file that is renamed over it does not count."""

    def __init__(self, path: Path, identity: object) -> None:
        """Open and verify the file. Raises DataError if its content is not what `identity` says."""
        self._path, self._identity = path, identity
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise changed_data_error(path) from error
        weakref.finalize(self, os.close, self._handle)
        self._verify()

    def content(self) -> mmap.mmap:
        """Map the file, read only. Raises DataError if the system refuses."""
        try:
            return mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ)
        except (ValueError, OSError) as error:
            raise changed_data_error(self._path) from error

    def check_size(self) -> None:
        """Raise DataError if the file is shorter than it was."""
        if self._status().size < self._stat.size:
            raise changed_data_error(self._path)

    def check(self) -> None:
        """Raise DataError if the file was written to since it was verified and its content is another now."""
        if self._status() != self._stat:
            time.sleep(_WRITE_SECONDS)
            self._verify()

    def _verify(self) -> None:
        stat = self._status()
        try:
            identity = identity_of(self._handle)
        except OSError as error:
            raise changed_data_error(self._path) from error
        if identity != self._identity or self._status() != stat:
            raise changed_data_error(self._path)
        self._stat = stat  # not before: the next check of a file that is damaged must find it so again

    def _status(self) -> FileStat:
        try:
            return FileStat.of(os.fstat(self._handle))
        except OSError as error:  # ESTALE: another machine removed the file from a network file system
            raise changed_data_error(self._path) from error


class VerifiedFolder:
    """The files of a sealed folder. Threads may read at the same time."""

    def __init__(self, folder: Path, files: Mapping[str, object], *, in_memory: bool) -> None:
        """`files` gives the size and digest of each file by its name, as the folder's manifest has them."""
        self._folder, self._files, self._in_memory = folder, files, in_memory
        self._held: dict[str, bytes] = {}
        self._used: set[MappedFile] = set()
        self._lock, self._checking = threading.Lock(), threading.Lock()

    def path(self, name: str) -> Path:
        """Return where a file lies."""
        return self._folder / name

    def open(self, name: str) -> tuple[bytes | mmap.mmap, MappedFile | None]:
        """Return a file's content in memory, the same at each call; or mapped, with its file.

        Arrays over a mapping are read by `take` only. Raises DataError if the content is not what was sealed.
        """
        if not self._in_memory:
            mapped = MappedFile(self.path(name), self._files[name])
            return mapped.content(), mapped
        if name not in self._held:
            self._held[name] = self._load(name)
        return self._held[name], None

    def head(self, name: str, num_bytes: int) -> NDArray[np.uint8]:
        """Return a buffer of a file's size that begins with the first `num_bytes` of the file.

        The rest are zeros and take no memory. The file is read and not mapped: an error of the disk is not a SIGBUS.
        Raises DataError if the file has another size than was sealed, or cannot be read. The content is not compared.
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
        """Read a file, and verify the very bytes that are returned."""
        path = self.path(name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise changed_data_error(path) from error
        if {"bytes": len(content), "sha256": hashlib.sha256(content[: CHECKED_MEBIBYTES * 2**20]).hexdigest()} != (
            self._files[name]
        ):
            raise changed_data_error(path)
        return content

    def gather(self, array: NDArray[Any], mapped: MappedFile, places: NDArray[np.int64] | slice) -> NDArray[Any]:
        """Return a copy of some places of a mapped array. Raises DataError if its file is cut."""
        mapped.check_size()
        try:
            found = array[places]
            return found.copy() if isinstance(places, slice) else found
        finally:  # after the read: a check that came before it would not cover it
            with self._lock:
                self._used.add(mapped)
                many = len(self._used) > _MOST_USED
            if many:
                self.check()

    def check(self) -> None:
        """Raise DataError if the content of a mapped file that was read since the last check is not what it was.

        A file whose stat is the same was not written to, and is not read.
        """
        with self._checking:  # files that another thread checks are not in `_used`: wait for its result
            with self._lock:
                used, self._used = self._used, set()
            try:
                for mapped in used:
                    mapped.check()
            except DataError:
                with self._lock:
                    self._used |= used
                raise


@contextmanager
def explain_changed_data(check: Callable[[], None]) -> Iterator[None]:
    """Raise the error of `check` in place of an error that bad data may have caused, such as an IndexError or a NaN."""
    try:
        yield
    except Exception as error:
        if isinstance(error, NumericsError) or not isinstance(error, SwitchError):
            check()
        raise


def identity_of(handle: int) -> dict[str, object]:
    """Return size and digest of an open file, as manifests hold them."""
    digest = hashlib.sha256()
    for number in range(CHECKED_MEBIBYTES):
        block = os.pread(handle, 2**20, number * 2**20)
        if not block:
            break
        digest.update(block)
    return {"bytes": os.fstat(handle).st_size, "sha256": digest.hexdigest()}


def changed_data_error(path: Path) -> DataError:
    """The error for prepared data that is not what was prepared."""
    return DataError(
        f"{path}: not what was prepared: the file was removed, cut or changed since: the same command prepares it "
        "again and goes on from the last checkpoint; a text of more than 1 GiB is prepared again by `switchcli data "
        "prepare RECIPE --check`"
    )
