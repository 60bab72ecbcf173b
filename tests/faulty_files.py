"""Disks that fail, die or lose power at the n-th file operation of a save, for the tests of checkpoints."""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from switchcli.checkpoint.fsops import DISK, FileOperations


class Crash(BaseException):
    """The end of the process: nothing that the code does after it reaches the disk."""


class FaultyFiles:
    """A disk, until operation number `at` (from 0): there `strike` is called, and at every one after it if `for_good`.

    A write that is struck has written half of its bytes before.
    """

    def __init__(
        self, at: int, strike: Callable[[], None], *, for_good: bool = True, disk: FileOperations = DISK
    ) -> None:
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


class Undo(NamedTuple):
    """How to take back what stays only once `needs` is synced; by a descriptor, which a rename does not change."""

    needs: Path
    act: Callable[[], object]
    descriptor: int


class LossyFiles:
    """A disk with a cache: `lose_power` takes back all that was not synced."""

    def __init__(self, disk: FileOperations = DISK) -> None:
        self._disk = disk
        self._undo: list[Undo] = []

    def _note(self, needs: Path, act: Callable[[int], object]) -> None:
        descriptor = os.open(needs, os.O_RDONLY if needs.is_dir() else os.O_WRONLY)
        self._undo.append(Undo(needs, lambda: act(descriptor), descriptor))

    def make_dir(self, path: Path) -> None:
        if not path.exists():
            self._disk.make_dir(path)
            self._note(path.parent, lambda _: shutil.rmtree(path))

    def write(self, path: Path, content: bytes) -> None:
        self._disk.write(path, content)
        self._note(path.parent, lambda folder: os.unlink(path.name, dir_fd=folder))
        self._note(path, lambda file: os.truncate(file, len(content) // 2))

    def sync(self, path: Path) -> None:
        self._disk.sync(path)
        for undo in self._undo:
            if undo.needs == path:
                os.close(undo.descriptor)
        self._undo = [undo for undo in self._undo if undo.needs != path]

    def rename(self, source: Path, target: Path) -> None:
        self._disk.rename(source, target)
        self._note(target.parent, lambda _: target.rename(source))

    def remove_tree(self, path: Path) -> None:
        self._disk.remove_tree(path)  # at once on the disk: the worst case

    def lose_power(self) -> None:
        for undo in reversed(self._undo):
            with suppress(FileNotFoundError):  # removed meanwhile
                undo.act()
            os.close(undo.descriptor)
        self._undo = []


def crash() -> None:
    raise Crash


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
