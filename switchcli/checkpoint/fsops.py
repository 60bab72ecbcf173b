"""The five operations by which a save changes the disk, as one object.

A save changes the disk through this interface only, so that a test can count the operations, and fail or crash at any
of them. Reading is not part of it.
"""

import shutil
from pathlib import Path
from typing import Final, Protocol, final

from switchcli.system import publish


class FileOperations(Protocol):
    """Operations of a save on the disk. Every method raises OSError when the system refuses."""

    def make_dir(self, path: Path) -> None:
        """Make a folder and its parents; nothing happens if it exists."""

    def write(self, path: Path, content: bytes | memoryview) -> None:
        """Write a file that must not exist yet."""

    def sync(self, path: Path) -> None:
        """Return once the bytes of a file, or the names in a folder, are on the disk."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename in one step, within one file system."""

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with its content; a link is removed, not followed."""


@final
class DiskOperations:
    """The real disk."""

    def make_dir(self, path: Path) -> None:
        publish.make_folder(path)

    def write(self, path: Path, content: bytes | memoryview) -> None:
        with path.open("xb") as stream:
            stream.write(content)

    def sync(self, path: Path) -> None:
        publish.sync(path)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def remove_tree(self, path: Path) -> None:
        if publish.is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink()


DISK: Final[FileOperations] = DiskOperations()
