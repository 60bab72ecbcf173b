"""File: a file here, or anywhere that fsspec reaches (s3://, gs://, hf://, ...); found by path or glob, read in bytes,
decompressed by its name. The only file that knows fsspec."""

import bz2
import gzip
import hashlib
import io
import lzma
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple, Self, cast

from switchcli.data.prepare.digests import Digests
from switchcli.data.sources.io_errors import data_errors, reason
from switchcli.errors import DataError
from switchcli.user_files import expanded, open_regular, other_kind

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_BUFFER_BYTES = 2**20
# What stores say of a file's version, each by names of its own; the first counts. They say more, but other things when
# they list and when they are asked of one file: the `ukey` of fsspec depends on which came first.
_VERSION = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "mtime", "LastModified", "last_modified", "created")


class SourceFile(NamedTuple):
    """A file as it was found."""

    name: str
    """As it was written, or a URL."""
    size: int | None
    version: str
    """What is known of its content: its time of change, or a digest that the store has."""

    @classmethod
    def local(cls, path: Path) -> Self:
        stat = path.stat()
        return cls(path.as_posix(), stat.st_size, str(stat.st_mtime_ns))

    @property
    def is_compressed(self) -> bool:
        return self.name.endswith(COMPRESSED)

    @property
    def kind(self) -> str:
        """The ending of its name, that of compression left out, such as `.jsonl`."""
        return Path(Path(self.name).stem if self.is_compressed else self.name).suffix

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its bytes, decompressed. DataError, here and within, for what cannot be read."""
        with data_errors(f"{self.name}: cannot be read", "fix or leave out the file"), ExitStack() as stack:
            if _URL.match(self.name):
                system, path = _system(self.name)
                raw = cast("BinaryIO", io.BufferedReader(stack.enter_context(system.open(path, "rb")), _BUFFER_BYTES))
            else:
                raw = stack.enter_context(open_regular(Path(self.name), _BUFFER_BYTES))
            yield cast("BinaryIO", stack.enter_context(_decompressed(raw, Path(self.name).suffix)))


def fingerprint(files: Iterable[SourceFile], digests: Digests) -> str:
    """Return a digest of the files' contents and kinds, in order.

    Where a file of this machine lies, and when it was written, does not count. A file elsewhere counts by its URL,
    its size and the version that its store gives.
    """
    found = [*files]
    local = {file: path for file in found if (path := _local(file.name)) is not None}
    content = dict(zip(local, digests.of([*local.values()]), strict=True))
    identity = [
        (file.kind, Path(file.name).suffix if file.is_compressed else "", file.size, content[file])
        if file in content
        else (file.name, file.size, file.version)
        for file in found
    ]
    return hashlib.sha256(repr(identity).encode("utf-8", "surrogateescape")).hexdigest()


def legacy_fingerprint(files: Iterable[SourceFile]) -> str:
    """Return the fingerprint of versions up to 0.1: paths, sizes and versions. Streams recorded it in checkpoints."""
    identity = [(_resolved(file.name), file.size, file.version) for file in files]
    return hashlib.sha256(repr(identity).encode("utf-8", "surrogateescape")).hexdigest()


def expand_paths(patterns: Iterable[str], key: str) -> list[SourceFile]:
    """The files that `patterns` (paths, URLs, globs) name, each once. DataError, naming a recipe's `key`, for none."""
    found: dict[str, SourceFile] = {}
    for pattern in patterns:
        for file in _elsewhere(pattern, key) if _URL.match(pattern) else _here(pattern, key):
            found.setdefault(_resolved(file.name), file)
    return list(found.values())


def _here(pattern: str, key: str) -> list[SourceFile]:
    try:
        path = expanded(Path(pattern))
        kind = other_kind(path) if path.exists() else None
    except OSError as error:
        raise DataError(f"{key}: {pattern}: cannot be read ({error.strerror}): fix the path") from error
    if kind == "a folder":
        raise _is_folder(pattern, str(path / "*.txt"), key)
    if kind:
        raise DataError(f"{key}: {pattern}: it is {kind}, not a file: save its content to a file, and name that")
    if kind is not None:
        return [SourceFile.local(path)]
    if not set(pattern) & set("*?["):
        raise DataError(f"{key}: {pattern}: no such file (from {Path.cwd()}): fix the path")
    anchor = Path(path.anchor)
    try:
        files = sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())
    except ValueError as error:  # `a**/*.txt`
        raise DataError(
            f"{key}: {pattern}: {str(error)[:1].lower()}{str(error)[1:]}: write ** between slashes, as in a/**/*.txt"
        ) from error
    except OSError as error:
        raise DataError(f"{key}: {pattern}: cannot be read ({error.strerror}): fix the pattern") from error
    if not files:
        raise DataError(f"{key}: {pattern}: no file matches (from {Path.cwd()}): fix the pattern")
    return [SourceFile.local(file) for file in files]


def _elsewhere(pattern: str, key: str) -> list[SourceFile]:
    with data_errors(f"{key}: {pattern}: cannot be listed", "check the address, the network and your rights to it"):
        system, path = _system(pattern)
        # A glob asks for names, sizes and versions at once; asking for each file would take an hour for some corpora.
        found = system.glob(path, detail=True) if set(path) & set("*?[") else {path: system.info(path)}
    if len(found) == 1 and next(iter(found.values()))["type"] == "directory":
        raise _is_folder(pattern, f"{pattern.rstrip('/')}/*.txt", key)
    files = [(system.unstrip_protocol(name), info) for name, info in sorted(found.items()) if info["type"] == "file"]
    if not files:
        raise DataError(f"{key}: {pattern}: no file matches: fix the pattern")
    return [SourceFile(name, info.get("size"), _version(info)) for name, info in files]


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[name]) for name in _VERSION if name in info), "")


def _is_folder(pattern: str, way_out: str, key: str) -> DataError:
    return DataError(f"{key}: {pattern} is a folder: name the files in it, such as {way_out}")


def _local(name: str) -> Path | None:
    """The path of a file of this machine; None for a file elsewhere."""
    if not _URL.match(name):
        return Path(name)
    protocol, _, path = name.partition("://")
    return Path(path) if protocol.lower() in ("file", "local") else None


def _resolved(name: str) -> str:
    return name if _URL.match(name) else str(Path(name).resolve())


def _system(url: str) -> "tuple[AbstractFileSystem, str]":
    import fsspec
    from fsspec.registry import known_implementations

    try:
        system, path = fsspec.url_to_fs(url)
    except ImportError as error:
        protocol = url.partition(":")[0].lower()
        package = known_implementations[protocol]["class"].split(".")[0]
        package = f"'fsspec[{protocol.removesuffix('s')}]'" if package == "fsspec" else package
        raise DataError(f"{url}: {protocol}:// needs a package ({reason(error)}): pip install {package}") from error
    return system, path


def _decompressed(raw: BinaryIO, ending: str) -> IO[bytes]:
    match ending:
        case ".gz":
            return cast("IO[bytes]", gzip.open(raw, "rb"))
        case ".bz2":
            return bz2.open(raw, "rb")
        case ".xz":
            return lzma.open(raw, "rb")
        case ".zst":
            import pyarrow

            # Through pyarrow, which is there anyway, and which tells of a file that was cut off.
            return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), _BUFFER_BYTES)
        case _:
            return raw
