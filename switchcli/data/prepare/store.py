"""TokenStore: documents as token ids in two NumPy files; and the manifest that shows whether a folder is complete.

A folder is written under a temporary name, gets a manifest with the size and digest of each file, and is only then
renamed to its final name (cache.py).
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from switchcli.data.sources.paths import stamp
from switchcli.errors import DataError
from switchcli.system import publish
from switchcli.system.processor import available_processors

MANIFEST = "manifest.json"
CHECKED = "checked.json"
"""File with the stamps that the files of a folder had when they were last compared with the manifest."""
TOKENS, OFFSETS = ".tokens.npy", ".offsets.npy"
SHARD_TOKENS = 2**24
"""Tokens after which a new shard begins, at the next document."""
SHARD_DOCUMENTS = 2**20
"""Documents after which a new shard begins."""


class TokenStore(NamedTuple):
    """Documents as token ids, end to end: document d is tokens[offsets[d] : offsets[d + 1]]."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    """uint16 or uint32 [num_tokens], read only: in memory, or mapped from a file."""
    offsets: NDArray[np.int64]
    """int64 [num_documents + 1]: the position of each document's first token, and at the end the number of tokens."""

    @classmethod
    def open(cls, folder: Path, name: str) -> Self:
        """Map the store of that name. Raises DataError if a file is missing, is not a NumPy file or has bad offsets."""
        try:
            tokens, offsets = (
                np.load(folder / f"{name}{part}", mmap_mode="r", allow_pickle=False) for part in (TOKENS, OFFSETS)
            )
            if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) <= 0).any():
                raise ValueError(f"the offsets of documents do not rise from 0 to {len(tokens)}, the number of tokens")
        except (OSError, EOFError, ValueError, IndexError) as error:  # of an empty file, and of no offset
            raise DataError(
                f"{folder / name}: cannot be read ({error}): run `switchcli data prepare RECIPE --check`"
            ) from error
        return cls(tokens, offsets)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    def documents(self) -> Iterator[bytes]:
        """Yield the ids of each document as bytes of uint32, which are equal for equal ids of any store."""
        for start, end in pairwise(self.offsets.tolist()):
            yield self.tokens[start:end].astype(np.uint32).tobytes()

    def fraction_of(self, token: int) -> float:
        """Return the fraction of the first million tokens that are `token`."""
        sample = self.tokens[: 2**20]
        return float((sample == token).mean()) if len(sample) else 0.0


class TokenShard(NamedTuple):
    """Size of a shard of a text, and a function that opens the shard when it is first read."""

    num_documents: int
    num_tokens: int
    open: Callable[[], TokenStore]

    @classmethod
    def of(cls, store: TokenStore) -> Self:
        """Return the shard of an open store."""
        return cls(store.num_documents, store.num_tokens, lambda: store)


class StoreWriter:
    """Writer of a TokenStore. It holds the tokens in memory until `close`."""

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        self._path = folder / name
        self._dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self._lengths, self._tokens = array("q"), bytearray()

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

    def close(self) -> None:
        """Write the two files. Documents without tokens are left out."""
        lengths = np.array(self._lengths, dtype=np.int64)
        np.save(f"{self._path}{TOKENS}", np.frombuffer(self._tokens, self._dtype))
        np.save(f"{self._path}{OFFSETS}", np.concatenate([[0], np.cumsum(lengths[lengths > 0])]))


ShardManifest = dict[str, Any]
"""Facts about a shard in the manifest: its `name`, and its number of `documents`, `tokens` and `bytes` of text."""


class ShardWriter:
    """Writer of one split of a text as shards. No document is divided between shards."""

    def __init__(self, folder: Path, split: str, vocab_size: int) -> None:
        """Prepare to write shards `split`-000, `split`-001, ... in `folder`."""
        self._folder, self._split, self._vocab_size = folder, split, vocab_size
        self._writer: StoreWriter | None = None
        self.shards: list[ShardManifest] = []

    def add(self, ids: NDArray[np.int64], num_bytes: int, *, starts_document: bool) -> None:
        """Append the ids of `num_bytes` bytes of text to the last document, or as a new one."""
        if self._writer is None or (starts_document and self._is_full()):
            self.close()
            name = f"{self._split}-{len(self.shards):03}"
            self._writer = StoreWriter(self._folder, name, self._vocab_size)
            self.shards.append({"name": name, "documents": 0, "tokens": 0, "bytes": 0})
        self._writer.add(ids, starts_document=starts_document)
        shard = self.shards[-1]
        shard["documents"] += int(starts_document)
        shard["tokens"] += len(ids)
        shard["bytes"] += num_bytes

    def _is_full(self) -> bool:
        return self.shards[-1]["tokens"] >= SHARD_TOKENS or self.shards[-1]["documents"] >= SHARD_DOCUMENTS

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def write_manifest(folder: Path, facts: Mapping[str, object], files: Mapping[str, object] | None = None) -> None:
    """Write the manifest: `facts`, the size and digest of each file, and a digest of all this.

    Without `files`, all files are read.
    """
    if files is None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): identity_of(path) for path in paths}
    facts = {**facts, "files": files}
    publish.write_file(folder / MANIFEST, json.dumps({**facts, "sha256": digest_of(facts)}, indent=1))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the facts in a folder's manifest; None if it is missing or has been altered."""
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(facts, dict) or facts.pop("sha256", None) != digest_of(facts):
        return None
    return facts


def is_complete(folder: Path, *, check: bool = False) -> bool:
    """Return whether the folder has a manifest, and all files the digests in it.

    Files whose stamps are as when they were last compared are not read, unless `check` is set.
    """
    facts = read_manifest(folder)
    if facts is None:
        return False
    checked: dict[str, object] = {}
    with suppress(OSError, ValueError):
        if isinstance(record := json.loads((folder / CHECKED).read_bytes()), dict):
            checked = record
    try:
        stamps = {name: [*stamp(folder / name)] for name in facts["files"]}
        changed = [name for name in stamps if check or stamps[name] != checked.get(name)]
        with ThreadPoolExecutor(available_processors()) as pool:  # hashing needs no lock
            identities = pool.map(identity_of, [folder / name for name in changed])
            if any(identity != facts["files"][name] for name, identity in zip(changed, identities, strict=True)):
                return False
    except FileNotFoundError:
        return False
    if stamps != checked:
        with suppress(OSError):  # without a record, files are compared again
            publish.write_file(folder / CHECKED, json.dumps(stamps))
    return True


def identity_of_files(facts: Mapping[str, Any], stores: Sequence[str]) -> str:
    """Return a digest of the arrays of some stores, from the digests in the manifest, in this order."""
    names = [f"{store}{part}" for store in stores for part in (OFFSETS, TOKENS)]
    return digest_of_lines(facts["files"][name]["sha256"] for name in names)


def digest_of(facts: Mapping[str, object]) -> str:
    """Return one digest for facts by name, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def digest_of_lines(lines: Iterable[str]) -> str:
    """Return one digest for several strings in this order, as 32 hexadecimal digits: it names a folder of the cache."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def identity_of(path: Path) -> dict[str, object]:
    """Return the size and digest of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
