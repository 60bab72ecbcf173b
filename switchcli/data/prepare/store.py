"""TokenStore: documents as token ids in an Arrow file; and the manifest that shows whether a folder is complete.

An Arrow file holds one record batch with one column, `ids`: a list of token ids for each document. It is a stream of
Arrow's IPC format, which `datasets.Dataset.from_file` opens too.

A folder is written under a temporary name, gets a manifest with the size and digest of each file, and is only then
renamed to its final name (cache.py).
"""

import hashlib
import io
import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
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
"""Names of a store's two arrays in the `arrays` of a manifest.

Versions up to 0.1 stored each array in a NumPy file. The digests are still those of such files, so that equal ids keep
the identity that checkpoints recorded."""
_ARROW_HEADER_BYTES = 2**12
"""An upper bound on what Arrow writes before the offsets: the schema and the positions of the arrays. pyarrow 26 writes
360 bytes."""
SHARD_TOKENS = 2**24
"""Tokens after which a new shard begins, at the next document."""
SHARD_DOCUMENTS = 2**20
"""Documents after which a new shard begins."""


class TokenStore(NamedTuple):
    """Documents as token ids, end to end: document d is tokens[offsets[d] : offsets[d + 1]]."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    """uint16 or uint32 [num_tokens], read only: in memory, or mapped from a file, which only `gather` may read."""
    offsets: NDArray[np.int64]
    """int64 [num_documents + 1]: the position of each document's first token, and at the end the number of tokens."""
    source: tuple[VerifiedFolder, MappedFile] | None = None
    """The folder and the file that verify mapped tokens; None for tokens in memory."""

    @classmethod
    def open(cls, verified: VerifiedFolder, name: str) -> Self:
        """Open the store of that name in a complete folder. Raises DataError if its file has changed."""
        content, mapped = verified.open(f"{name}{ARROW}")
        tokens, offsets = _read(content, verified.path(f"{name}{ARROW}"))
        if mapped is None:
            return cls(tokens, offsets)
        return cls(tokens, offsets.copy(), (verified, mapped))  # a copy: only `gather` may read the mapping from now on

    @classmethod
    def open_index(cls, verified: VerifiedFolder, name: str, identity: Mapping[str, Any]) -> Self:
        """Open only the offsets: the store has no tokens. `identity` is the offsets' size and digest from the manifest.

        Raises DataError if the offsets do not match. The tokens are neither read nor compared.
        """
        path = verified.path(f"{name}{ARROW}")
        # In the file the offsets come before the tokens. The bytes of `identity` are those of a NumPy header and the
        # offsets, so this is enough for Arrow's header and the offsets.
        content = verified.head(f"{name}{ARROW}", identity["bytes"] + _ARROW_HEADER_BYTES)
        offsets = _read(content, path)[1].copy()  # a copy, so that the rest of the content is freed
        if _array_identity(offsets) != identity:
            raise changed_data_error(path)
        return cls(np.zeros(0, np.uint16), offsets)

    def gather(self, positions: NDArray[np.int64] | slice) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """Return the tokens at these positions. Raises DataError if their file was truncated."""
        if self.source is None:
            return self.tokens[positions]
        verified, mapped = self.source
        return verified.gather(self.tokens, mapped, positions)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


class TokenShard(NamedTuple):
    """Size of a shard of a text, and functions that open the shard when it is first read."""

    num_documents: int
    num_tokens: int
    open: Callable[[], TokenStore]
    open_index: Callable[[], TokenStore]
    """Opens only the offsets: the store has no tokens."""

    @classmethod
    def of(cls, store: TokenStore) -> Self:
        """Return the shard of an open store."""
        return cls(store.num_documents, store.num_tokens, lambda: store, lambda: store)


