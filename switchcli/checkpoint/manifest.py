"""MANIFEST: the files of a checkpoint folder with their sizes and SHA-256, and a SHA-256 of that list itself.

    {"files":[{"bytes":...,"name":...,"sha256":...},...],"format":"switchcli checkpoint 1","step":1000}
    <SHA-256 of the line above>

A file is read only if the manifest lists it by a plain name, and it is a regular file of the folder: no link, no `../`.
The digests guard against accidents, not against a hostile author. Only JSON and safetensors are read therefore, and
their readers check them again.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field

from switchcli.errors import CheckpointError
from switchcli.spec import Spec
from switchcli.system.user_files import open_regular

NAME: Final = "MANIFEST"
_FORMAT: Final = "switchcli checkpoint 1"
"""Change this only if older code would misread the files."""
_MAX_BYTES: Final = 1 << 28
_DAMAGE: Final = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.EIO)
"""Errors of `open_regular` that mean damage. All others (permission, descriptors, memory) concern the machine."""


class DamagedError(CheckpointError):
    """A checkpoint differs from what was saved."""

    def __init__(self, path: Path, detail: str) -> None:
        super().__init__(f"{path}: {detail}: use another checkpoint of the run.")


class Entry(Spec):
    """One file of a checkpoint."""

    bytes: int
    """Its length."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    """Its name, without any folder."""
    sha256: str
    """The SHA-256 of its content, in hexadecimal."""


class Manifest(Spec):
    """The files of a checkpoint, sorted by name, and its step."""

    files: tuple[Entry, ...]
    format: str = _FORMAT
    step: int

    def encode(self) -> bytes:
        """Return the content of the file MANIFEST."""
        line = self.model_dump_json().encode()
        return b"%s\n%s\n" % (line, hashlib.sha256(line).hexdigest().encode())

    def names(self) -> list[str]:
        return [file.name for file in self.files]

    def verify(self, folder: Path) -> None:
        """Read every file and raise DamagedError at the first that is missing or differs from what was saved."""
        for file in self.files:
            with _open(folder / file.name) as (stream, size):
                digest = hashlib.file_digest(stream, "sha256").hexdigest() if size == file.bytes else ""
            _check(folder / file.name, file, size, digest)

    def read(self, folder: Path, name: str) -> bytes:
        """Return the bytes of one small file, verified. Raises CheckpointError if the manifest does not list it."""
        file = next((file for file in self.files if file.name == name), None)
        if file is None:
            raise CheckpointError(
                f"{folder}: does not contain {name}: use a checkpoint that this version of switchcli wrote."
            )
        content = read_small(folder / name)
        _check(folder / name, file, len(content), hashlib.sha256(content).hexdigest())
        return content


def load(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint folder, without looking at the files.

    Raises DamagedError, or CheckpointError for another format.
    """
    path = folder / NAME
    line, _, digest_line = read_small(path).partition(b"\n")
    if digest_line != hashlib.sha256(line).hexdigest().encode() + b"\n":
        raise DamagedError(path, "its last line is not the SHA-256 of the list before it")
    try:
        file_format = json.loads(line)["format"]
        if file_format == _FORMAT:
            return Manifest.model_validate_json(line)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(path, "is not a list of files of this folder") from error
    raise CheckpointError(
        f"{path}: in the format {file_format!r}, where this switchcli reads {_FORMAT!r}: "
        "use the switchcli that wrote it."
    )


def read_small(path: Path) -> bytes:
    """Return the content of a file of at most 256 MiB (MANIFEST, JSON, YAML)."""
    with _open(path) as (stream, size):
        if size > _MAX_BYTES:
            raise DamagedError(path, f"has {size:,} bytes, where {_MAX_BYTES:,} are allowed")
        return stream.read()


@contextmanager
def _open(path: Path) -> Iterator[tuple["BufferedReader[FileIO]", int]]:
    """Open a regular file, not a link, and yield it with its size in bytes.

    An OSError, of the `with` block too, is raised as a DamagedError, or as another CheckpointError if it is about the
    machine.
    """
    try:
        with open_regular(path, follow_links=False) as stream:
            yield stream, os.fstat(stream.fileno()).st_size
    except OSError as error:
        if error.errno in _DAMAGE:
            raise DamagedError(path, str(error.strerror)) from error
        raise CheckpointError(
            f"{path}: {error.strerror}: make it readable, then run the same command again."
        ) from error


def _check(path: Path, file: Entry, size: int, digest: str) -> None:
    if size != file.bytes:
        raise DamagedError(path, f"has {size:,} bytes, where {file.bytes:,} were saved")
    if digest != file.sha256:
        raise DamagedError(path, "its SHA-256 is not that of what was saved")
