"""TokenStore: documents as ids on disk, end to end in a memory-mapped array; and the folder that proves itself whole.

A folder is written elsewhere, sealed with a manifest of sizes and digests, and only then renamed into place, which is
`prepare`'s work.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

MANIFEST, TOKENS, OFFSETS = "manifest.json", "tokens.npy", "offsets.npy"
CHECKED_MEBIBYTES = 1024  # of each file: beyond it the size alone, for a start must not read hundreds of GB


class TokenStore(NamedTuple):
    """All documents of one part.

    tokens: uint16 or uint32 [num_tokens], memory-mapped, read only.
    offsets: int64 [num_documents + 1], where each document begins.
    """

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    offsets: NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path) -> Self:
        tokens = np.load(folder / TOKENS, mmap_mode="r", allow_pickle=False)
        return cls(tokens, np.load(folder / OFFSETS, allow_pickle=False))

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

    @classmethod
    def of(cls, store: TokenStore) -> Self:
        """Of a store that is open."""
        return cls(store.num_documents, store.num_tokens, lambda: store)


class StoreWriter:
    """Writes a TokenStore piece by piece, of a length not known beforehand; used in a `with`."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        folder.mkdir()
        self._folder = folder
        self._dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
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


def seal(folder: Path, facts: Mapping[str, object]) -> None:
    """Writes the manifest: `facts`, and the size and digest of every file in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    body = {**facts, "files": {path.relative_to(folder).as_posix(): _identity(path) for path in files}}
    text = json.dumps(body, indent=1)
    (folder / MANIFEST).write_text(json.dumps({"sha256": _digest(text.encode()), "manifest": text}), encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Whether the manifest is there and true of the folder's files."""
    try:
        sealed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if _digest(sealed["manifest"].encode()) != sealed["sha256"]:
            return False
        files = json.loads(sealed["manifest"])["files"]
        return all(_identity(folder / name) == identity for name, identity in files.items())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return False


def identity(folder: Path, parts: Iterable[str]) -> str:
    """A digest of the files of some parts of a sealed folder, by what its manifest says of them."""
    files = json.loads(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["manifest"])["files"]
    named = {name: facts for name, facts in sorted(files.items()) if name.split("/")[0] in parts}
    return _digest(json.dumps(named).encode())


def _identity(path: Path) -> dict[str, object]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for _ in range(CHECKED_MEBIBYTES):
            digest.update(file.read(2**20))
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
