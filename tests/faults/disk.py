"""A disk that dies, fills, breaks or loses power at the n-th file operation of this process below a folder.

    disk = Disk(folder, strike_at(3, crash))
    with disk, suppress(Crash):
        publish.write_file(folder / "page", "text")
    disk.lose_power()

Python's audit events tell of an operation before it is done, whoever does it: opening a file to write, making,
renaming, cutting and removing. Syncs are noticed in os.fsync. Native code that writes by itself is not seen, but what
it has written counts as unsynced until it is synced.
"""

import os
import shutil
import signal
import stat
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename": "rename", "os.remove": "remove", "os.rmdir": "remove", "os.mkdir": "make"}
CHANGES |= {"os.truncate": "cut", "os.link": "make", "os.symlink": "make"}


class Crash(BaseException):
    """The end of the process: nothing that the code does after it reaches the disk."""


class Operation(NamedTuple):
    """What is about to be done to a path."""

    kind: str
    """write (a file that is opened for it), make, rename, cut, remove, sync, or read."""
    path: Path
    number: int
    """Index among the operations that are counted: reads, or all others."""


class _Undo(NamedTuple):
    """How to take back what stays only once one of the folders `needs` (device, inode) is synced.

    Those of a rename are both its folders, since file systems with a journal do it in one transaction.
    """

    needs: tuple[tuple[int, int], ...]
    act: Callable[[], object]


Strike = Callable[["Disk", Operation], None]


