"""Publish files and folders: complete or not at all, durable, and never through a link.

An output is written under a temporary name beside its target, synced, and renamed to the target. A crash at any moment
leaves the old output or the new one, and perhaps a temporary file or folder. The next publication of the same target
removes it once nothing in it has changed for a day: before, another process may be writing it. The next holder of the
lock of a run removes it at once.

A temporary name is `.tmp-`, a digest of the name of its target, and 16 random hexadecimal digits. No other name is
removed, and a link is neither followed nor removed. Every function raises OSError when the system refuses.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Final

TEMPORARY: Final = re.compile(r"\.tmp-[0-9a-f]{16}-[0-9a-f]{16}")
"""Names of the temporary files and folders of any target."""
DAY: Final = 86_400
"""Seconds after which a temporary file or folder is a leftover."""
Content = str | bytes | memoryview | Iterable[bytes]
"""The content of a file: text, which is written as UTF-8, or bytes, in one piece or several."""
_REPLACED = "old"
"""Name of the folder in a temporary folder that holds the old folder of the target while that is being replaced."""
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
"""Errors of fsync on a folder, where the file system cannot sync one or the user may not read it."""


# Files


def write_file(path: Path, content: Content, *, replace: bool = True) -> None:
    """Publish one file. Without `replace`, raise FileExistsError if the target exists.

    The new file gets the permissions of the file that it replaces, and its owner may always read and write it. A target
    that is a link, a folder or a device is refused.
    """
    if not replace and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    write_files(path.parent, {path.name: content})


def write_files(folder: Path, contents: Mapping[str, Content]) -> None:
    """Publish several files in a folder, each like `write_file`. All are written and synced before one is renamed."""
    temporary = {folder / name: temporary_path(folder / name) for name in contents}
    for target in temporary:
        remove_stale(target)
        check_file(target)
    try:
        for content, (target, path) in zip(contents.values(), temporary.items(), strict=True):
            write_new(path, content, target)
        for target, path in temporary.items():
            path.rename(target)
    finally:
        for path in temporary.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)
    _sync_folder(folder)


def write_new(path: Path, content: Content, target: Path | None = None) -> None:
    """Write and sync a file that must not exist yet, with the permissions of the `target` that it will replace."""
    with os.fdopen(os.open(path, _CREATE, 0o666), "wb") as stream:
        if target is not None:
            with suppress(OSError):  # no such target, or a file system without permissions
                os.fchmod(stream.fileno(), target.lstat().st_mode & 0o777 | 0o600)
        chunks = content.encode() if isinstance(content, str) else content
        stream.writelines([chunks] if isinstance(chunks, bytes | memoryview) else chunks)
        stream.flush()
        os.fsync(stream.fileno())


# Folders


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside the target. Build a folder in it, and pass that to `publish_folder`.

    It is removed at the end, as `remove_temporary` does.
    """
    remove_stale(target)
    folder = temporary_path(target)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        remove_temporary(folder)


def temporary_path(target: Path, unique: str = "") -> Path:
    """Return a temporary path beside the target: the one with 16 hexadecimal digits `unique`, or a new one."""
    return target.parent / f"{_prefix(target)}{unique or secrets.token_hex(8)}"


def remove_temporary(folder: Path) -> None:
    """Remove a temporary folder if the system allows it.

    If it holds the old folder of a target that has no new one, that is moved back first.
    """
    with suppress(OSError):
        _restore(folder)
        shutil.rmtree(folder)


def publish_folder(built: Path, target: Path, *, replace: bool = False) -> None:
    """Sync `built`, a child of `temporary_folder(target)`, and rename it to the target.

    The target may be an empty folder. With `replace` it may be any folder, see `replace_folder`.
    """
    check_folder(target)
    for folder, _, names in os.walk(built):
        for name in names:
            sync(Path(folder, name))
        _sync_folder(Path(folder))
    if replace:
        replace_folder(built, target)
    else:
        built.rename(target)
        _sync_folder(target.parent)


def replace_folder(built: Path, target: Path) -> None:
    """Rename `built`, a synced child of a temporary folder of the target, to the target.

    A folder of that name is moved into the temporary folder first. It is moved back if this process fails before the
    new one has its name; if it dies, by the next removal of leftovers. It is removed with the temporary folder.
    """
    if target.exists():
        (built.parent / _REPLACED).mkdir()
        target.rename(built.parent / _REPLACED / target.name)
    built.rename(target)
    _sync_folder(target.parent)


