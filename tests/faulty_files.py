"""A disk that fails at the n-th file operation of a save, for savers that are given their disk."""

from collections.abc import Callable
from pathlib import Path

from switchcli.checkpoint.fsops import DISK, FileOperations


class FaultyFiles(FileOperations):
    """A disk, until operation number `at` (from 0): there `strike` is called, and at every one after it if `for_good`.

    A write that is struck has written half of its bytes before.
    """

    def __init__(
        self, at: int, strike: Callable[[], None], *, for_good: bool = True, disk: FileOperations = DISK
    ) -> None:
        self.count = 0
        self._disk = disk
        self._at, self._strike, self._for_good = at, strike, for_good

    def _next(self) -> bool:
        self.count += 1
        return self.count == self._at + 1 or (self._for_good and self.count > self._at)

    def _step(self) -> None:
        if self._next():
            self._strike()

    def make_dir(self, path: Path) -> None:
        self._step()
        self._disk.make_dir(path)

    def write(self, path: Path, content: bytes) -> None:
        if self._next():
            if self.count == self._at + 1:
                self._disk.write(path, content[: len(content) // 2])
            self._strike()
        self._disk.write(path, content)

    def sync(self, path: Path) -> None:
        self._step()
        self._disk.sync(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        self._disk.rename(source, target)

    def remove_tree(self, path: Path) -> None:
        if self._next():
            for file in sorted(path.iterdir())[:1]:
                file.unlink()
            self._strike()
        self._disk.remove_tree(path)
