"""Open files that come from outside: that a user names, or that lie in a folder of someone else.

Only regular files are opened: a pipe or a device could block forever.
"""

import errno
import io
import os
import stat
from pathlib import Path, PurePosixPath

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def other_kind(mode: int) -> str:
    """Return what a file of this mode is instead of a regular one, such as "a pipe"; "" for a regular file."""
    kind = stat.S_IFMT(mode)
    return "" if kind == stat.S_IFREG else _KINDS.get(kind, "a special file")


def open_regular(
    path: Path, buffer_bytes: int = io.DEFAULT_BUFFER_SIZE, *, follow_links: bool = True
) -> "io.BufferedReader[io.FileIO]":
    """Open a regular file for reading bytes; a link to one too, unless `follow_links` is false.

    Raises OSError for anything else, with a `strerror` that says what it is and what to do. Never blocks.
    """
    mode = path.stat(follow_symlinks=follow_links).st_mode
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "it is a link, not a file; replace it by the file", str(path))
    _check_regular(mode, path)
    # Another process may have replaced the file since: do not wait for the writer of a pipe (O_NONBLOCK), and check the
    # file that was opened.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    file = io.BufferedReader(io.FileIO(descriptor), buffer_bytes)
    try:
        _check_regular(os.fstat(file.fileno()).st_mode, path)
    except OSError:
        file.close()
        raise
    return file


def expand_home(path: str) -> str:
    """Return `path` with a leading `~` or `~user` replaced by the home folder. Raises ValueError if it is not known.

    A shell leaves the `~` of `--out=~/runs` to the program, and a recipe has no shell.
    """
    if not path.startswith("~"):  # as a Path, a URL would lose a slash
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:  # no such user, or no HOME
        raise ValueError(f"the home folder of {path.partition('/')[0]} is not known: give another path") from error


def is_within_folder(name: str) -> bool:
    """Return whether a path that a file of a folder names stays in this folder: it is relative, without `..` or `:`.

    A name with a colon may be a URL: fsspec opens `file:/x`, `local:/x` and `zip://x::/y`.
    Links in the folder are followed: in the hub's cache all files are links to the `blobs` beside the folder.
    """
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and ":" not in name


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file. Raises OSError like `open_regular`, and for more than `max_bytes` bytes."""
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", str(path))
    return data


def to_utf8(data: bytes) -> str:
    """Return the command that converts a file that begins with `data`, which is not UTF-8: from UTF-16 or Latin-1."""
    is_utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data
    return f"`iconv -f {'utf-16' if is_utf_16 else 'latin1'} -t utf-8`"


def _check_regular(mode: int, path: Path) -> None:
    """Raise OSError if `mode` is not that of a regular file."""
    kind = other_kind(mode)
    if kind == "a folder":
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if kind:
        raise OSError(errno.EINVAL, f"it is {kind}, not a file; save its content to a file", str(path))
