"""The file operations of a save, and nothing else: five of them, handed in as one object.

A save calls these alone to change the disk, so that a test can count them, fail them or die at any of them.
Reading is not here: it changes nothing.
"""

import os
import shutil
from pathlib import Path
from typing import Final, Protocol, final


class FileOperations(Protocol):
    """What a save may do to a disk. Every method raises OSError when the system refuses."""

    def make_dir(self, path: Path) -> None:
        """Make a folder, with its parents; one that exists is left as it is."""

    def write(self, path: Path, content: bytes | memoryview) -> None:
        """Write a file that must not exist yet."""

    def sync(self, path: Path) -> None:
        """Return once the bytes of a file, or the names in a folder, are on the disk."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename in one step, within one file system."""

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and what it holds; a link is removed, not followed."""


@final
class DiskOperations:
    """The real disk."""

    def make_dir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, content: bytes | memoryview) -> None:
        with path.open("xb") as stream:
            stream.write(content)

    def sync(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def remove_tree(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


DISK: Final[FileOperations] = DiskOperations()
