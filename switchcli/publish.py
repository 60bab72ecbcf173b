"""Publish files and folders: complete or not at all, durable, and never through a link.

An output is written under a temporary name beside its target, synced, and renamed to the target. After a crash at any
moment the old output or the new one is there, and perhaps a temporary file or folder. The writer holds a lock (flock)
on what it writes, and the system releases the lock of a process that dies. The next publication of the same target
therefore removes what is left of earlier ones, and nothing that another process is still writing.

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
"""The names of temporary files and folders that are published beside their target."""
Content = str | bytes | Iterable[bytes]
"""A text, which is written as UTF-8, or bytes, whole or in parts."""
_RANDOM = "[0-9a-f]{16}"
_LOCK, _OLD = "lock", "old"
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)


# Files


def write_file(path: Path, content: Content, *, replace: bool = True) -> None:
    """Publish one file. Without `replace` raise FileExistsError where there is one.

    A replaced file hands on its permissions, and its owner may read and write the new one. A target that is a link, a
    folder or a device is refused.
    """
    remove_stale(path)
    if not replace and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    check_file(path)
    temporary, descriptor = _new_file(path.parent, _prefix(path))
    try:
        _fill(descriptor, content, path)
        temporary.rename(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        os.close(descriptor)
    _sync_folder(path.parent)


def write_files(folder: Path, contents: Mapping[str, Content]) -> None:
    """Publish several files in a folder, as `write_file`: none is renamed before all are written and synced."""
    prefix = _prefix(folder)
    remove_stale_in(folder, temporary_name_pattern(prefix))
    for name in contents:
        check_file(folder / name)
    with locked_folder(folder, prefix) as temporary:
        for name, content in contents.items():
            descriptor = os.open(temporary / name, _NEW, 0o666)
            try:
                _fill(descriptor, content, folder / name)
            finally:
                os.close(descriptor)
        for name in contents:
            (temporary / name).rename(folder / name)
    _sync_folder(folder)


def _fill(descriptor: int, content: Content, target: Path) -> None:
    """Write and sync a new file that will replace the target."""
    with suppress(OSError):  # no such target, or a file system without permissions
        os.fchmod(descriptor, target.lstat().st_mode & 0o777 | 0o600)
    with open(descriptor, "wb", closefd=False) as stream:
        parts = [content.encode()] if isinstance(content, str) else content
        stream.writelines([parts] if isinstance(parts, bytes) else parts)
    os.fsync(descriptor)


def _new_file(parent: Path, prefix: str) -> tuple[Path, int]:
    """An empty temporary file and its descriptor, which holds the lock."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(8)}"
        descriptor = os.open(path, _NEW, 0o666)
        if _hold(path, descriptor):
            return path, descriptor


# Folders


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Within: a temporary folder beside the target, to build a folder in that `publish_folder` gives the target's name.

    Leftovers of earlier publications of the target are removed first (`remove_dead`).
    """
    remove_stale(target)
    with locked_folder(target.parent, _prefix(target), target) as folder:
        yield folder


def publish_folder(built: Path, target: Path, *, replace: bool = False) -> None:
    """Sync `built`, a child of `temporary_folder(target)`, and rename it to the target.

    The target may be an empty folder. With `replace` it may be any folder: it is moved into the temporary folder first,
    from where it comes back if this process dies or fails before the new one is in place.
    """
    check_folder(target)
    for folder, _, names in os.walk(built):
        for name in names:
            _sync(Path(folder, name))
        _sync_folder(Path(folder))
    if replace and target.exists():
        target.rename(built.parent / _OLD)
    built.rename(target)
    _sync_folder(target.parent)


@contextmanager
def locked_folder(parent: Path, prefix: str, target: Path | None = None) -> Iterator[Path]:
    """Within: a new folder `parent`/`prefix`RANDOM, known to be in use by the lock on its file `lock`.

    It is removed at the end, after what it holds of the target came back, if need be.
    """
    path, descriptor = _new_folder(parent, prefix)
    try:
        yield path
    finally:
        with suppress(OSError):
            _restore(path, target)
            _remove(path)
        os.close(descriptor)
        _remove_emptied(path)


def _new_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        path = parent / f"{prefix}{secrets.token_hex(8)}"
        path.mkdir(mode=0o700)
        try:
            descriptor = os.open(path / _LOCK, _NEW, 0o600)
        except FileNotFoundError:  # another process took the folder for a leftover before it was locked
            continue
        except OSError:
            path.rmdir()
            raise
        if _hold(path / _LOCK, descriptor):
            return path, descriptor


# Leftovers


def remove_stale(target: Path) -> None:
    """Remove the temporary files and folders of publications of `target` whose process is gone.

    A folder that such a process was replacing comes back. What the system refuses to remove stays.
    """
    remove_stale_in(target.parent, temporary_name_pattern(_prefix(target)), target)


def temporary_name_pattern(prefix: str) -> re.Pattern[str]:
    """The names of temporary files and folders with this prefix."""
    return re.compile(re.escape(prefix) + _RANDOM)


def remove_stale_in(parent: Path, form: re.Pattern[str], target: Path | None = None) -> None:
    """Remove the temporary files and folders in `parent` with names of this form whose process is gone."""
    with suppress(OSError):
        for path in sorted(path for path in parent.iterdir() if form.fullmatch(path.name)):
            with suppress(OSError):
                _remove_if_dead(path, target)


def _remove_if_dead(path: Path, target: Path | None) -> None:
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return
    lock = path if stat.S_ISREG(mode) else path / _LOCK
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        path.rmdir()  # its process died before it had the lock, or after it had removed it: an empty folder
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where another process holds it
        _restore(path, target)
        _remove(path)
    finally:
        os.close(descriptor)
        _remove_emptied(path)


def _restore(folder: Path, target: Path | None) -> None:
    """Give a folder that was being replaced its name back, unless the new one is in place."""
    if target is not None and is_folder(folder / _OLD) and not os.path.lexists(target):
        (folder / _OLD).rename(target)
        _sync_folder(target.parent)


def _remove(path: Path) -> None:
    """Remove a temporary file or folder. The lock goes last: until then the folder can be known for a leftover."""
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


def _remove_emptied(path: Path) -> None:
    """Remove a temporary folder that is empty now that its lock is closed.

    NFS keeps a removed file under another name, in the same folder, as long as it is open: `_remove` cannot remove the
    folder then.
    """
    with suppress(OSError):
        if is_folder(path):
            path.rmdir()


def _prefix(target: Path) -> str:
    """How the temporary names of a target begin: of a length that any file system allows."""
    return f".tmp-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"


def _hold(path: Path, descriptor: int) -> bool:
    """Lock a new file. False, and the descriptor is closed, where it was removed as a leftover before it was locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for a process that is removing the file, not longer
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        return True  # without locks no process can take it for dead either
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
    """Raise OSError where `path` is there and not a regular file: a link, a folder, a pipe, a device."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        _check_no_link(path, mode)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.ENXIO, "is not a regular file", str(path))


def check_folder(path: Path) -> None:
    """Raise OSError where `path` is there and not a folder, or a link to one."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        _check_no_link(path, mode)
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _check_no_link(path: Path, mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "is a symbolic link, through which nothing is written", str(path))


def open_append(path: Path) -> IO[str]:
    """Open a text file to append to, made if it is not there. Anything but a regular file is refused."""
    check_file(path)
    return open(path, "a", encoding="utf-8", opener=_no_link)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # a pipe must not keep us waiting


# Syncing


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """Sync the names in a folder, on file systems that can, of folders that may be read."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
