"""An exclusive lock on a run folder, so that only one run writes to it: the file `run.lock`.

The kernel holds the lock (flock); the content of the file only says which process has it. A run that is killed by any
means therefore leaves no lock behind. The descriptor is not inherited by programs that the run starts; a child made by
fork alone shares it. With several ranks, the first takes the lock for all.
"""

import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from switchcli.errors import CheckpointError, RecipeError, disk_errors
from switchcli.system import publish

_HOLDER_TIMEOUT = 0.2
"""Seconds that a second run waits for the first to write its name into the file."""


class _Holder(NamedTuple):
    """The process that has the lock, as the file says."""

    host: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}, started {self.started}"


@contextmanager
def lock(run_folder: Path, alternative: str = "give another folder by --out") -> Iterator[None]:
    """Hold the lock of a run folder for the length of a `with` block. The folder is made if it does not exist.

    At the end, a folder in which nothing but the lock is new becomes what it was: it has no lock, or is not there.

    Raises CheckpointError, without waiting, when another run holds the lock, or when the folder cannot be written or
    locked; RecipeError when it is a file.
    `alternative` is the last fix that the message offers.
    """
    path = run_folder / "run.lock"
    resolved = run_folder.resolve()
    before = set[str]()
    with suppress(OSError):
        before = {file.name for file in run_folder.iterdir()}
    missing = [folder for folder in (resolved, *resolved.parents) if not os.path.lexists(folder)]  # the innermost first
    descriptor = _open(path, alternative)
    try:
        with disk_errors(path, alternative):
            if os.fstat(descriptor).st_nlink > 1:  # its content, which is replaced, may belong to somebody else
                raise OSError(errno.ELOOP, "is a hard link, through which nothing is written")
            _acquire(descriptor, path, alternative)
            if not _is_there(path, descriptor):
                raise CheckpointError(f"{run_folder}: removed by a start that failed just now: run the command again")
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
                others = {file.name for file in run_folder.iterdir()} - {path.name}
                if (not others or others == before) and _is_there(path, descriptor):
                    path.unlink()
                    for folder in missing:
                        folder.rmdir()
    finally:
        os.close(descriptor)


def _open(path: Path, alternative: str) -> int:
    """Return a descriptor of the lock file, which is made with its folder if it does not exist."""
    if path.parent.exists() and not path.parent.is_dir():
        raise RecipeError(f"{path.parent}: is a file, and a folder is needed: {alternative}")
    with disk_errors(path, alternative):
        publish.make_folder(path.parent.resolve())
        publish.check_file(path)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


def _is_there(path: Path, descriptor: int) -> bool:
    """Return whether `path` is still the open file. Another process may have removed it before it was locked."""
    with suppress(FileNotFoundError):
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    return False


def _acquire(descriptor: int, path: Path, alternative: str) -> None:
    """Lock the file and write this process into it. Raises CheckpointError if another descriptor has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        name = str(_read_holder(descriptor) or "its run.lock does not say which")
        raise CheckpointError(
            f"{path.parent}: in use by another run ({name}): wait for it, stop it, or {alternative}."
        ) from None
    holder = _Holder(platform.node(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder._asdict()).encode() + b"\n", 0)


def _read_holder(descriptor: int) -> _Holder | None:
    """Return the process that has the lock, which may not have written the file yet. None if the file does not say."""
    deadline = time.monotonic() + _HOLDER_TIMEOUT
    text = os.pread(descriptor, 4096, 0)
    while not text.endswith(b"\n") and time.monotonic() < deadline:
        time.sleep(0.01)
        text = os.pread(descriptor, 4096, 0)
    try:
        return _Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None