class StoreWriter:
    """Writer of a TokenStore, used in a `with` statement; the number of documents need not be known beforehand.

    It holds the tokens in memory until the end: 2 bytes each, or 4 with a vocabulary of more than 2**16. A
    `ShardWriter` begins a new store after SHARD_TOKENS, which bounds this to 32 MiB, or 64 MiB, and one document.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        """Prepare to write folder/`name`.arrow."""
        self._folder, self._name = folder, name
        self._dtype = token_type(vocab_size)
        self._lengths = array("q")
        self._tokens = bytearray()
        self.arrays: dict[str, object] = {}
        """Size and digest of the two arrays by name (see TOKENS); set at the end of the `with` statement."""

    def add(self, ids: NDArray[np.int64], *, starts_document: bool) -> None:
        """Append ids to the last document, or as a new one."""
        if starts_document:
            self._lengths.append(0)
        self._lengths[-1] += len(ids)
        self._tokens += ids.astype(self._dtype).data

    def add_all(self, tokens: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        """Append documents of these lengths, whose tokens lie end to end."""
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
        """Write the file. Documents without tokens are left out."""
        import pyarrow as pa

        lengths = np.array(self._lengths, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0])])  # [num_documents + 1]
        tokens = np.frombuffer(self._tokens, self._dtype)
        # Arrays over our buffers need no copy, and `pa.array` would import pandas. None stands for the validity bitmap,
        # as no value is null. A large list has int64 offsets.
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
    """Return the tokens and the offsets of an Arrow file as arrays over the buffer `content`, without a copy.

    Raises DataError, naming `path`, if the content is not that of a store.
    """
    import pyarrow as pa

    try:
        with pa.ipc.open_stream(pa.py_buffer(content)) as stream:
            ids = stream.read_next_batch().column(IDS)
        ids.validate(full=True)  # offsets ascend, and none is beyond the tokens
        # DLPack, because `to_numpy` would import pandas.
        tokens: NDArray[Any] = np.from_dlpack(ids.values)
        offsets: NDArray[Any] = np.from_dlpack(ids.offsets)
    except (pa.ArrowException, OSError, AttributeError, LookupError, StopIteration) as error:
        raise changed_data_error(path) from error
    if tokens.dtype not in (np.uint16, np.uint32) or offsets.dtype != np.int64 or offsets[-1] != len(tokens):
        raise changed_data_error(path)
    return tokens, offsets


ShardManifest = dict[str, Any]
"""Facts about a shard in the manifest: its `name`, and its number of `documents`, `tokens` and `bytes` of text."""


class ShardWriter:
    """Writer of one split of a text as shards, used in a `with` statement. No document is divided between shards."""

    def __init__(self, folder: Path, split: str, vocab_size: int) -> None:
        """Prepare to write shards `split`-000, `split`-001, ... in `folder`."""
        self._folder, self._split, self._vocab_size = folder, split, vocab_size
        self._writer: StoreWriter | None = None
        self.shards: list[ShardManifest] = []
        self.arrays: dict[str, object] = {}
        """Size and digest of the arrays of all shards; complete at the end of the `with` statement."""

    def add(self, ids: NDArray[np.int64], num_bytes: int, *, starts_document: bool) -> None:
        """Append the ids of `num_bytes` bytes of text to the last document, or as a new one."""
        if self._writer is None or (starts_document and self._is_full()):
            self._close()
            name = f"{self._split}-{len(self.shards):03}"
            self._writer = StoreWriter(self._folder, name, self._vocab_size)
            self.shards.append({"name": name, "documents": 0, "tokens": 0, "bytes": 0})
        self._writer.add(ids, starts_document=starts_document)
        shard = self.shards[-1]
        shard["documents"] += int(starts_document)
        shard["tokens"] += len(ids)
        shard["bytes"] += num_bytes

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
        writer, self._writer = self._writer, None  # first: a writer whose closing fails is not closed again
        if writer is not None:
            writer.__exit__(kind, error, trace)
            self.arrays |= writer.arrays


def token_type(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest type that ids of the vocabulary are stored as."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_manifest(folder: Path, facts: Mapping[str, object], files: Mapping[str, object] | None = None) -> None:
    """Write the manifest: `facts`, and the size and digest of each file.

    Without `files`, all files in the folder are read to compute these.
    """
    if files is None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): identity_of(path) for path in paths}
    text = json.dumps({**facts, "files": files}, indent=1)
    sealed = json.dumps({"sha256": _digest(text.encode()), "manifest": text})
    publish.write_file(folder / MANIFEST, sealed)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the facts in a folder's manifest; None if it is missing or does not match its own digest."""
    try:
        sealed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if _digest(sealed["manifest"].encode()) != sealed["sha256"]:
            return None
        facts = json.loads(sealed["manifest"])
        return facts if isinstance(facts["files"], dict) else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_complete(folder: Path) -> bool:
    """Return whether the folder has a manifest and all files match the digests in it."""
    facts = read_manifest(folder)
    return facts is not None and all(
        matches_identity(folder / name, identity) for name, identity in facts["files"].items()
    )


def has_sizes(folder: Path) -> bool:
    """Return whether the folder has a manifest and all files have the sizes in it. Digests are not compared."""
    facts = read_manifest(folder)
    try:
        return facts is not None and all(
            (folder / name).stat().st_size == identity["bytes"] for name, identity in facts["files"].items()
        )
    except (FileNotFoundError, KeyError, TypeError):
        return False


def identity_of_stores(folder: Path, names: Sequence[str]) -> str:
    """Return a digest of the arrays of some stores of a complete folder, computed from the digests in its manifest."""
    facts = read_manifest(folder)
    assert facts is not None, "the folder is complete"
    # Arrays are named STORE/ARRAY.
    return digest_of({name: identity for name, identity in facts["arrays"].items() if name.split("/")[0] in names})


def digest_of(files: Mapping[str, object]) -> str:
    """Return one digest for the identities of several files, whatever their order."""
    return _digest(json.dumps(dict(sorted(files.items()))).encode())


def digest_of_lines(lines: Iterable[str]) -> str:
    """Return one digest for several strings in this order, as 32 hexadecimal digits: it names a folder of the cache."""
    return _digest("\n".join(lines).encode("utf-8", "surrogateescape"))[:32]


def identity_of(path: Path) -> dict[str, object]:
    """Return the size and digest of a file."""
    with path.open("rb") as file:
        return verified.identity_of(file.fileno())


def matches_identity(path: Path, identity: object) -> bool:
    """Return whether the file exists and has this size and digest."""
    try:
        return identity_of(path) == identity
    except FileNotFoundError:
        return False


def _array_identity(values: NDArray[Any]) -> dict[str, object]:
    """Return the size and digest of the NumPy file (.npy) that would hold the array."""
    header = io.BytesIO()
    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(values))
    digest = hashlib.sha256(header.getvalue())
    digest.update(values.data)
    return {"bytes": len(header.getvalue()) + values.nbytes, "sha256": digest.hexdigest()}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
