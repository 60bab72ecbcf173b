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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from switchcli.errors import CheckpointError, RecipeError, disk_errors
from switchcli.system import publish


@contextmanager
def lock(run_folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder for the length of a `with` block. The folder is made if it does not exist.

    Raises CheckpointError, without waiting, when another run holds the lock, or when the folder cannot be written or
    locked; RecipeError when it is a file.
    """
    path = run_folder / "run.lock"
    if run_folder.exists() and not run_folder.is_dir():
        raise RecipeError(f"{run_folder}: is a file, and a folder is needed: give another folder by --out")
    with disk_errors(path):
        publish.make_folder(run_folder.resolve())
        publish.check_file(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        with disk_errors(path):
            if os.fstat(descriptor).st_nlink > 1:  # its content, which is replaced, may belong to somebody else
                raise OSError(errno.ELOOP, "is a hard link, through which nothing is written")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise CheckpointError(
                    f"{run_folder}: in use by another run ({_holder(descriptor)}): wait for it or stop it, "
                    "then give the same command again; or give another folder by --out"
                ) from None
            started = datetime.now(UTC).isoformat(timespec="seconds")
            holder = {"host": platform.node(), "pid": os.getpid(), "started": started}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """Return which process has the lock, as the file says."""
    try:
        return "host {host}, process {pid}, started {started}".format_map(json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, KeyError, TypeError):  # the process has not written it yet
        return "its run.lock does not say which"
