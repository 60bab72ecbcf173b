"""TokenStore: documents as ids on disk, end to end in an array; and the folder that proves itself whole.

A folder is written elsewhere, sealed with a manifest of sizes and digests, and only then renamed into place, which is
`prepare`'s work.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from switchcli import publish
from switchcli.data.prepare import verified
from switchcli.data.prepare.verified import MappedFile, Verified

MANIFEST, TOKENS, OFFSETS = "manifest.json", "tokens.npy", "offsets.npy"
SHARD_TOKENS = 2**24
SHARD_DOCUMENTS = 2**20


class TokenStore(NamedTuple):
    """All documents of one part.

    tokens: uint16 or uint32 [num_tokens], in memory or mapped, read only; `take` reads them.
    offsets: int64 [num_documents + 1], where each document begins.
    """

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    offsets: NDArray[np.int64]
    source: tuple[Verified, MappedFile] | None = None
    """What vouches for mapped tokens."""

    @classmethod
    def open(cls, verified: Verified, name: str) -> Self:
        """Open the store of that name in a sealed folder. Raises DataError if its files are not what was sealed."""
        tokens, mapped = verified.open(f"{name}/{TOKENS}")
        offsets = verified.load(f"{name}/{OFFSETS}")
        return cls(tokens, offsets, None if mapped is None else (verified, mapped))

    @classmethod
    def glance(cls, verified: Verified, name: str) -> Self:
        """Open the index alone: a store without tokens. Raises DataError as `open`."""
        return cls(np.zeros(0, np.uint16), verified.load(f"{name}/{OFFSETS}"))

    def take(self, places: NDArray[np.int64] | slice) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """Return a copy of the tokens at some places. Raises DataError if the file that holds them is cut."""
        if self.source is None:
            return self.tokens[places]
        verified, mapped = self.source
        return verified.take(self.tokens, mapped, places)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


class Shard(NamedTuple):
    """How much is in a part of a text, and what opens it when it is first read."""

    num_documents: int
    num_tokens: int
    open: Callable[[], TokenStore]
    glance: Callable[[], TokenStore]
    """Opens its index alone."""

    @classmethod
    def of(cls, store: TokenStore) -> Self:
        """Of a store that is open."""
        return cls(store.num_documents, store.num_tokens, lambda: store, lambda: store)


class StoreWriter:
    """Writes a TokenStore piece by piece, of a length not known beforehand; used in a `with`."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        folder.mkdir()
        self._folder = folder
        self._dtype = token_type(vocab_size)
        self._lengths = array("q")
        self._file = (folder / TOKENS).open("wb")
        self._write_header(0)
        self._start = self._file.tell()

    def add(self, ids: NDArray[np.int64], *, starts_document: bool) -> None:
        """Appends ids to the last document, or as a new one."""
        if starts_document:
            self._lengths.append(0)
        self._lengths[-1] += len(ids)
        self._file.write(ids.astype(self._dtype).tobytes())

    def add_all(self, tokens: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        """Appends documents of these lengths, end to end."""
        self._lengths.extend(lengths.tolist())
        self._file.write(tokens.astype(self._dtype).tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                lengths = np.array(self._lengths, dtype=np.int64)
                offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0])])
                np.save(self._folder / OFFSETS, offsets, allow_pickle=False)
                self._file.seek(0)
                self._write_header(int(offsets[-1]))
                assert self._file.tell() == self._start, "numpy leaves room for the length in the header"

    def _write_header(self, length: int) -> None:
        header = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (length,)}
        npy.write_array_header_1_0(self._file, header)


ShardFacts = dict[str, Any]
"""A shard's name, and its documents, tokens and bytes of text."""


class ShardWriter:
    """Writes one part of a text as shards; used in a `with`. A document is in one shard whole."""

    def __init__(self, folder: Path, part: str, vocab_size: int) -> None:
        """`folder` is where the shards lie, `part` what their names begin with."""
        self._folder, self._part, self._vocab_size = folder, part, vocab_size
        self._writer: StoreWriter | None = None
        self.shards: list[ShardFacts] = []

    def add(self, ids: NDArray[np.int64], num_bytes: int, *, starts_document: bool) -> None:
        """Appends ids of so many bytes of text to the last document, or as a new one."""
        if self._writer is None or (starts_document and self._is_full()):
            self._close()
            name = f"{self._part}-{len(self.shards):03}"
            self._writer = StoreWriter(self._folder / name, self._vocab_size)
            self.shards.append({"name": name, "documents": 0, "tokens": 0, "bytes": 0})
        self._writer.add(ids, starts_document=starts_document)
        for fact, more in (("documents", int(starts_document)), ("tokens", len(ids)), ("bytes", num_bytes)):
            self.shards[-1][fact] += more

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(kind, error, trace)

    def _is_full(self) -> bool:
        return self.shards[-1]["tokens"] >= SHARD_TOKENS or self.shards[-1]["documents"] >= SHARD_DOCUMENTS

    def _close(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        writer, self._writer = self._writer, None  # where closing fails, it is not closed again
        if writer is not None:
            writer.__exit__(kind, error, trace)


def token_type(vocab_size: int) -> np.dtype[Any]:
    """What ids are kept as."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def seal(folder: Path, facts: Mapping[str, object], files: Mapping[str, object] | None = None) -> None:
    """Writes the manifest: `facts`, and the size and digest of every file in the folder, if `files` does not say."""
    if files is None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): identity_of(path) for path in paths}
    text = json.dumps({**facts, "files": files}, indent=1)
    sealed = json.dumps({"sha256": _digest(text.encode()), "manifest": text})
    publish.write_file(folder / MANIFEST, sealed)


def facts_of(folder: Path) -> dict[str, Any] | None:
    """What a folder's manifest says; None where there is none that is true of itself."""
    try:
        sealed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if _digest(sealed["manifest"].encode()) != sealed["sha256"]:
            return None
        facts = json.loads(sealed["manifest"])
        return facts if isinstance(facts["files"], dict) else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_whole(folder: Path) -> bool:
    """Whether the manifest is there and true of the folder's files."""
    facts = facts_of(folder)
    return facts is not None and all(is_true(folder / name, identity) for name, identity in facts["files"].items())


def has_sizes(folder: Path) -> bool:
    """The same by the files' sizes alone."""
    facts = facts_of(folder)
    try:
        return facts is not None and all(
            (folder / name).stat().st_size == identity["bytes"] for name, identity in facts["files"].items()
        )
    except (FileNotFoundError, KeyError, TypeError):
        return False


def identity(folder: Path, parts: Iterable[str]) -> str:
    """A digest of the files of some parts of a sealed folder, by what its manifest says of them."""
    facts = facts_of(folder)
    assert facts is not None, "sealed"
    return digest_of({name: said for name, said in facts["files"].items() if name.split("/")[0] in parts})


def digest_of(files: Mapping[str, object]) -> str:
    """One digest for the identities of several files."""
    return _digest(json.dumps(dict(sorted(files.items()))).encode())


def identity_of(path: Path) -> dict[str, object]:
    """Size and digest of a file."""
    with path.open("rb") as file:
        return verified.identity_of(file.fileno())


def is_true(path: Path, identity: object) -> bool:
    """Whether a file is there with this size and digest."""
    try:
        return identity_of(path) == identity
    except FileNotFoundError:
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
