"""TokenStore: documents as token ids in an Arrow file; and the folder that proves itself whole.

An Arrow file holds one record batch with one column, `ids`: a list of token ids for each document. It is a stream of
Arrow's IPC format, which `datasets.Dataset.from_file` opens too.

A folder is written elsewhere, sealed with a manifest of sizes and digests, and only then renamed into place, which is
`prepare`'s work.
"""

import hashlib
import io
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
from switchcli.data.prepare.verified import MappedFile, VerifiedFolder, changed_data_error

MANIFEST, ARROW, IDS = "manifest.json", ".arrow", "ids"
TOKENS, OFFSETS = "tokens.npy", "offsets.npy"
"""The names of a store's two arrays in `arrays` of a manifest.

Versions up to 0.1 kept each in a NumPy file. The digests are still those of such files, so that the same ids keep the
identity that checkpoints recorded."""
_ARROW_HEADER_BYTES = 2**12
"""More than Arrow writes before the offsets: the schema and where the arrays begin, 360 bytes with pyarrow 26."""
SHARD_TOKENS = 2**24
SHARD_DOCUMENTS = 2**20


class TokenStore(NamedTuple):
    """All documents of one part.

    tokens: uint16 or uint32 [num_tokens], in memory or mapped, read only; `take` reads them.
    offsets: int64 [num_documents + 1], where each document begins.
    """

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    offsets: NDArray[np.int64]
    source: tuple[VerifiedFolder, MappedFile] | None = None
    """What vouches for mapped tokens."""

    @classmethod
    def open(cls, verified: VerifiedFolder, name: str) -> Self:
        """Open the store of that name in a sealed folder. Raises DataError if its file is not what was sealed."""
        content, mapped = verified.open(f"{name}{ARROW}")
        tokens, offsets = _read(content, verified.path(f"{name}{ARROW}"))
        if mapped is None:
            return cls(tokens, offsets)
        return cls(tokens, offsets.copy(), (verified, mapped))  # only `take` may read the mapping from now on

    @classmethod
    def open_index(cls, verified: VerifiedFolder, name: str, identity: Mapping[str, Any]) -> Self:
        """Open the index alone: a store without tokens. `identity` is that of the offsets, as the manifest has it.

        The tokens are neither read nor compared. Raises DataError as `open`.
        """
        path = verified.path(f"{name}{ARROW}")
        content = verified.head(f"{name}{ARROW}", identity["bytes"] + _ARROW_HEADER_BYTES)
        offsets = _read(content, path)[1].copy()  # the rest of the content is freed
        if _array_identity(offsets) != identity:
            raise changed_data_error(path)
        return cls(np.zeros(0, np.uint16), offsets)

    def gather(self, places: NDArray[np.int64] | slice) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """Return a copy of the tokens at some places. Raises DataError if the file that holds them is cut."""
        if self.source is None:
            return self.tokens[places]
        verified, mapped = self.source
        return verified.gather(self.tokens, mapped, places)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


class TokenShard(NamedTuple):
    """How much is in a part of a text, and what opens it when it is first read."""

    num_documents: int
    num_tokens: int
    open: Callable[[], TokenStore]
    open_index: Callable[[], TokenStore]
    """Opens its index alone."""

    @classmethod
    def of(cls, store: TokenStore) -> Self:
        """Return the shard of a store that is open."""
        return cls(store.num_documents, store.num_tokens, lambda: store, lambda: store)


class StoreWriter:
    """Writes a TokenStore of a length not known beforehand; used in a `with`.

    It holds the tokens in memory until the end: 2 bytes each, or 4 with a vocabulary of more than 2**16. A
    `ShardWriter` begins a new store after SHARD_TOKENS: then this is 32 MiB, or 64, and the rest of the last document.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        """The file is called `name`.arrow, in `folder`."""
        self._folder, self._name = folder, name
        self._dtype = token_type(vocab_size)
        self._lengths = array("q")
        self._tokens = bytearray()
        self.arrays: dict[str, object] = {}
        """Size and digest of the two arrays by their names, at the end; see TOKENS."""

    def add(self, ids: NDArray[np.int64], *, starts_document: bool) -> None:
        """Appends ids to the last document, or as a new one."""
        if starts_document:
            self._lengths.append(0)
        self._lengths[-1] += len(ids)
        self._tokens += ids.astype(self._dtype).data

    def add_all(self, tokens: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        """Appends documents of these lengths, end to end."""
        self._lengths.extend(lengths.tolist())
        self._tokens += tokens.astype(self._dtype).data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write()

    def _write(self) -> None:
        """Write the file, without documents that have no tokens."""
        import pyarrow as pa

        lengths = np.array(self._lengths, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0])])
        tokens = np.frombuffer(self._tokens, self._dtype)
        # From buffers, which are not copied: `pa.array` would import pandas.
        values = pa.Array.from_buffers(pa.from_numpy_dtype(self._dtype), len(tokens), [None, pa.py_buffer(tokens)])
        ids_type, buffers = pa.large_list(values.type), [None, pa.py_buffer(offsets)]
        ids = pa.Array.from_buffers(ids_type, len(offsets) - 1, buffers, children=[values])
        batch = pa.record_batch([ids], names=[IDS])
        with (
            (self._folder / f"{self._name}{ARROW}").open("wb") as file,
            pa.ipc.new_stream(file, batch.schema) as stream,
        ):
            stream.write_batch(batch)
        arrays = {OFFSETS: offsets, TOKENS: tokens}
        self.arrays = {f"{self._name}/{name}": _array_identity(values) for name, values in arrays.items()}


def _read(content: Any, path: Path) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the tokens and the offsets of an Arrow file as arrays over `content`, a buffer; nothing is copied.

    Raises DataError, naming `path`, for other content.
    """
    import pyarrow as pa

    try:
        with pa.ipc.open_stream(pa.py_buffer(content)) as stream:
            ids = stream.read_next_batch().column(IDS)
        ids.validate(full=True)  # no document reaches beyond the tokens
        arrays: tuple[NDArray[Any], NDArray[Any]] = np.from_dlpack(ids.values), np.from_dlpack(ids.offsets)
        tokens, offsets = arrays  # `to_numpy` would import pandas
    except (pa.ArrowException, OSError, AttributeError, LookupError, StopIteration) as error:
        raise changed_data_error(path) from error
    if tokens.dtype not in (np.uint16, np.uint32) or offsets.dtype != np.int64 or offsets[-1] != len(tokens):
        raise changed_data_error(path)
    return tokens, offsets


