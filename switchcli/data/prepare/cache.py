"""Cache of prepared data: each folder is named by a digest of everything that its contents depend on.

A folder is built under a temporary name and appears, complete, by a rename. A damaged folder is built again. When two
processes build the same folder, the second one to finish uses the first one's.
"""

import errno
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from switchcli.data.prepare.prepared_text import SPLITS
from switchcli.data.prepare.store import is_complete, read_manifest
from switchcli.data.tokenizer.tokenizer import Tokenizer, Wait
from switchcli.errors import RecipeError, disk_errors
from switchcli.system import publish

ELSEWHERE = "set $SWITCHCLI_CACHE to another folder"
"""The alternative fix in messages about a disk that refuses to hold the cache."""
T = TypeVar("T")


class Track(Protocol):
    """A progress bar: yields the items and shows how many were yielded, and out of `total` if that is known."""

    def __call__(self, items: Iterable[T], label: str, total: int | None, /) -> Iterator[T]: ...


ShowTokens = Callable[[int, int], None]
"""Called with the numbers of complete source shards and of tokens written so far."""
ShowProgress = Callable[[str, int], AbstractContextManager[ShowTokens]]
"""Opens a progress display with a label, for a number of source shards."""


class PrepareContext(NamedTuple):
    """Settings that do not change what is prepared: any context gives the same ids."""

    cache: Path
    track: Track
    show: ShowProgress
    processes: int | None = None
    """Number of processes; None: one for each processor, or a single one if the text is small."""
    check: bool = False
    """Whether to compare all data in the cache with its digests, whatever was compared before."""
    warn: Callable[[str], None] = lambda text: None
    """Called with one line about each damaged folder."""
    wait: Wait = nullcontext
    """Shows that work goes on which tells no progress, such as training a vocabulary."""
    accept: Callable[[Tokenizer], None] = lambda tokenizer: None
    """Raises an error if the run cannot use a tokenizer. It is called before any text is tokenized."""
    needed: Collection[str] = SPLITS
    """The splits that may not be empty. An evaluation needs no text to train on."""


def default_cache() -> Path:
    """Return `$SWITCHCLI_CACHE`, or ~/.cache/switchcli. The location of the cache does not change any result."""
    try:
        return Path(os.environ.get("SWITCHCLI_CACHE") or "~/.cache/switchcli").expanduser()
    except RuntimeError as error:  # HOME is not set, and the user database has no home folder
        raise RecipeError("the cache needs a folder, and your home is unknown: set SWITCHCLI_CACHE or HOME") from error


@contextmanager
def get_or_build(folder: Path, build: Callable[[Path], None]) -> Iterator[None]:
    """Make sure that the cache holds a complete `folder` while the body of the `with` statement runs.

    If the folder is missing or damaged, `build` creates it, manifest included, at the path that it is called with.

    Raises:
        CheckpointError: the disk refuses something, here or in the body.
    """
    # A folder of the cache is CACHE/KIND/DIGEST, so parents[1] is the cache itself.
    with disk_errors(folder.parents[1], ELSEWHERE):
        publish.remove_stale_in(folder.parent)
        if not is_complete(folder, check=True):
            build_atomically(folder, build)
        yield


def build_atomically(folder: Path, build: Callable[[Path], None], parent: Path | None = None) -> None:
    """Let `build` create a folder under a temporary name in `parent`, or beside `folder`; then rename it to `folder`.

    If a complete folder with the same contents exists by then, it stays. Callers run `publish.remove_stale_in` on the
    parent beforehand: once, and not for each folder in it.
    """
    with scratch_folder(parent or folder.parent) as scratch:
        build(scratch / "built")
        _publish(scratch, folder)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Create a new folder in `parent` and remove it at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    with publish.temporary_folder(parent / "built") as scratch:
        yield scratch


def is_usable(folder: Path, context: PrepareContext) -> bool:
    """Return whether a folder is complete. Warn if it is damaged: if its files do not match its manifest."""
    if is_complete(folder, check=context.check):
        return True
    if read_manifest(folder) is not None:
        context.warn(f"{folder}: a file is missing, or has changed since it was prepared: it is prepared again")
    return False


def _publish(scratch: Path, folder: Path) -> None:
    """Rename scratch/built to `folder`, unless another process has published the same contents there.

    A damaged folder, or one with other contents, is replaced.
    """
    built = scratch / "built"
    try:
        publish.publish_folder(built, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not is_complete(folder, check=True) or _facts(folder) != _facts(built):
            folder.rename(scratch / "replaced")
            built.rename(folder)


def _facts(folder: Path) -> dict[str, object]:
    """Return a folder's manifest without file digests: training a vocabulary twice may not give the same bytes."""
    return {**(read_manifest(folder) or {}), "files": None}
