"""What a user can mend: each kind of error with its exit code.

A message is one line that says the rule, the numbers, where it was broken (file:line and key) and the way out.
`assert` is for our own mistakes; these are for a user's input, files and machines.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Final


class SwitchError(Exception):
    """A failure that the user is told about in one line, without a traceback; with several arguments, in several."""

    exit_code: int = 1
    on_every_rank: ClassVar[bool] = False
    """All ranks raise it together, so that one of them says it."""

    def __str__(self) -> str:
        return "\n".join(self.lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """Lines of the message. A line break within one came from a name or a value; it is printed as an escape."""
        return tuple(map(str, self.args))


class RenamedWarning(FutureWarning):
    """A recipe uses the name that a key or a value had in an earlier version."""


class OutOfMemory(SwitchError):
    """The device or the machine has no room for a tensor."""


class RecipeError(SwitchError):
    """A recipe, an override or an option that breaks a rule."""

    exit_code = 2


class DataError(SwitchError):
    """A corpus, a tokenizer or a text that cannot be used."""

    exit_code = 3


class CheckpointError(SwitchError):
    """A checkpoint, a lock or a disk that cannot be used."""

    exit_code = 4


class NumericsError(SwitchError):
    """NaN, infinity or divergence."""

    exit_code = 5
    on_every_rank = True

    def __init__(self, found: str, mend: str) -> None:
        """`found`: what is not finite, where, and at which step."""
        super().__init__(f"{found}: {mend}")
        self.found, self.mend = found, mend


class DistributedError(SwitchError):
    """A rank or the network between ranks."""

    exit_code = 6


class LostRankError(DistributedError):
    """Another rank is gone: which, and how, in a few words; `where` says after which step."""


class Interrupted(SwitchError):
    """Stopped by a signal after saving: the same command goes on from there."""

    exit_code = 75
    on_every_rank = True


class InterruptedByForce(SwitchError):
    """Stopped by a second Ctrl-C, without saving."""

    exit_code = 130
    on_every_rank = True


class OtherRankError(SwitchError):
    """Another rank failed, mostly the main one, and says why: the others leave with its exit code and no words."""

    on_every_rank = True

    def __init__(self, exit_code: int) -> None:
        super().__init__("another rank failed")
        self.exit_code = exit_code


class RankError(SwitchError):
    """What a rank other than the main one failed with: the main one says it for all."""

    on_every_rank = True

    def __init__(self, rank: int, exit_code: int, words: str) -> None:
        super().__init__(f"rank {rank}: {words}")
        self.exit_code = exit_code


_MEND: Final = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"),
    **dict.fromkeys((errno.ELOOP, errno.ENXIO), "remove it"),
}
_IN_THE_WAY: Final = (errno.ELOOP, errno.ENXIO)
"""A link, a pipe or a device (`publish.check_file`): the error's own path says which."""


@contextmanager
def disk_errors(
    path: Path, elsewhere: str = "give another folder by --out", bytes_needed: int | None = None
) -> Iterator[None]:
    """Within, what the disk refuses (OSError) is raised as a CheckpointError: where, why, and the ways out."""
    try:
        yield
    except OSError as error:
        room = f" ({_free_bytes(path)} bytes free)" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        if bytes_needed is not None:
            room = f" ({bytes_needed:,} bytes needed, {_free_bytes(path)} free)"
        mend = _MEND.get(error.errno or 0, "check the disk")
        where = error.filename if error.filename and error.errno in _IN_THE_WAY else path
        raise CheckpointError(f"{where}: {error.strerror or error}{room}: {mend}, or {elsewhere}") from error


_PATH_FIX: Final = {
    errno.ENAMETOOLONG: "a name has at most 255 bytes, and a path 4,095: give a shorter one",
    errno.ELOOP: "a link leads to itself: name a file or a folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder: fix the path",
    errno.EISDIR: "it is a folder, and a file is needed: name a file in it",
    errno.EACCES: "you have no right to it: change its mode, or give another path",
    errno.EPERM: "you have no right to it: change its mode, or give another path",
    errno.EROFS: "the disk is read-only: give another path",
    errno.ENXIO: "it is a pipe, a socket or a device: name a file",
}


def path_error(error: Exception) -> RecipeError | None:
    """Return the error of a path that a user named and the system refuses; None for a failure that is a defect.

    The last guard of the command line. A missing file is not among them: one that a user named has its own message.
    """
    if isinstance(error, OSError) and error.filename is not None and error.errno in _PATH_FIX:
        return RecipeError(f"{_shortened(os.fsdecode(error.filename))}: {error.strerror}: {_PATH_FIX[error.errno]}")
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from "):  # pathlib, before Python 3.13
        return RecipeError(f"{str(error).removeprefix('Symlink loop from ')}: {_PATH_FIX[errno.ELOOP]}")
    if isinstance(error, UnicodeEncodeError) and re.search("[\udc80-\udcff]", error.object[error.start : error.end]):
        before, after = error.object[: error.start].split("\n")[-1], error.object[error.start :].split("\n")[0]
        return RecipeError(
            f"{_shortened(before + after)}: a name in it is not UTF-8, and a run is saved as UTF-8: rename the file or "
            "the folder"
        )
    return None


def _shortened(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:100]}...{path[-60:]}"


OUTSIDE = "outside training"
UNKNOWN = "at a step that is not known"
"""The note of an error that cannot say it."""


def training_location(error: BaseException | None) -> str:
    """After which step of training, by a note of the error or of what it came of; or that it was outside."""
    notes = [note for one in cause_chain(error) for note in getattr(one, "__notes__", ())]
    return next((note for note in notes if note.startswith(("after step", UNKNOWN))), OUTSIDE)


def cause_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came of; an end of the chain that comes back to its beginning, too."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def machine_bytes() -> int:
    """Bytes of this machine's memory, taken or not: what OutOfMemory has to say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_bytes(path: Path) -> str:
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        return f"{shutil.disk_usage(nearest).free:,}"
    except OSError:
        return "an unknown number of bytes"
