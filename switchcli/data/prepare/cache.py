"""The cache: folders named by everything that their contents depend on.

A folder appears by a rename, whole or not at all; a damaged one is made anew; of two processes that make the same one,
the later uses the earlier's.
"""

import errno
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from switchcli import publish
from switchcli.data.prepare.store import is_complete, read_manifest
from switchcli.errors import RecipeError, disk_errors

PARTIAL = ".partial-"
ELSEWHERE = "name another folder for the cache in $SWITCHCLI_CACHE"


def default_cache() -> Path:
    """`$SWITCHCLI_CACHE`, or ~/.cache/switchcli. Where a cache lies does not change a result."""
    if given := os.environ.get("SWITCHCLI_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "switchcli"
    except RuntimeError as error:  # HOME is not set, and no database knows the user
        raise RecipeError("no home folder is known for the cache: set SWITCHCLI_CACHE, or HOME") from error


@contextmanager
def get_or_build(folder: Path, build: Callable[[Path], None]) -> Iterator[None]:
    """Have `folder` in the cache, whole: if it is not, `build` makes and seals it at the path that it is given.

    Raises:
        CheckpointError: what the disk refuses, from within too.
    """
    with disk_errors(folder.parents[1], ELSEWHERE):
        remove_stale(folder.parent)
        if not is_complete(folder):
            build_atomically(folder, build)
        yield


def build_atomically(folder: Path, build: Callable[[Path], None]) -> None:
    """Let `build` make a folder elsewhere, and give it its name. An equal folder that is there already stays instead.

    Callers `sweep` the parent before: once, and not for each of its many pieces.
    """
    with scratch_folder(folder.parent) as scratch:
        build(scratch / "built")
        _publish(scratch, folder)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Make a new folder in `parent` and remove it at the end. `sweep` removes the one that a killed process left."""
    parent.mkdir(parents=True, exist_ok=True)
    with publish.locked_folder(parent, _prefix()) as scratch:
        yield scratch


def remove_stale(folder: Path) -> None:
    """Remove the unfinished folders that killed processes of this machine left in `folder`.

    Those of other machines stay: a network file system may keep locks from them.
    """
    publish.remove_stale_in(folder, publish.temporary_name_pattern(_prefix()))


def _prefix() -> str:
    """How the names of this machine's unfinished folders begin; a host name has no plus in it."""
    return f"{PARTIAL}{platform.node()}+"


def _publish(scratch: Path, folder: Path) -> None:
    """Renames scratch/built to `folder`. Another process's stays instead; a damaged or foreign one goes to scratch."""
    try:
        publish.publish_folder(scratch / "built", folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not is_complete(folder) or _said(folder) != _said(scratch / "built"):
            folder.rename(scratch / "damaged")
            (scratch / "built").rename(folder)


def _said(folder: Path) -> dict[str, object]:
    """What a folder is of: a vocabulary that is trained twice need not be the same, byte for byte."""
    return {**(read_manifest(folder) or {}), "files": None}
