"""Disks that fail, die or lose power at the n-th file operation of a save, for the tests of checkpoints."""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from switchcli.train.fsops import DISK, Files


class Crash(BaseException):
    """The end of the process: nothing that the code does after it reaches the disk."""


class FaultyFiles:
    """A disk, until operation number `at` (from 0): there `strike` is called, and at every one after it if `for_good`.

    A write that is struck has written half of its bytes before.
    """

    def __init__(self, at: int, strike: Callable[[], None], *, for_good: bool = True, disk: Files = DISK) -> None:
        self.count = 0
        self._disk = disk
        self._at, self._strike, self._for_good = at, strike, for_good

    @property
    def struck(self) -> bool:
        return self.count > self._at

    def _next(self) -> bool:
        self.count += 1
        return self.count == self._at + 1 or (self._for_good and self.count > self._at)

    def step(self) -> None:
        """One more operation, which need not be of a save."""
        if self._next():
            self._strike()

    def make_dir(self, path: Path) -> None:
        self.step()
        self._disk.make_dir(path)

    def write(self, path: Path, content: bytes) -> None:
        if self._next():
            if self.count == self._at + 1:
                self._disk.write(path, content[: len(content) // 2])
            self._strike()
        self._disk.write(path, content)

    def sync(self, path: Path) -> None:
        self.step()
        self._disk.sync(path)

    def rename(self, source: Path, target: Path) -> None:
        self.step()
        self._disk.rename(source, target)

    def remove_tree(self, path: Path) -> None:
        if self._next():
            for file in sorted(path.iterdir())[:1]:
                file.unlink()
            self._strike()
        self._disk.remove_tree(path)


class LossyFiles:
    """A disk with a cache: `lose_power` takes back all that was not synced."""

    def __init__(self, disk: Files = DISK) -> None:
        self._disk = disk
        self._undo: list[tuple[Path, Callable[[], object]]] = []

    def make_dir(self, path: Path) -> None:
        if not path.exists():
            self._disk.make_dir(path)
            self._undo.append((path.parent, lambda: shutil.rmtree(path)))

    def write(self, path: Path, content: bytes) -> None:
        self._disk.write(path, content)
        self._undo.append((path.parent, path.unlink))
        self._undo.append((path, lambda: os.truncate(path, path.stat().st_size // 2)))

    def sync(self, path: Path) -> None:
        self._disk.sync(path)
        self._undo = [(needs, undo) for needs, undo in self._undo if needs != path]

    def rename(self, source: Path, target: Path) -> None:
        self._disk.rename(source, target)
        self._undo.append((target.parent, lambda: target.rename(source)))

    def remove_tree(self, path: Path) -> None:
        self._disk.remove_tree(path)  # at once on the disk: the worst case

    def lose_power(self) -> None:
        for _, undo in reversed(self._undo):
            with suppress(FileNotFoundError):  # removed meanwhile
                undo()


def crash() -> None:
    raise Crash


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
