"""SourceFile: a file on this machine, or at a URL of `switchcli.spec.PROTOCOLS`, which fsspec reads.

Files are found by path or glob, and read as bytes, decompressed according to their names. This is the only module that
uses fsspec. Prepared text depends on the digests of local files (`digests_of`).
"""

import bz2
import gzip
import hashlib
import io
import lzma
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from glob import glob
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Final, NamedTuple, Self, cast

from switchcli.data.sources.io_errors import data_errors, reason
from switchcli.errors import DataError
from switchcli.spec import PROTOCOLS, check_path_or_url, url_protocols
from switchcli.system.processor import available_processors
from switchcli.system.user_files import open_regular, other_kind

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_BUFFER_BYTES = 2**20
# Keys under which stores report the version of a file; the first one that is there is used. Other values that they
# report differ between a listing and a request for one file, and so does fsspec's `ukey`, which digests all of them.
_VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "blob_id",
    "mtime",
    "LastModified",
    "last_modified",
    "created",
    "CRC",
)
CONTENT_BYTES: Final = 2**30
"""Bytes of several files together above which only their sizes and times count: reading them would delay a start."""

Stamp = tuple[int, int, int]
"""Size of a file in bytes, and the times of its last change of content and of attributes, in nanoseconds."""


def stamp(path: Path) -> Stamp:
    """Return what changes whenever a program writes to a file. Raises OSError if there is none."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def digests_of(paths: Sequence[Path]) -> list[str]:
    """Return KIND:DIGEST of each file: of its content, or of its stamp if all have more than CONTENT_BYTES together.

    Raises DataError for a file that cannot be read.
    """
    stamps = []
    for path in paths:
        with _read_errors(path):
            stamps.append(stamp(path))
    if sum(size for size, _, _ in stamps) > CONTENT_BYTES:
        return [f"stamp:{each}" for each in stamps]
    with ThreadPoolExecutor(available_processors()) as pool:  # hashing needs no lock
        return [*pool.map(_content_digest, paths)]


def _content_digest(path: Path) -> str:
    with _read_errors(path), open_regular(path) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _read_errors(path: Path) -> AbstractContextManager[None]:
    return data_errors(f"data: {path}: cannot be read", "check that it is there and may be read")


class SourceFile(NamedTuple):
    """A file, with its size and version when it was found."""

    name: str
    """Path as the user wrote it, or URL."""
    size: int | None
    """Bytes as stored, compressed or not. None if the store does not report it."""
    version: str
    """Time of the last change, or the digest that the store reports; "" if it reports neither."""

    @classmethod
    def local(cls, path: Path) -> Self:
        stat = path.stat()
        return cls(path.as_posix(), stat.st_size, str(stat.st_mtime_ns))

    @property
    def _path(self) -> Path:
        """The name in lower case; of a URL without its query, such as `?download=true`, and what follows in a chain."""
        return Path((re.split("[?#]|::", self.name)[0] if _URL.match(self.name) else self.name).lower())

    @property
    def is_compressed(self) -> bool:
        return self._path.name.endswith(COMPRESSED)

    @property
    def kind(self) -> str:
        """The suffix of the name without that of the compression, such as `.jsonl`."""
        return Path(self._path.stem if self.is_compressed else self._path).suffix

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file for reading decompressed bytes. Errors of opening, and inside the block, become DataError."""
        with data_errors(f"{self.name}: cannot be read", "fix or leave out the file"), ExitStack() as stack:
            if _URL.match(self.name):
                filesystem, path = _filesystem(self.name)
                remote = stack.enter_context(filesystem.open(path, "rb"))
                raw = cast("BinaryIO", io.BufferedReader(remote, _BUFFER_BYTES))
            else:
                raw = stack.enter_context(open_regular(Path(self.name), _BUFFER_BYTES))
            yield cast("BinaryIO", stack.enter_context(_decompressed(raw, self._path.suffix)))


def fingerprint(files: Iterable[SourceFile]) -> str:
    """Return a digest of the files' contents and kinds, in order.

    The path and the time of change of a local file do not count. A remote file counts by its URL, its size and the
    version that its store reports.
    """
    files = [*files]
    local_paths = {file: path for file in files if (path := _local_path(file.name)) is not None}
    contents = dict(zip(local_paths, digests_of([*local_paths.values()]), strict=True))
    identity: list[tuple[object, ...]] = []
    for file in files:
        if file in contents:
            compression = Path(file.name).suffix if file.is_compressed else ""
            identity.append((file.kind, compression, file.size, contents[file]))
        else:
            identity.append((file.name, file.size, file.version))
    return hashlib.sha256(repr(identity).encode("utf-8", "surrogateescape")).hexdigest()


