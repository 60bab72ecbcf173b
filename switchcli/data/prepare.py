"""Preparing data, once: documents are read, a vocabulary is trained if asked for, every document is cut into ids.

The outcome is a folder of the cache, named by everything that it depends on. It appears by a rename, whole or not at
all; a damaged one is made anew; of two processes that make the same one, the later uses the earlier's.
"""

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from switchcli.data.document import Document, is_held_out
from switchcli.data.spec import DataSpec
from switchcli.data.store import StoreWriter, TokenStore, identity, is_whole, seal
from switchcli.data.tokenizer import Tokenizer
from switchcli.errors import DataError, disk_errors

T = TypeVar("T")

FORMAT = 1  # raise when the same key would come to mean other ids
PART_CHARACTERS = 2**16  # longer documents are encoded in parts: the tokenizer holds many times its text in memory
CHUNK_CHARACTERS = 2**20  # encoded at once, by the tokenizer's own threads
TRAIN, HELD_OUT = "train", "held_out"


class Track(Protocol):
    """A progress bar: yields the items, showing how many went by, of how many if that is known."""

    def __call__(self, items: Iterable[T], label: str, total: int | None, /) -> Iterator[T]: ...


class Prepared(NamedTuple):
    """What training reads."""

    tokenizer: Tokenizer
    train: TokenStore
    held_out: TokenStore
    identity: str
    """A digest of the ids themselves: the same text, cut the same, has the same on any machine."""


def default_cache() -> Path:
    """`$SWITCHCLI_CACHE`, or ~/.cache/switchcli. Where a cache lies does not change a result."""
    return Path(os.environ.get("SWITCHCLI_CACHE") or Path.home() / ".cache" / "switchcli")


def prepare(spec: DataSpec, cache: Path, track: Track, tokenizer: Tokenizer | None = None) -> Prepared:
    """The spec's documents as ids, from the cache where they are there already.

    `tokenizer` takes the place of the spec's, for a model trained with it. Raises DataError for anything wrong with the
    text or the tokenizer, and when no document, or every one, is held out; CheckpointError for the cache folder.
    """
    folder = cache / "tokens" / _key(spec, tokenizer)
    # Corpora and tokenizers have told of their own files before.
    with cached(folder, lambda built: _build(spec, built, track, tokenizer)):
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return Prepared(
            Tokenizer.from_json(text, str(folder / "tokenizer.json")),
            TokenStore.open(folder / TRAIN),
            TokenStore.open(folder / HELD_OUT),
            identity(folder, (TRAIN, HELD_OUT)),
        )


@contextmanager
def cached(folder: Path, build: Callable[[Path], None]) -> Iterator[None]:
    """Within, `folder` is there and whole: what `build` makes, and seals, at the path that it is given, once.

    Raises:
        CheckpointError: what the disk refuses, from within too.
    """
    with disk_errors(folder.parents[1], "name another folder for the cache in $SWITCHCLI_CACHE"):
        if not is_whole(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                dir=folder.parent, prefix=".partial-", ignore_cleanup_errors=True
            ) as scratch:
                build(Path(scratch) / "built")
                _publish(Path(scratch), folder)
        yield


def _key(spec: DataSpec, tokenizer: Tokenizer | None) -> str:
    vocabulary = spec.tokenizer.fingerprint() if tokenizer is None else tokenizer.sha256
    parts = [str(FORMAT), *(corpus.fingerprint() for corpus in spec.corpora), vocabulary, repr(spec.held_out_fraction)]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _build(spec: DataSpec, folder: Path, track: Track, tokenizer: Tokenizer | None) -> None:
    def documents(label: str) -> Iterator[Document]:
        return track(chain.from_iterable(corpus.documents() for corpus in spec.corpora), label, None)

    def training_documents() -> Iterator[Document]:
        found = documents("reading for a vocabulary")
        return (document for document in found if not is_held_out(document.name, spec.held_out_fraction))

    folder.mkdir()
    used = tokenizer or spec.tokenizer.load(lambda: {"": training_documents()})
    (folder / "tokenizer.json").write_text(used.to_json(), encoding="utf-8")
    with (
        StoreWriter(folder / TRAIN, used.vocab_size) as train,
        StoreWriter(folder / HELD_OUT, used.vocab_size) as held_out,
    ):
        for chunk in _chunks(_parts(documents("tokenising"), spec.held_out_fraction)):
            for part, ids in zip(chunk, used.encode_batch([part.text for part in chunk]), strict=True):
                (held_out if part.held_out else train).add(ids, starts_document=part.starts_document)
    counts = {name: TokenStore.open(folder / name) for name in (TRAIN, HELD_OUT)}
    _check_split(counts[TRAIN].num_documents, counts[HELD_OUT].num_documents, spec.held_out_fraction)
    facts = {name: {"documents": store.num_documents, "tokens": store.num_tokens} for name, store in counts.items()}
    corpora = [corpus.fingerprint() for corpus in spec.corpora]
    seal(folder, {"format": FORMAT, "corpora": corpora, "tokenizer": used.sha256, **facts})


class _Part(NamedTuple):
    held_out: bool
    starts_document: bool
    text: str


def _parts(documents: Iterable[Document], fraction: float) -> Iterator[_Part]:
    for document in documents:
        held_out = is_held_out(document.name, fraction)
        for index, text in enumerate(_cut(document.text)):
            yield _Part(held_out, index == 0, text)


def _cut(text: str) -> Iterator[str]:
    """Parts of at most PART_CHARACTERS, cut at a space where possible: encoding begins each part with one again."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        space = text.rfind(" ", start + 1, start + PART_CHARACTERS)
        end = space if space > 0 else start + PART_CHARACTERS
        yield text[start:end]
        start = end + 1 if space > 0 else end
    yield text[start:]


def _chunks(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    chunk: list[_Part] = []
    size = 0
    for part in parts:
        chunk.append(part)
        size += len(part.text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _check_split(num_train: int, num_held_out: int, fraction: float) -> None:
    if not num_train or not num_held_out:
        total = num_train + num_held_out
        raise DataError(
            f"data.held_out_fraction ({fraction}) of {total} documents leaves {num_train} for training, {num_held_out} "
            "held out, both need one at least: change it, add text, or make the documents smaller (sample_by: line)"
        )


def _publish(scratch: Path, folder: Path) -> None:
    """Renames scratch/built to `folder`. Another process's, if whole, stays instead; a damaged one goes to scratch."""
    try:
        (scratch / "built").rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not is_whole(folder):
            folder.rename(scratch / "damaged")
            (scratch / "built").rename(folder)
