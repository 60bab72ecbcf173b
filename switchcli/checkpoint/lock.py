"""One run folder, one run: an exclusive lock on `run.lock` that says who holds it.

The kernel holds the lock (flock), the file only says by whom: a run killed by any means leaves no lock behind, whatever
the file says. The descriptor is not passed on to programs that the run starts; a child made by fork alone shares it.
With several ranks, the first takes the lock for all.
"""

import errno
import fcntl
import json
import os
import platform
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from switchcli import publish
from switchcli.errors import CheckpointError, disk_errors

_PATIENCE_SECONDS = 0.2  # how long a second run waits for the first to have written its name


@contextmanager
def lock(run_folder: Path, elsewhere: str = "give another folder by --out") -> Iterator[None]:
    """Hold the run folder, made if it is not there, for the length of a `with`; `elsewhere` is a way out for messages.

    Raises CheckpointError, at once, when another run holds it, or the folder cannot be written or locked.
    """
    path = run_folder / "run.lock"
    with disk_errors(path, elsewhere):
        run_folder.resolve().mkdir(parents=True, exist_ok=True)
        publish.check_file(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        with disk_errors(path, elsewhere):
            _check_own(descriptor)
            _take(descriptor, path, elsewhere)
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _check_own(descriptor: int) -> None:
    """Raise OSError where the file has another name too: its content, which is replaced, may be somebody's."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise OSError(errno.ELOOP, "is a hard link, through which nothing is written")


def _take(descriptor: int, path: Path, elsewhere: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise CheckpointError(
            f"{path.parent}: in use by another run ({_holder(descriptor)}): wait for it, stop it, or {elsewhere}."
        ) from None
    holder = {"host": platform.node(), "pid": os.getpid(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)


def _holder(descriptor: int) -> str:
    """Who holds the lock, in words. The holder may not have written it yet."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (text := os.pread(descriptor, 4096, 0)).endswith(b"\n") and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        holder = json.loads(text)
        return f"host {holder['host']}, process {holder['pid']}, started {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return "its run.lock does not say which"