def expand_paths(patterns: Iterable[str], key: str) -> list[SourceFile]:
    """Return the files that `patterns` (paths, URLs, globs) name, each once, in order.

    Raises DataError, naming the recipe's `key`, for a pattern that names no file or a folder.
    """
    files: dict[str, SourceFile] = {}
    for pattern in patterns:
        is_url = _URL.match(pattern)
        for file in _expand_url(pattern, key) if is_url else _expand_path(pattern, key):
            files.setdefault(file.name if is_url else str(Path(file.name).resolve()), file)
    return list(files.values())


def _expand_path(pattern: str, key: str) -> list[SourceFile]:
    try:
        path = Path(pattern)
        kind = other_kind(path.stat().st_mode) if path.exists() else None
    except OSError as error:
        raise DataError(f"{key}: {pattern}: cannot be read ({error.strerror}): fix the path") from error
    if kind == "a folder":
        raise _folder_error(pattern, f"{path}/", key)
    if kind:
        raise DataError(f"{key}: {pattern}: it is {kind}, not a file: save its content to a file, and name that")
    # A file whose name holds brackets or stars is that file, not a glob.
    if kind is not None:
        return [SourceFile.local(path)]
    if not set(pattern) & set("*?["):
        raise DataError(f"{key}: {pattern}: no such file (from {Path.cwd()}): fix the path")
    _check_stars(pattern, key)
    # The names that a shell finds: `Path.glob` finds hidden ones too, such as the ._text.jsonl of macOS.
    try:
        files = sorted(file for name in glob(str(path), recursive=True) if (file := Path(name)).is_file())  # noqa: PTH207
    except OSError as error:
        raise DataError(f"{key}: {pattern}: cannot be read ({error.strerror}): fix the pattern") from error
    if not files:
        raise DataError(f"{key}: {pattern}: no file matches (from {Path.cwd()}): fix the pattern")
    return [SourceFile.local(file) for file in files]


def _check_stars(pattern: str, key: str) -> None:
    """Raise DataError where `**` is only a part of a name: it would be taken for `*`."""
    if any("**" in part and part != "**" for part in re.split("/|::", pattern)):
        raise DataError(f"{key}: {pattern}: ** is only a part of a name: write ** between slashes, as in a*/**/*.txt")


def _expand_url(pattern: str, key: str) -> list[SourceFile]:
    _check_stars(pattern, key)
    with data_errors(f"{key}: {pattern}: cannot be listed", "check the address, the network and your rights to it"):
        filesystem, path = _filesystem(pattern)
        # One listing reports names, sizes and versions. A request per file would take an hour for some corpora.
        listing = filesystem.glob(path, detail=True) if set(path) & set("*?[") else {path: filesystem.info(path)}
    if len(listing) == 1 and next(iter(listing.values()))["type"] == "directory":
        raise _folder_error(pattern, f"{pattern.rstrip('/')}/", key)
    files = []
    for name, info in sorted(listing.items()):
        if info["type"] == "file":
            version = next((str(info[key]) for key in _VERSIONS if key in info), "")
            url = "::".join([filesystem.unstrip_protocol(name), *pattern.split("::")[1:]])
            files.append(SourceFile(url, info.get("size"), version))
    if not files:
        raise DataError(f"{key}: {pattern}: no file matches: fix the pattern")
    return files


def _folder_error(pattern: str, folder: str, key: str) -> DataError:
    kind = "jsonl" if key.startswith("tasks") else "txt"
    return DataError(f"{key}: {pattern} is a folder: name the files in it, such as {folder}*.{kind}")


def _local_path(name: str) -> Path | None:
    """Return the path of a file on this machine, or None for a remote file."""
    if not _URL.match(name):
        return Path(name)
    protocol, _, path = name.partition("://")
    return Path(path) if protocol == "file" else None


def _filesystem(url: str) -> "tuple[AbstractFileSystem, str]":
    """Return the fsspec file system of a URL, and the path in it. Raises DataError naming a package that is missing.

    Raises ValueError for a URL of another protocol: an archive may hold a file with such a name.
    """
    import fsspec

    check_path_or_url(url)
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except ImportError as error:
        packages = " ".join(sorted({PROTOCOLS[protocol] for protocol in url_protocols(url)})).strip()
        raise DataError(f"{url}: a package is missing ({reason(error)}): pip install {packages}") from error
    return filesystem, path


def block_references() -> None:
    """Make `datasets` unable to open reference:// in this process. A data set's card may name such a URL.

    fsspec formats templates of the file that it leads to, and these reach the environment.
    """
    import fsspec

    fsspec.register_implementation("reference", fsspec.AbstractFileSystem, clobber=True)  # which opens nothing


def _decompressed(raw: BinaryIO, suffix: str) -> IO[bytes]:
    match suffix:
        case ".gz":
            return cast("IO[bytes]", gzip.open(raw, "rb"))
        case ".bz2":
            return bz2.open(raw, "rb")
        case ".xz":
            return lzma.open(raw, "rb")
        case ".zst":
            import pyarrow

            # pyarrow is installed anyway, and it reports a file that is cut off.
            return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), _BUFFER_BYTES)
        case _:
            return raw
