"""Publish files and folders: complete or not at all, durable, and never through a link.

An output is written under a temporary name beside its target, synced, and renamed to the target. A crash at any moment
leaves the old output or the new one, and perhaps a temporary file or folder. The writer holds a lock (flock) on its
temporary file or folder, and the system releases the lock of a process that dies. The next publication of the same
target therefore removes what dead processes left, and nothing that another process is still writing.

Temporary names are PREFIX followed by 16 random hexadecimal digits. No other name is removed, and a link is neither
followed nor removed. Every function raises OSError when the system refuses.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}-[0-9a-f]{16}")
"""Names of the temporary files and folders of any target."""
Content = str | bytes | Iterable[bytes]
"""The content of a file: text, which is written as UTF-8, or bytes, in one piece or several."""
_RANDOM = "[0-9a-f]{16}"
_LOCK, _REPLACED = "lock", "old"
"""Names in a temporary folder: its lock, and the old folder of the target while it is being replaced."""
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of flock on file systems without locks."""
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
"""Errors of fsync on a folder, where the file system cannot sync one or the user may not read it."""


# Files


def write_file(path: Path, content: Content, *, replace: bool = True) -> None:
    """Publish one file. Without `replace`, raise FileExistsError if the target exists.

    The new file gets the permissions of the file that it replaces, and its owner may always read and write it. A target
    that is a link, a folder or a device is refused.
    """
    remove_stale(path)
    if not replace and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    check_file(path)
    temporary, descriptor = _new_file(path.parent, _prefix(path))
    try:
        _write_and_sync(descriptor, content, path)
        temporary.rename(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        os.close(descriptor)
    _sync_folder(path.parent)


def write_files(folder: Path, contents: Mapping[str, Content]) -> None:
    """Publish several files in a folder, each like `write_file`. All are written and synced before one is renamed."""
    prefix = _prefix(folder)
    remove_stale_in(folder, temporary_name_pattern(prefix))
    for name in contents:
        check_file(folder / name)
    with locked_folder(folder, prefix) as temporary:
        for name, content in contents.items():
            descriptor = os.open(temporary / name, _CREATE, 0o666)
            try:
                _write_and_sync(descriptor, content, folder / name)
            finally:
                os.close(descriptor)
        for name in contents:
            (temporary / name).rename(folder / name)
        _sync_folder(folder)  # before the temporary folder goes


def _write_and_sync(descriptor: int, content: Content, target: Path) -> None:
    """Write and sync a new file, with the permissions of the target that it will replace."""
    with suppress(OSError):  # no such target, or a file system without permissions
        os.fchmod(descriptor, target.lstat().st_mode & 0o777 | 0o600)
    with open(descriptor, "wb", closefd=False) as stream:
        chunks = content.encode() if isinstance(content, str) else content
        stream.writelines([chunks] if isinstance(chunks, bytes) else chunks)
    os.fsync(descriptor)


def _new_file(parent: Path, prefix: str) -> tuple[Path, int]:
    """Return an empty temporary file and its descriptor, which holds the lock."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(8)}"
        descriptor = os.open(path, _CREATE, 0o666)
        if _lock_new_file(path, descriptor):
            return path, descriptor


# Folders


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside the target. Build a folder in it, and pass that to `publish_folder`.

    Leftovers of earlier publications of the target are removed first (`remove_stale`).
    """
    remove_stale(target)
    with locked_folder(target.parent, _prefix(target), target) as folder:
        yield folder


def publish_folder(built: Path, target: Path, *, replace: bool = False) -> None:
    """Sync `built`, a child of `temporary_folder(target)`, and rename it to the target.

    The target may be an empty folder. With `replace` it may be any folder. It is moved into the temporary folder first,
    and moved back if this process dies or fails before the new one has its name.
    """
    check_folder(target)
    for folder, _, names in os.walk(built):
        for name in names:
            sync(Path(folder, name))
        _sync_folder(Path(folder))
    if replace and target.exists():
        target.rename(built.parent / _REPLACED)
    built.rename(target)
    _sync_folder(target.parent)


@contextmanager
def locked_folder(parent: Path, prefix: str, target: Path | None = None) -> Iterator[Path]:
    """Yield a new folder `parent`/`prefix`RANDOM. The lock on its file `lock` shows other processes that it is in use.

    It is removed at the end. If it holds the old folder of a target that has no new one, that is moved back first.
    """
    path, descriptor = _new_folder(parent, prefix)
    try:
        yield path
    finally:
        with suppress(OSError):
            _restore(path, target)
            _remove(path)
        os.close(descriptor)
        _remove_if_empty(path)


def _new_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """Return a new temporary folder and the descriptor of its lock file, which holds the lock."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(8)}"
        path.mkdir(mode=0o700)
        try:
            descriptor = os.open(path / _LOCK, _CREATE, 0o600)
        except FileNotFoundError:  # another process took the folder for a leftover, as it had no lock yet
            continue
        except OSError:
            path.rmdir()
            raise
        if _lock_new_file(path / _LOCK, descriptor):
            return path, descriptor


# Leftovers


def remove_stale(target: Path) -> None:
    """Remove the temporary files and folders that dead processes left when they published `target`.

    A folder that such a process was replacing is moved back. What the system refuses to remove stays.
    """
    remove_stale_in(target.parent, temporary_name_pattern(_prefix(target)), target)


def temporary_name_pattern(prefix: str) -> re.Pattern[str]:
    """Return the pattern of the names of temporary files and folders with this prefix."""
    return re.compile(re.escape(prefix) + _RANDOM)


def remove_stale_in(parent: Path, pattern: re.Pattern[str], target: Path | None = None) -> None:
    """Remove the temporary files and folders of dead processes in `parent` whose names match `pattern`."""
    with suppress(OSError):
        for path in sorted(path for path in parent.iterdir() if pattern.fullmatch(path.name)):
            with suppress(OSError):
                _remove_if_stale(path, target)


def _remove_if_stale(path: Path, target: Path | None) -> None:
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return
    lock = path if stat.S_ISREG(mode) else path / _LOCK
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        path.rmdir()  # empty: its process died before it made the lock, or after it had removed it
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if another process holds it
        _restore(path, target)
        _remove(path)
    finally:
        os.close(descriptor)
        _remove_if_empty(path)


def _restore(folder: Path, target: Path | None) -> None:
    """Move a folder that was being replaced back to the target, unless the new one is there."""
    if target is not None and is_folder(folder / _REPLACED) and not os.path.lexists(target):
        (folder / _REPLACED).rename(target)
        _sync_folder(target.parent)


def _remove(path: Path) -> None:
    """Remove a temporary file or folder. The lock goes last: until then another process sees that it is a leftover."""
    if not is_folder(path):
        path.unlink()
        return
    for child in sorted(path.iterdir()):
        if is_folder(child):
            shutil.rmtree(child)
        elif child.name != _LOCK:
            child.unlink()
    (path / _LOCK).unlink(missing_ok=True)
    path.rmdir()


def _remove_if_empty(path: Path) -> None:
    """Remove a temporary folder that is empty now that its lock is closed.

    NFS keeps a removed file under another name in the same folder as long as it is open: until then `_remove` cannot
    remove the folder.
    """
    with suppress(OSError):
        if is_folder(path):
            path.rmdir()


def _prefix(target: Path) -> str:
    """Return the start of the temporary names of a target, of a length that any file system allows."""
    return f".tmp-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"


def _lock_new_file(path: Path, descriptor: int) -> bool:
    """Lock a new file. Return False, with the descriptor closed, if it was removed as a leftover before the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits only for a process that is removing the file
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        return True  # without locks no process can take it for a leftover either
    with suppress(FileNotFoundError):
        if os.path.samestat(path.lstat(), os.fstat(descriptor)):
            return True
    os.close(descriptor)
    return False


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


def open_append(path: Path) -> IO[str]:
    """Open a text file to append to, and make it if it does not exist. Anything but a regular file is refused."""
    check_file(path)
    return open(path, "a", encoding="utf-8", opener=open_without_links)


def open_without_links(path: str, flags: int) -> int:
    """Open a file for `open(opener=...)`: raise OSError for a link, and do not wait for the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


# Syncing


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
