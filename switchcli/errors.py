"""Errors that a user can fix, each kind with its exit code.

A message is one line: the rule, the numbers, the location of the violation (file:line and key) and the fix.
`assert` is for bugs of this package; these errors are for a user's input, files and machines.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final


class SwitchError(Exception):
    """A failure that is reported in one line per argument, without a traceback."""

    exit_code: int = 1
    on_every_rank: ClassVar[bool] = False
    """Whether all ranks raise this error together, so that only one of them reports it."""
    result: Mapping[str, Any] = MappingProxyType({})
    """What the command did before, which `--json` prints beside the error."""

    def __str__(self) -> str:
        return "\n".join(self.lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """Lines of the message. A line break within one came from a name or a value; it is printed as an escape."""
        return tuple(map(str, self.args))


class OutOfMemory(SwitchError):
    """The device or the machine has no memory left for a tensor."""


class RecipeError(SwitchError):
    """A recipe, an override or an option breaks a rule."""

    exit_code = 2


class DataError(SwitchError):
    """A corpus, a tokenizer or a text cannot be used."""

    exit_code = 3


class CheckpointError(SwitchError):
    """A checkpoint, a lock or a disk cannot be used."""

    exit_code = 4


class NumericsError(SwitchError):
    """A value is NaN or infinite, or training diverged."""

    exit_code = 5
    on_every_rank = True

    def __init__(self, problem: str, fix: str) -> None:
        """`problem` says which value is not finite, where, and at which step."""
        super().__init__(f"{problem}: {fix}")
        self.problem, self.fix = problem, fix


class SavedNumericsError(NumericsError):
    """A value in the file of a checkpoint is NaN or infinite. A rank that does not read the value does not fail."""

    on_every_rank = False


class DistributedError(SwitchError):
    """A rank or the network between ranks failed."""

    exit_code = 6


class LostRankError(DistributedError):
    """Another rank is gone. A note says after which step."""


class Interrupted(SwitchError):
    """A signal stopped the command; finished work is saved or repeated exactly, and the same command resumes it."""

    exit_code = 75
    on_every_rank = True


class InterruptedByForce(SwitchError):
    """A stop that saved nothing: Ctrl-C after an earlier signal, or a signal to a command without partial results."""

    exit_code = 130
    on_every_rank = True


class OtherRankError(SwitchError):
    """Another rank, usually the main one, failed and reports why; this rank exits silently with the same code."""

    on_every_rank = True

    def __init__(self, exit_code: int) -> None:
        super().__init__("another rank failed")
        self.exit_code = exit_code


class RankError(SwitchError):
    """A failure of a rank other than the main one, reported by the main rank."""

    on_every_rank = True

    def __init__(self, rank: int, exit_code: int, message: str) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.exit_code = exit_code


_DISK_FIX: Final = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"),
    **dict.fromkeys((errno.ELOOP, errno.ENXIO), "remove it"),
    errno.ENOTEMPTY: "another command has written there: use what it wrote",
}
_FEW_INODES: Final = 64
"""More than the files of a checkpoint or a run that are written together."""
_SOME_BYTES: Final = 2**20
"""Free bytes from which on a disk is not full."""
_OCCUPIED: Final = (errno.ELOOP, errno.ENXIO)
"""A link, a pipe or a device has the name of an output (`publish.check_file`); the error's own path says which."""


@contextmanager
def disk_errors(
    path: Path, alternative: str = "give another folder by --out", bytes_needed: int | None = None
) -> Iterator[None]:
    """Raise an OSError of the `with` block as a CheckpointError that says where, why, and how to fix it.

    `alternative` is the second fix that the message offers. With `bytes_needed` the message compares it with the free
    space, whatever the disk refuses: some report a full disk as another error.
    """
    try:
        yield
    except OSError as error:
        space, fix = "", _DISK_FIX.get(error.errno or 0, "check the disk")
        if error.errno == errno.ENOSPC and _lacks_inodes(path, bytes_needed or _SOME_BYTES):
            space, fix = f": no inodes are left for new files ({_free_bytes(path)} bytes free)", "remove some files"
        elif bytes_needed is not None and error.errno != errno.ENOTEMPTY:
            space = f" ({bytes_needed:,} bytes needed, {_free_bytes(path)} free)"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            space = f" ({_free_bytes(path)} bytes free)"
        location = error.filename if error.filename and error.errno in _OCCUPIED else path
        raise CheckpointError(f"{location}: {error.strerror or error}{space}: {fix}, or {alternative}") from error