# Leftovers


def remove_stale(target: Path, age: float = DAY) -> None:
    """Remove temporary files and folders of `target` that have not changed for `age` seconds.

    Who holds a lock that all writers of the target take may pass 0.
    """
    remove_stale_in(target.parent, re.compile(re.escape(_prefix(target)) + "[0-9a-f]{16}"), age)


def remove_stale_in(parent: Path, pattern: re.Pattern[str] = TEMPORARY, age: float = DAY) -> None:
    """Remove the temporary files and folders in `parent` whose names match and that have not changed for `age` seconds.

    A folder that a dead process was replacing is moved back first. What the system refuses to remove stays.
    """
    with suppress(OSError):
        for path in sorted(path for path in parent.iterdir() if pattern.fullmatch(path.name)):
            with suppress(OSError):
                found = path.lstat()
                is_stale = time.time() - _last_change(path) >= age  # before a restored folder changes it
                if stat.S_ISDIR(found.st_mode):
                    _restore(path)
                if not is_stale:
                    continue
                if stat.S_ISDIR(found.st_mode):
                    shutil.rmtree(path)
                elif stat.S_ISREG(found.st_mode):
                    path.unlink()


def _last_change(path: Path) -> float:
    """Return when a temporary file, or anything in a temporary folder, was last changed: a build may take days."""
    changes = [path.lstat().st_mtime]
    for folder, folders, files in os.walk(path):
        changes += [Path(folder, name).lstat().st_mtime for name in (*folders, *files)]
    return max(changes)


def _restore(folder: Path) -> None:
    """Move the old folder of a target back from a temporary folder, unless the new one is there.

    The name that it then has, or the new folder has, is on the disk before the temporary folder may be removed.
    """
    if is_folder(folder / _REPLACED):
        for old in (folder / _REPLACED).iterdir():
            target = folder.parent / old.name
            if not os.path.lexists(target):
                old.rename(target)
            with suppress(OSError):  # a full disk may refuse it, and needs the room of the temporary folder
                _sync_folder(target.parent)


def _prefix(target: Path) -> str:
    """Return the start of the temporary names of a target, of a length that any file system allows."""
    return f".tmp-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"


# Links


def is_folder(path: Path) -> bool:
    """Return whether there is a folder at `path`, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def check_file(path: Path) -> None:
    """Raise OSError if `path` exists and is not a regular file: a link, a folder, a pipe, a device."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        _check_no_link(path, mode)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.ENXIO, "is not a regular file", str(path))


def check_folder(path: Path) -> None:
    """Raise OSError if `path` exists and is not a folder; a link to one is refused too."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        _check_no_link(path, mode)
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _check_no_link(path: Path, mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "is a symbolic link, through which nothing is written", str(path))


def archive_name(folder: Path) -> Path:
    """Return the path to which a folder is renamed that another one replaces: `run.before-1`."""
    return free_name(folder.with_name(f"{folder.name}.before"))


def replaced_by(archived: str) -> str:
    """Return the path of the folder that replaced the one at `archived`, or `archived` if that is no `archive_name`."""
    return re.sub(r"\.before-\d+\Z", "", archived)


def free_name(path: Path) -> Path:
    """Return `path` with the first number after it that makes a name which nothing has: `metrics.jsonl.damaged-1`."""
    names = (path.with_name(f"{path.name}-{number}") for number in count(1))
    return next(name for name in names if not os.path.lexists(name))


def open_append(path: Path) -> IO[str]:
    """Open a text file to append to, and make it if it does not exist. Anything but a regular file is refused."""
    check_file(path)
    return open(path, "a", encoding="utf-8", opener=open_without_links)


def open_without_links(path: str, flags: int) -> int:
    """Open a file for `open(opener=...)`: raise OSError for a link, and do not wait for the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


# Single operations


def sync(path: Path) -> None:
    """Return once the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, if they do not exist, and sync the names of those that are new."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync_folder(folder.parent)


def _sync_folder(path: Path) -> None:
    """Sync the names in a folder, if the file system can and the user may read the folder."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
