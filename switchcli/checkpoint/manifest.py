"""MANIFEST: which files a checkpoint folder holds, their sizes and SHA-256, and a SHA-256 of that list itself.

    {"files":[{"bytes":...,"name":...,"sha256":...},...],"format":"switchcli checkpoint 1","step":1000}
    <SHA-256 of the line above>

A file is read only when the manifest names it, by a plain name, and it is a regular file of the folder: no links, no
`../`. Files that it does not name are never read. The list guards against accidents, not against an author who means
harm: what is read is therefore JSON and safetensors alone, checked again by their readers.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final, final

from switchcli.errors import CheckpointError

NAME: Final = "MANIFEST"
_FORMAT: Final = "switchcli checkpoint 1"
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES: Final = 1 << 28
# What an open tells us about the checkpoint; any other refusal (permission, descriptors, memory) is about the machine.
_DAMAGE: Final = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENXIO)


@final
class DamagedError(CheckpointError):
    """A checkpoint that is not what was saved. `why` is one word, fit for a file name."""

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

    def is_sound(self) -> bool:
        return (
            isinstance(self.name, str)
            and _FILE_NAME.fullmatch(self.name) is not None
            and self.name != NAME
            and type(self.num_bytes) is int
            and isinstance(self.sha256, str)
            and _SHA256.fullmatch(self.sha256) is not None
        )


@final
@dataclass(frozen=True)
class Manifest:
    """The step of a checkpoint and its files, in the order of their names."""

    step: int
    entries: tuple[Entry, ...]

    def encode(self) -> bytes:
        """The bytes of the file: canonical, so that equal manifests are equal bytes."""
        files = [{"bytes": entry.num_bytes, "name": entry.name, "sha256": entry.sha256} for entry in self.entries]
        body = {"files": files, "format": _FORMAT, "step": self.step}
        line = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
        return b"%s\n%s\n" % (line, hashlib.sha256(line).hexdigest().encode())

    def names(self) -> list[str]:
        return [entry.name for entry in self.entries]

    def verify(self, folder: Path) -> None:
        """Read every file through, raising DamagedError at the first that is not there or not as saved."""
        for entry in self.entries:
            with _opened(folder / entry.name) as (stream, size):
                digest = hashlib.file_digest(stream, "sha256").hexdigest() if size == entry.num_bytes else ""
            _compare(folder / entry.name, entry, size, digest)

    def check_sizes(self, folder: Path) -> None:
        """Raise DamagedError at the first file that is not there or not as long as it was; none is read."""
        for entry in self.entries:
            with _opened(folder / entry.name) as (_, size):
                _compare(folder / entry.name, entry, size, entry.sha256)

    def read(self, folder: Path, name: str) -> bytes:
        """The bytes of one small file, verified. Raises CheckpointError when the manifest does not name it."""
        entry = next((entry for entry in self.entries if entry.name == name), None)
        if entry is None:
            raise CheckpointError(f"{folder}: holds no {name}: use a checkpoint that this version of switchcli wrote.")
        content = read_small(folder / name)
        _compare(folder / name, entry, len(content), hashlib.sha256(content).hexdigest())
        return content


def load(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder; its files are not looked at. Raises DamagedError."""
    path = folder / NAME
    raw = read_small(path)
    line, _, rest = raw.partition(b"\n")
    if rest != hashlib.sha256(line).hexdigest().encode() + b"\n":
        raise DamagedError(path, "manifest", "its last line is not the SHA-256 of the list before it")
    try:
        body = json.loads(line)
        written_as = body["format"]
        manifest = Manifest(
            body["step"], tuple(Entry(file["name"], file["bytes"], file["sha256"]) for file in body["files"])
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(path, "manifest", "is not a list of files") from error
    if written_as != _FORMAT:
        raise CheckpointError(
            f"{path}: in the format {written_as!r}, where this switchcli reads {_FORMAT!r}: "
            "use the switchcli that wrote it."
        )
    names = [entry.name for entry in manifest.entries]
    sound = all(entry.is_sound() for entry in manifest.entries) and type(manifest.step) is int and manifest.step >= 0
    if not sound or sorted(set(names)) != names or manifest.encode() != raw:
        raise DamagedError(
            path, "manifest", "names a file twice, or outside the folder, or is not in its one canonical form"
        )
    return manifest


def read_small(path: Path) -> bytes:
    """A file of at most 256 MiB (MANIFEST, JSON, YAML), whole."""
    with _opened(path) as (stream, size):
        if size > _MAX_BYTES:
            raise DamagedError(path, "size", f"has {size:,} bytes, where {_MAX_BYTES:,} are allowed")
        return stream.read()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[FileIO, int]]:
    """A regular file, not a link, and its size in bytes."""
    try:
        with open(path, "rb", buffering=0, opener=_descriptor) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DamagedError(path, "link", "is not a regular file")
            yield stream, status.st_size
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise CheckpointError(
                f"{path}: {error.strerror}: make it readable, then run the same command again."
            ) from error
        why = "link" if error.errno == errno.ELOOP else "unreadable" if error.errno == errno.EIO else "missing"
        raise DamagedError(path, why, str(error.strerror)) from error


def _descriptor(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # not through a link; a pipe must not keep us waiting


def _compare(path: Path, entry: Entry, size: int, digest: str) -> None:
    if size != entry.num_bytes:
        raise DamagedError(path, "size", f"has {size:,} bytes, where {entry.num_bytes:,} were saved")
    if digest != entry.sha256:
        raise DamagedError(path, "checksum", "its SHA-256 is not that of what was saved")