_NO_PERMISSION: Final = "you have no permission: change its mode, or give another path"
_PATH_FIX: Final = {
    errno.ENAMETOOLONG: "a name has at most 255 bytes, and a path 4,095: give a shorter one",
    errno.ELOOP: "a link leads to itself: name a file or a folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder: fix the path",
    errno.EISDIR: "it is a folder, and a file is needed: name a file in it",
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EROFS: "the disk is read-only: give another path",
    errno.ENXIO: "it is a pipe, a socket or a device: name a file",
}


def path_error(error: Exception) -> RecipeError | None:
    """Return the RecipeError for a user's path that the system refuses, or None if `error` is a bug.

    The command line calls this for every unexpected exception. A missing file is not covered: where a user names one,
    the code that opens it has a message of its own.
    """
    if isinstance(error, OSError) and error.filename is not None and error.errno in _PATH_FIX:
        return RecipeError(f"{_shorten(os.fsdecode(error.filename))}: {error.strerror}: {_PATH_FIX[error.errno]}")
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from "):  # pathlib, before Python 3.13
        return RecipeError(f"{str(error).removeprefix('Symlink loop from ')}: {_PATH_FIX[errno.ELOOP]}")
    # Python decodes the bytes of a file name that are not UTF-8 to these surrogates, which cannot be encoded again.
    if isinstance(error, UnicodeEncodeError) and re.search("[\udc80-\udcff]", error.object[error.start : error.end]):
        # The name is the line around the surrogate: error.object may be a whole document.
        before, after = error.object[: error.start].split("\n")[-1], error.object[error.start :].split("\n")[0]
        return RecipeError(
            f"{_shorten(before + after)}: a name in it is not UTF-8, and a run is saved as UTF-8: rename the file or "
            "the folder"
        )
    return None


_NO_MEMORY: Final = re.compile(
    "failed to map segment(?!.*(not permitted|denied))|can(not|'t) allocate memory|can't start new thread|bad_alloc",
    re.IGNORECASE,
)
"""Messages of libraries that the system refused memory, as under `ulimit -v`. A noexec mount is "not permitted"."""


def memory_error(error: Exception) -> OutOfMemory | None:
    """Return an OutOfMemory error if the system refused memory, as one of the causes of `error` says; else None.

    The command line calls this for every unexpected exception.
    """
    for cause in cause_chain(error):
        is_refused = isinstance(cause, ImportError | OSError | RuntimeError) and _NO_MEMORY.search(str(cause))
        if isinstance(cause, MemoryError) or is_refused:
            reason = (str(cause) or "MemoryError").strip().splitlines()[-1]
            return OutOfMemory(
                f"out of memory ({reason}): raise the limit of this process (`ulimit -v`, or a container's), or end "
                "other programs"
            )
    return None


def _shorten(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:100]}...{path[-60:]}"


OUTSIDE = "outside training"
"""The location of an error that was raised outside training."""


def training_location(error: BaseException | None) -> str:
    """Return where in training an error was raised: "after step N" or `OUTSIDE`.

    The location is a note (PEP 678) of the error or of one of its causes.
    """
    notes = [note for cause in cause_chain(error) for note in getattr(cause, "__notes__", ())]
    return next((note for note in notes if note.startswith("after step")), OUTSIDE)


def cause_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on. A circular chain ends before it repeats."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def machine_bytes() -> int:
    """Return the bytes of this machine's memory, in use or free. Messages of `OutOfMemory` state it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_bytes(path: Path) -> str:
    """Return the free bytes of the disk that holds `path`, which need not exist, as text."""
    try:
        return f"{shutil.disk_usage(_existing(path)).free:,}"
    except OSError:
        return "an unknown number of bytes"


def _lacks_inodes(path: Path, bytes_needed: int) -> bool:
    """Return whether the disk that holds `path` has the bytes but no inodes for new files.

    A few inodes are free again where what was begun has been removed. btrfs counts none.
    """
    try:
        disk = os.statvfs(_existing(path))
    except OSError:
        return False
    return disk.f_files > 0 and disk.f_favail < _FEW_INODES and disk.f_bavail * disk.f_frsize >= bytes_needed


def _existing(path: Path) -> Path:
    """Return the path itself or the nearest folder above that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