class Disk:
    """The file operations below `root` of this process, inside a `with` block; `strike` is called before each.

    After the block `operations` has those that were counted. `lose_power` takes back all that was not synced: names of
    which the folder was not, and half the bytes of files that were not. What was removed stays so, the worst case.
    """

    def __init__(self, root: Path, strike: Strike = lambda disk, operation: None, *, reads: bool = False) -> None:
        self.operations: list[Operation] = []
        self._is_dead = False
        self._root, self._strike, self._reads = Path(os.path.realpath(root)), strike, reads
        self._lock, self._is_busy = threading.RLock(), False
        self._synced_bytes = {_inode(path): path.lstat().st_size for path in self._files()}
        self._undo: list[_Undo] = []
        self._begun: list[Callable[[], bool]] = []
        """Operations that may not be done yet; each returns whether it is, and is then noted."""
        self._folders: list[int] = []
        """Open folders, in which operations can be taken back until this disk is garbage."""
        weakref.finalize(self, _close, self._folders)
        self._kept = self._root.with_name(f"{self._root.name}.replaced-{os.getpid()}")
        """A folder of hard links to files that were replaced, for a rename that is taken back."""

    def __enter__(self) -> "Disk":
        assert _AUDIT.disk is None, "one disk at a time"
        if not _AUDIT.is_hooked:
            sys.addaudithook(_AUDIT.hook)
            _AUDIT.is_hooked = True
        self._fsync, os.fsync = os.fsync, self._sync
        _AUDIT.disk = self
        return self

    def __exit__(self, *error: object) -> None:
        _AUDIT.disk = None
        os.fsync = self._fsync
        for descriptor in Path("/proc/self/fd").iterdir():  # a dead process holds no lock
            with suppress(OSError):
                opened = descriptor.readlink()
                if error[0] is Crash and opened.is_relative_to(self._root) and stat.S_ISREG(descriptor.stat().st_mode):
                    os.close(int(descriptor.name))

    def die(self) -> NoReturn:
        """End the process, as far as the disk can tell."""
        self._is_dead = True
        raise Crash

    def lose_power(self) -> None:
        """Take back what was not synced."""
        with self._lock:
            self._is_busy = True
            self._note_what_is_done()
            for undo in reversed(self._undo):
                with suppress(FileNotFoundError):  # removed meanwhile
                    undo.act()
            for path in self._files():
                size = path.lstat().st_size
                os.truncate(path, min(size, self._synced_bytes.get(_inode(path), size // 2)))
            shutil.rmtree(self._kept, ignore_errors=True)
            self._is_busy = False

    def halve(self, path: Path) -> None:
        """Leave half of a file, as a process that is killed while it writes does."""
        if path.is_file() and _inode(path) not in self._synced_bytes:
            os.truncate(path, path.stat().st_size // 2)

    def _files(self) -> list[Path]:
        found = [path for path in self._root.rglob("*") if not path.is_symlink() and path.is_file()]
        return [self._root] if not self._root.is_dir() and self._root.is_file() else found

    def event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note and strike an operation of an audit event, if it is one below the root."""
        with self._lock:
            if self._is_busy:
                return
            kind = self._kind(event, arguments)
            if not kind:
                return
            self._is_busy = True
            try:
                folder = arguments[1] if event in ("os.remove", "os.rmdir") else arguments[2:3]
                path = _absolute(arguments[0], folder if isinstance(folder, int) else -1)
                if path is None or not path.is_relative_to(self._root) or (kind == "read" and not path.is_file()):
                    return
                self._note_what_is_done()
                self._count(kind, path)
                self._begin(kind, path, arguments)
            finally:
                self._is_busy = False

    @staticmethod
    def _kind(event: str, arguments: tuple[Any, ...]) -> str | None:
        if event != "open":
            return CHANGES.get(event)
        if isinstance(arguments[0], int):  # of a file that is open
            return None
        return "write" if arguments[2] & WRITES else "read"

    def _count(self, kind: str, path: Path) -> None:
        if self._is_dead and kind != "read":
            raise Crash
        if (kind == "read") == self._reads:
            operation = Operation(kind, path, len(self.operations))
            self.operations.append(operation)
            self._strike(self, operation)

    def _begin(self, kind: str, path: Path, arguments: tuple[Any, ...]) -> None:
        """Remember what to look for once the operation is done."""
        if kind in ("write", "make") and not os.path.lexists(path):
            parent = self._open_folder(path.parent)
            self._begun.append(lambda: os.path.lexists(path) and self._made(path, parent))
        elif kind == "write" and arguments[2] & os.O_TRUNC:
            self._synced_bytes.pop(_inode(path), None)
        elif kind == "cut" and _inode(path) in self._synced_bytes:
            self._synced_bytes[_inode(path)] = min(self._synced_bytes[_inode(path)], arguments[1])
        elif kind == "rename" and os.path.lexists(path):
            self._begin_to_rename(path, _absolute(arguments[1], arguments[3]) or path)

    def _open_folder(self, path: Path) -> int:
        self._folders.append(os.open(path, os.O_RDONLY))
        return self._folders[-1]

    def _made(self, path: Path, parent: int) -> bool:
        self._undo.append(_Undo((_inode_of(parent),), lambda: _remove(path.name, parent)))
        return True

    def _begin_to_rename(self, source: Path, target: Path) -> None:
        moved, folders = _inode(source), [self._open_folder(path.parent) for path in (source, target)]
        old: Path | None = None
        if target.is_file() and not target.is_symlink():
            self._kept.mkdir(exist_ok=True)
            old = self._kept / str(len(self.operations))
            with suppress(FileExistsError):
                os.link(target, old)

        def rename_back() -> None:
            try:
                os.rename(target.name, source.name, src_dir_fd=folders[1], dst_dir_fd=folders[0])
            except FileNotFoundError:  # the folder of the old name was removed meanwhile, and that name with it
                _remove(target.name, folders[1])
            if old is not None:
                os.link(old, target.name, dst_dir_fd=folders[1])

        def is_done() -> bool:
            if os.path.lexists(target) and _inode(target) == moved:
                self._undo.append(_Undo((_inode_of(folders[0]), _inode_of(folders[1])), rename_back))
                return True
            return False

        self._begun.append(is_done)

    def _note_what_is_done(self) -> None:
        self._begun = [is_done for is_done in self._begun if not is_done()]

    def _sync(self, descriptor: int) -> None:
        """os.fsync while this disk is in place."""
        with self._lock:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if not self._is_busy and path.is_relative_to(self._root):
                self._is_busy = True
                try:
                    self._note_what_is_done()
                    if not self._reads:
                        self._count("sync", path)
                    synced = os.fstat(descriptor)
                    self._undo = [undo for undo in self._undo if _inode_of(descriptor) not in undo.needs]
                    if stat.S_ISREG(synced.st_mode):
                        self._synced_bytes[_inode_of(descriptor)] = synced.st_size
                finally:
                    self._is_busy = False
        self._fsync(descriptor)


class _Audit:
    """The one hook of this process, which cannot be taken out again, and the disk that it tells."""

    is_hooked = False
    disk: Disk | None = None

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.disk is not None:
            self.disk.event(event, arguments)


_AUDIT = _Audit()


def _absolute(name: Any, folder: Any) -> Path | None:
    """Return the path of an audit event's argument: a name, perhaps in an open folder, or a descriptor."""
    if isinstance(name, int):
        return Path(f"/proc/self/fd/{name}").readlink()
    base = Path(f"/proc/self/fd/{folder}").readlink() if isinstance(folder, int) and folder >= 0 else Path.cwd()
    path = base / os.fsdecode(name)
    return Path(os.path.realpath(path.parent)) / path.name


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _remove(name: str, folder: int) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        shutil.rmtree(name, dir_fd=folder)


def _inode(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _inode_of(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


# Strikes


def crash(disk: Disk, operation: Operation) -> None:
    """End the process as a kill does, in a test of one process; a file that is being written has half of its bytes."""
    if operation.kind == "sync":
        disk.halve(operation.path)
    disk.die()


def kill(disk: Disk, operation: Operation) -> None:
    """Kill this process, which is a fork."""
    if operation.kind == "sync":
        disk.halve(operation.path)
    os.kill(os.getpid(), signal.SIGKILL)


def cut_power(disk: Disk, operation: Operation) -> None:
    """Lose what is not synced, and kill this process."""
    disk.lose_power()
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(number: int, *kinds: str) -> Strike:
    """Return a strike that raises OSError with this number, at operations of these kinds, or of any."""

    def strike(disk: Disk, operation: Operation) -> None:
        if not kinds or operation.kind in kinds:
            raise OSError(number, os.strerror(number), str(operation.path))

    return strike


def strike_at(at: int, strike: Strike, *, for_good: bool = True) -> Strike:
    """Return `strike` from operation `at` on, or at that one alone."""

    def struck(disk: Disk, operation: Operation) -> None:
        if operation.number == at or (for_good and operation.number > at):
            strike(disk, operation)

    return struck


def strike_path_of(at: int, strike: Strike) -> Strike:
    """Return `strike` at the path of operation `at`, then and ever after."""
    struck_paths: list[Path] = []

    def struck(disk: Disk, operation: Operation) -> None:
        if operation.number == at:
            struck_paths.append(operation.path)
        if operation.path in struck_paths:
            strike(disk, operation)

    return struck