ShardManifest = dict[str, Any]
"""A shard's name, and its documents, tokens and bytes of text."""


class ShardWriter:
    """Writes one part of a text as shards; used in a `with`. A document is in one shard whole."""

    def __init__(self, folder: Path, part: str, vocab_size: int) -> None:
        """`folder` is where the shards lie, `part` what their names begin with."""
        self._folder, self._part, self._vocab_size = folder, part, vocab_size
        self._writer: StoreWriter | None = None
        self.shards: list[ShardManifest] = []
        self.arrays: dict[str, object] = {}
        """Size and digest of the arrays of all shards, at the end; see `StoreWriter`."""

    def add(self, ids: NDArray[np.int64], num_bytes: int, *, starts_document: bool) -> None:
        """Appends ids of so many bytes of text to the last document, or as a new one."""
        if self._writer is None or (starts_document and self._is_full()):
            self._close()
            name = f"{self._part}-{len(self.shards):03}"
            self._writer = StoreWriter(self._folder, name, self._vocab_size)
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
            self.arrays |= writer.arrays


def token_type(vocab_size: int) -> np.dtype[Any]:
    """What ids are kept as."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_manifest(folder: Path, facts: Mapping[str, object], files: Mapping[str, object] | None = None) -> None:
    """Writes the manifest: `facts`, and the size and digest of every file in the folder, if `files` does not say."""
    if files is None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): identity_of(path) for path in paths}
    text = json.dumps({**facts, "files": files}, indent=1)
    sealed = json.dumps({"sha256": _digest(text.encode()), "manifest": text})
    publish.write_file(folder / MANIFEST, sealed)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder's manifest says; None where there is none that is true of itself."""
    try:
        sealed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if _digest(sealed["manifest"].encode()) != sealed["sha256"]:
            return None
        facts = json.loads(sealed["manifest"])
        return facts if isinstance(facts["files"], dict) else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_complete(folder: Path) -> bool:
    """Whether the manifest is there and true of the folder's files."""
    facts = read_manifest(folder)
    return facts is not None and all(
        matches_identity(folder / name, identity) for name, identity in facts["files"].items()
    )


def has_sizes(folder: Path) -> bool:
    """Return whether the manifest is there and gives the sizes of the folder's files. Digests are not compared."""
    facts = read_manifest(folder)
    try:
        return facts is not None and all(
            (folder / name).stat().st_size == identity["bytes"] for name, identity in facts["files"].items()
        )
    except (FileNotFoundError, KeyError, TypeError):
        return False


def identity_of_stores(folder: Path, parts: Iterable[str]) -> str:
    """A digest of the arrays of some stores of a sealed folder, by what its manifest says of them."""
    facts = read_manifest(folder)
    assert facts is not None, "sealed"
    return digest_of({name: said for name, said in facts["arrays"].items() if name.split("/")[0] in parts})


def digest_of(files: Mapping[str, object]) -> str:
    """One digest for the identities of several files."""
    return _digest(json.dumps(dict(sorted(files.items()))).encode())


def identity_of(path: Path) -> dict[str, object]:
    """Size and digest of a file."""
    with path.open("rb") as file:
        return verified.identity_of(file.fileno())


def matches_identity(path: Path, identity: object) -> bool:
    """Whether a file is there with this size and digest."""
    try:
        return identity_of(path) == identity
    except FileNotFoundError:
        return False


def _array_identity(values: NDArray[Any]) -> dict[str, object]:
    """Size and digest of a NumPy file (.npy) that holds the array."""
    header = io.BytesIO()
    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(values))
    digest = hashlib.sha256(header.getvalue())
    digest.update(values.data)
    return {"bytes": len(header.getvalue()) + values.nbytes, "sha256": digest.hexdigest()}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
