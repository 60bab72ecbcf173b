"""The five operations by which a save changes the disk, as one object.

A save changes the disk through this object only, so that a test can count the operations, and fail or crash at any of
them. Reading is not part of it.
"""

import shutil
from pathlib import Path
from typing import Final

from switchcli.system import publish


class FileOperations:
    """Operations of a save on the disk. Every method raises OSError when the system refuses."""

    def make_dir(self, path: Path) -> None:
        """Make a folder and its parents; nothing happens if it exists."""
        publish.make_folder(path)

    def write(self, path: Path, content: bytes | memoryview) -> None:
        """Write a file that must not exist yet."""
        with path.open("xb") as stream:
            stream.write(content)

    def sync(self, path: Path) -> None:
        """Return once the bytes of a file, or the names in a folder, are on the disk."""
        publish.sync(path)

    def rename(self, source: Path, target: Path) -> None:
        """Rename in one step, within one file system."""
        source.rename(target)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with its content; a link is removed, not followed."""
        if publish.is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink()


DISK: Final = FileOperations()
