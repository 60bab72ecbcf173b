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
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from switchcli.errors import CheckpointError, RecipeError, disk_errors
from switchcli.system import publish

_HOLDER_TIMEOUT = 0.2
"""Seconds that a second run waits for the first to write its name into the file."""
_WAIT = 0.2
"""Seconds between two attempts to get a lock that is waited for."""


@contextmanager
def lock(
    run_folder: Path,
    alternative: str = "give another folder by --out",
    on_wait: Callable[[str], None] | None = None,
) -> Iterator[bool]:
    """Hold the lock of a folder for the length of a `with` block, and yield whether another process had it before.

    The folder is made if it does not exist. At the end, one in which nothing but the lock is new becomes what it was:
    it has no lock, or is not there.

    Args:
        run_folder: the folder.
        alternative: the last fix that a message offers.
        on_wait: called once with who has the lock, before waiting for it. None: the lock is not waited for.

    Raises:
        CheckpointError: another process has the lock, or the folder cannot be written or locked.
        RecipeError: it is a file.
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
            _check_not_hard_link(descriptor)
            has_waited = False
            while not _acquire(descriptor):
                if on_wait is None:
                    raise CheckpointError(
                        f"{run_folder}: in use by another run ({_holder(descriptor)}): wait for it, stop it, or "
                        f"{alternative}."
                    )
                if not has_waited:
                    on_wait(_holder(descriptor))
                has_waited = True
                time.sleep(_WAIT)
            if not _is_there(path, descriptor):
                raise CheckpointError(f"{run_folder}: removed by a start that failed just now: run the command again")
        try:
            yield has_waited
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


def _check_not_hard_link(descriptor: int) -> None:
    """Raise OSError if the file has a second name: its content, which is replaced, may belong to somebody else."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise OSError(errno.ELOOP, "is a hard link, through which nothing is written")


def _acquire(descriptor: int) -> bool:
    """Lock the file and write this process into it. Return False if another process has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    holder = {"host": platform.node(), "pid": os.getpid(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
    return True


def _holder(descriptor: int) -> str:
    """Return a description of the process that has the lock, which may not have written the file yet."""
    deadline = time.monotonic() + _HOLDER_TIMEOUT
    text = os.pread(descriptor, 4096, 0)
    while not text.endswith(b"\n") and time.monotonic() < deadline:
        time.sleep(0.01)
        text = os.pread(descriptor, 4096, 0)
    try:
        holder = json.loads(text)
        return f"host {holder['host']}, process {holder['pid']}, started {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return "its run.lock does not say which"
