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
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Final, final

from switchcli.errors import CheckpointError
from switchcli.system.user_files import open_regular

NAME: Final = "MANIFEST"
_FORMAT: Final = "switchcli checkpoint 1"
"""Change this only if older code would misread the files."""
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES: Final = 1 << 28
_DAMAGE: Final = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.EIO)
"""Errors of `open_regular` that mean damage. All others (permission, descriptors, memory) concern the machine."""


@final
class DamagedError(CheckpointError):
    """A checkpoint differs from what was saved. `why` is one word that fits into a file name."""

    def __init__(self, path: Path, why: str, detail: str) -> None:
        super().__init__(f"{path}: {detail}: use another checkpoint of the run.")
        self.why = why


@final
@dataclass(frozen=True)
class Entry:
    """One file: its plain name, its length and the SHA-256 of its bytes in hexadecimal."""

    name: str
    num_bytes: int
    sha256: str

    def is_valid(self) -> bool:
        """Return whether the fields, which come from a file, have the right types, and the name no folder in it."""
        return (
            isinstance(self.name, str)
            and _PLAIN_NAME.fullmatch(self.name) is not None
            and self.name != NAME
            and type(self.num_bytes) is int
            and isinstance(self.sha256, str)
            and _SHA256.fullmatch(self.sha256) is not None
        )


@final
@dataclass(frozen=True)
class Manifest:
    """The step of a checkpoint and its files, sorted by name."""

    step: int
    entries: tuple[Entry, ...]

    def encode(self) -> bytes:
        """Return the bytes of the file in canonical form: equal manifests have equal bytes."""
        files = [{"bytes": entry.num_bytes, "name": entry.name, "sha256": entry.sha256} for entry in self.entries]
        body = {"files": files, "format": _FORMAT, "step": self.step}
        line = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
        return b"%s\n%s\n" % (line, hashlib.sha256(line).hexdigest().encode())

    def names(self) -> list[str]:
        return [entry.name for entry in self.entries]

    def verify(self, folder: Path) -> None:
        """Read every file and raise DamagedError at the first that is missing or differs from what was saved."""
        for entry in self.entries:
            with _open(folder / entry.name) as (stream, size):
                digest = hashlib.file_digest(stream, "sha256").hexdigest() if size == entry.num_bytes else ""
            _check_entry(folder / entry.name, entry, size, digest)

    def check_sizes(self, folder: Path) -> None:
        """Raise DamagedError at the first file that is missing or has another length, without reading any."""
        for entry in self.entries:
            with _open(folder / entry.name) as (_, size):
                _check_entry(folder / entry.name, entry, size, entry.sha256)

    def read(self, folder: Path, name: str) -> bytes:
        """Return the bytes of one small file, verified. Raises CheckpointError if the manifest does not list it."""
        entry = next((entry for entry in self.entries if entry.name == name), None)
        if entry is None:
            raise CheckpointError(
                f"{folder}: does not contain {name}: use a checkpoint that this version of switchcli wrote."
            )
        content = read_small(folder / name)
        _check_entry(folder / name, entry, len(content), hashlib.sha256(content).hexdigest())
        return content


def load(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint folder, without looking at the files.

    Raises DamagedError, or CheckpointError for another format.
    """
    path = folder / NAME
    content = read_small(path)
    line, _, digest_line = content.partition(b"\n")
    if digest_line != hashlib.sha256(line).hexdigest().encode() + b"\n":
        raise DamagedError(path, "manifest", "its last line is not the SHA-256 of the list before it")
    try:
        body = json.loads(line)
        file_format = body["format"]
        entries = tuple(Entry(file["name"], file["bytes"], file["sha256"]) for file in body["files"])
        manifest = Manifest(body["step"], entries)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(path, "manifest", "is not a list of files") from error
    if file_format != _FORMAT:
        raise CheckpointError(
            f"{path}: in the format {file_format!r}, where this switchcli reads {_FORMAT!r}: "
            "use the switchcli that wrote it."
        )
    names = [entry.name for entry in manifest.entries]
    is_valid = all(entry.is_valid() for entry in manifest.entries) and type(manifest.step) is int and manifest.step >= 0
    if not is_valid or sorted(set(names)) != names or manifest.encode() != content:
        raise DamagedError(
            path, "manifest", "lists a file twice, or outside the folder, or is not in its one canonical form"
        )
    return manifest


def read_small(path: Path) -> bytes:
    """Return the content of a file of at most 256 MiB (MANIFEST, JSON, YAML)."""
    with _open(path) as (stream, size):
        if size > _MAX_BYTES:
            raise DamagedError(path, "size", f"has {size:,} bytes, where {_MAX_BYTES:,} are allowed")
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
        if error.errno not in _DAMAGE:
            raise CheckpointError(
                f"{path}: {error.strerror}: make it readable, then run the same command again."
            ) from error
        why = {errno.EINVAL: "link", errno.ELOOP: "link", errno.EIO: "unreadable"}.get(error.errno or 0, "missing")
        raise DamagedError(path, why, str(error.strerror)) from error


def _check_entry(path: Path, entry: Entry, size: int, digest: str) -> None:
    if size != entry.num_bytes:
        raise DamagedError(path, "size", f"has {size:,} bytes, where {entry.num_bytes:,} were saved")
    if digest != entry.sha256:
        raise DamagedError(path, "checksum", "its SHA-256 is not that of what was saved")
