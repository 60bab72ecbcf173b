"""Duplicates: find documents that repeat an earlier one, exactly or nearly, by their token ids, and leave them out.

Each document gets a few 64-bit keys (`Duplicates.signatures`), which depend on that document alone. Two documents are
duplicates if they have the same key in the same band (`first_occurrences`). Near duplicates are found by MinHash in
bands (Broder, 1997).

Texts without duplicates are made from prepared texts, by their ids alone (`distinct_texts`).

Legend  T tokens  D documents  B bands  M minima of a band  K documents with tokens in a block
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.data.prepare.cache import ELSEWHERE, build_atomically, is_usable, scratch_folder
from switchcli.data.prepare.prepare_context import PrepareContext, Track
from switchcli.data.prepare.prepared_text import (
    HELD_OUT,
    TRAIN,
    PreparedText,
    open_prepared_text,
    write_text_manifest,
)
from switchcli.data.prepare.store import (
    ShardManifest,
    StoreWriter,
    TokenShard,
    digest_of_lines,
)
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import disk_errors
from switchcli.spec import Spec

NGRAM: Final = 5
BANDS: Final = 14
MINIMA: Final = 8
KEYS_AT_ONCE: Final = 2**24
"""Keys that are sorted at once, which takes about 1 GB."""
_TOKENS_AT_ONCE: Final = 2**16
"""Tokens that are hashed at once: few, so that the intermediate arrays stay in the processor's cache."""

Keys = NDArray[np.uint64]
Ids = NDArray[np.uint16] | NDArray[np.uint32]


class Duplicates(Spec):
    """Rule for leaving out documents that repeat an earlier document, token by token or nearly.

    Near: each of 14 bands takes 8 minima over the document's 5-grams of tokens, and two documents with a Jaccard
    similarity s of their 5-grams share a band with probability 1 - (1 - s^8)^14: 0.05 at s = 0.5, 0.21 at 0.6, 0.56 at
    0.7, 0.92 at 0.8, 0.9996 at 0.9, 1 at 1. A document of fewer than 5 tokens must be repeated exactly.
    """

    kind: Literal["exact", "near"] = "near"
    """Whether documents must agree in every token, or only in most of their 5-grams of tokens."""

    @property
    def num_keys(self) -> int:
        """The number of keys of each document (B)."""
        return 1 if self.kind == "exact" else BANDS

    def signatures(self, ids_T: Ids, offsets: NDArray[np.int64]) -> Keys:
        """Return the keys [D, B] of documents that lie end to end; document d is ids_T[offsets[d] : offsets[d + 1]].

        Documents may be empty. The array is in Fortran order, because `first_occurrences` reads it band by band.
        """
        if self.kind == "exact":
            return _position_sums(ids_T, offsets)[:, None]
        minima_BMD = _minima(ids_T, offsets).reshape(BANDS, MINIMA, -1)
        # A band's key is a hash of its M minima, taken in order.
        keys_BD = np.zeros((BANDS, minima_BMD.shape[-1]), dtype=np.uint64)
        for index in range(MINIMA):
            keys_BD = _mix(keys_BD + minima_BMD[:, index])
        return keys_BD.T


# Texts without duplicates


def distinct_texts(
    texts: Mapping[str, PreparedText], duplicates: Duplicates, tokenizer: Tokenizer, context: PrepareContext
) -> dict[str, PreparedText]:
    """Return each text without the documents that repeat one of the same text or of a text before it.

    Texts that are missing in the cache, or damaged, are built.
    """
    folders: dict[str, Path] = {}
    for label in texts:
        # What stays of a text depends on the texts before it, so that its folder is named by these too.
        names = [texts[earlier].folder.name for earlier in (*folders, label)]
        folders[label] = context.cache / "tokens" / digest_of_lines([*names, duplicates.model_dump_json()])
    with disk_errors(context.cache, ELSEWHERE):
        if missing := [label for label, folder in folders.items() if not is_usable(folder, context)]:
            # Texts after the last missing one have no effect on it.
            compared = [*texts][: [*texts].index(missing[-1]) + 1]
            with scratch_folder(context.cache / "tokens") as scratch:
                masks = find_distinct([texts[label] for label in compared], duplicates, scratch, context.track)
            masks_by_label = dict(zip(compared, masks, strict=True))
            reason = f"{duplicates.kind} duplicates"
            for label in missing:
                write = partial(
                    write_distinct, texts[label], masks_by_label[label], reason, tokenizer, track=context.track
                )
                build_atomically(folders[label], write)
        return {label: open_prepared_text(folder) for label, folder in folders.items()}


def find_distinct(
    texts: Sequence[PreparedText], duplicates: Duplicates, scratch: Path, track: Track
) -> list[list[NDArray[np.bool_]]]:
    """Return, for each shard of each text, a mask [D] of the documents that repeat no earlier one.

    Documents are in the order of the texts: of a document that several texts have, the first text keeps its copy. In
    each text the held-out documents come before those to train on: a model is not trained on what it is measured on.
    The masks of a text are in the order of `_shards`.

    `scratch` is a folder for the keys, 8 bytes for each document, or 112 for near duplicates. Raises DataError for a
    shard that cannot be read.
    """
    shards = [shard for text in texts for _, shard in _shards(text)]
    file = scratch / "keys"
    ends = [0]  # positions in the file, in keys: shard i has keys ends[i]..ends[i + 1]
    with file.open("wb") as keys_file:
        for shard in track(shards, "looking for duplicates, in shards", len(shards)):
            store = shard.open()
            keys_BD = duplicates.signatures(store.tokens, store.offsets).T
            keys_file.write(np.ascontiguousarray(keys_BD).data)
            ends.append(ends[-1] + keys_BD.size)
    all_keys = np.memmap(file, np.uint64, "r") if ends[-1] else np.zeros(0, np.uint64)  # an empty file cannot be mapped
    # The file holds [B, D] for each shard: the keys of a band are consecutive. The transposed view is [D, B].
    keys = [all_keys[start:end].reshape(duplicates.num_keys, -1).T for start, end in pairwise(ends)]
    masks = iter(first_occurrences(keys, lambda bands: track(bands, "comparing their keys, in bands", len(bands))))
    return [[next(masks) for _ in _shards(text)] for text in texts]


def write_distinct(
    text: PreparedText,
    masks: Sequence[NDArray[np.bool_]],
    reason: str,
    tokenizer: Tokenizer,
    folder: Path,
    track: Track,
) -> None:
    """Write a new text of the documents of `text` that `masks`, from `find_distinct`, selects, shard by shard.

    The other documents are counted as dropped for this `reason`. Raises DataError for a shard that cannot be
    read.
    """
    folder.mkdir()
    manifests: dict[str, list[ShardManifest]] = {TRAIN: [], HELD_OUT: []}
    dropped = Counter(text.dropped)
    shards = track(_shards(text), "leaving duplicates out, in shards", len(masks))
    for (split, shard), stays_D in zip(shards, masks, strict=True):
        store = shard.open()
        length_D = np.diff(store.offsets)
        name = f"{split}-{len(manifests[split]):05}"
        writer = StoreWriter(folder, name, tokenizer.vocab_size)
        stays_T = np.repeat(stays_D, length_D)  # each token stays if its document does
        writer.add_all(store.tokens[stays_T], length_D[stays_D])
        writer.close()
        num_tokens = int(length_D[stays_D].sum())
        # The bytes of a single document are not recorded, so that this is an average.
        counts = text.counts[split]
        num_bytes = round(num_tokens * counts.bytes / max(counts.tokens, 1))
        manifests[split].append(
            {"name": name, "documents": int(stays_D.sum()), "tokens": num_tokens, "bytes": num_bytes}
        )
        dropped[reason] += int((~stays_D).sum())
    write_text_manifest(folder, manifests, dropped, tokenizer.sha256)


def _shards(text: PreparedText) -> list[tuple[str, TokenShard]]:
    """Return the shards of a text in the order of comparison, each with its split."""
    return [(split, shard) for split in (HELD_OUT, TRAIN) for shard in text.shards[split]]


# Comparison of keys


def first_occurrences(
    keys: Sequence[Keys], track: Callable[[range], Iterable[int]] = lambda bands: bands
) -> list[NDArray[np.bool_]]:
    """Return, for the keys [D, B] of each shard, a mask [D] of the documents that share no key with an earlier one.

    The earlier document counts even if it is itself a duplicate. The result therefore depends neither on the order of
    comparison nor on how documents are divided among shards. The arrays may be memory-mapped; about KEYS_AT_ONCE keys
    are in memory at a time. `track` shows progress over the bands.
    """
    starts = np.cumsum([0, *(len(shard_keys) for shard_keys in keys)])  # number of each shard's first document
    stays = np.ones(starts[-1], dtype=np.bool_)
    if len(stays):
        # Keys are uniform, so equal ranges of their values hold about equally many. Equal keys are in the same range.
        num_ranges = -(-len(stays) // KEYS_AT_ONCE)
        edges = [index * 2**64 // num_ranges for index in range(num_ranges + 1)]
        for band in track(range(keys[0].shape[1])):
            columns = [shard_keys[:, band] for shard_keys in keys]
            for low, high in pairwise(edges):
                stays[_repeats(columns, starts, low, high - 1)] = False  # inclusive, as 2**64 is no uint64
    return [stays[start:end] for start, end in pairwise(starts)]


def _repeats(columns: Sequence[Keys], starts: NDArray[np.int64], low: int, high: int) -> NDArray[np.int64]:
    """Return the numbers of the documents with a key of low..high, inclusive, that an earlier document has too.

    `columns` are the keys [D] of each shard in one band, and `starts` the number of each shard's first document.
    """
    keys_in_range, documents_in_range = [], []
    for column, start in zip(columns, starts, strict=False):
        (indices,) = np.nonzero((column >= np.uint64(low)) & (column <= np.uint64(high)))
        keys_in_range.append(column[indices])
        documents_in_range.append(indices + start)
    keys, documents = np.concatenate(keys_in_range), np.concatenate(documents_in_range)
    order = np.argsort(keys, kind="stable")  # stable: among equal keys the earliest document is first
    repeats_previous = keys[order[1:]] == keys[order[:-1]]
    return documents[order[1:][repeats_previous]]


# Keys of documents


class _Block(NamedTuple):
    """A range low..high of the tokens of all documents, which lie end to end."""

    low: int
    high: int
    document_K: NDArray[np.int64]
    """The documents that have tokens in the block."""
    first_K: NDArray[np.int64]
    """The position of the first of these tokens of each document, counted from `low`."""

    def per_token(self, value_D: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return, for each token of the block [T], the value of its document."""
        num_tokens_K = np.diff(self.first_K, append=self.high - self.low)
        return np.repeat(value_D[self.document_K], num_tokens_K)


def _blocks(offsets: NDArray[np.int64]) -> Iterator[_Block]:
    """Yield blocks of at most _TOKENS_AT_ONCE tokens, which together hold all tokens."""
    (nonempty,) = np.nonzero(np.diff(offsets))
    starts = offsets[nonempty]  # strictly ascending
    num_tokens = int(offsets[-1])
    for low in range(0, num_tokens, _TOKENS_AT_ONCE):
        high = min(low + _TOKENS_AT_ONCE, num_tokens)
        # From the last document that starts at or before `low`, to the last one that starts before `high`.
        inside = slice(np.searchsorted(starts, low, side="right") - 1, np.searchsorted(starts, high))
        yield _Block(low, high, nonempty[inside], np.maximum(starts[inside] - low, 0))


def _position_sums(ids_T: Ids, offsets: NDArray[np.int64]) -> Keys:
    """Return, for each document [D], the sum modulo 2^64 of a hash of each token and its position in the document."""
    sums_D = np.zeros(len(offsets) - 1, dtype=np.uint64)
    for block in _blocks(offsets):
        positions_T = np.arange(block.low, block.high) - block.per_token(offsets)
        hashes_T = _mix(_mix(positions_T.astype(np.uint64)) + ids_T[block.low : block.high])
        # Added, because a document may go on from block to block.
        sums_D[block.document_K] += np.add.reduceat(hashes_T, block.first_K)
    return sums_D


def _minima(ids_T: Ids, offsets: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return, for each of B * M random functions and each document, the least value over its n-grams [B * M, D].

    The probability that a minimum of two documents is equal is their Jaccard similarity. A function maps the hash x of
    an n-gram to factor * x + term, modulo 2^32.
    """
    words = np.random.Philox(key=NGRAM).random_raw(2 * BANDS * MINIMA) >> np.uint64(32)
    factors, terms = words.astype(np.uint32).reshape(2, -1)
    factors |= np.uint32(1)  # an odd factor makes the function a permutation of the uint32 values
    minima = np.full((BANDS * MINIMA, len(offsets) - 1), 2**32 - 1, dtype=np.uint32)
    for block in _blocks(offsets):
        grams_T = _ngram_hashes(ids_T, offsets, block)
        hashes_T = np.empty_like(grams_T)
        for minimum_D, factor, term in zip(minima, factors, terms, strict=True):
            np.multiply(grams_T, factor, out=hashes_T)
            np.add(hashes_T, term, out=hashes_T)
            block_minimum_K = np.minimum.reduceat(hashes_T, block.first_K)
            # A document may go on from block to block.
            minimum_D[block.document_K] = np.minimum(minimum_D[block.document_K], block_minimum_K)
    return minima


def _ngram_hashes(ids_T: Ids, offsets: NDArray[np.int64], block: _Block) -> NDArray[np.uint32]:
    """Return a hash of the n-gram that begins at each token of the block [T].

    The last NGRAM - 1 tokens of a document give its last n-gram again, which does not change a minimum.

    Example with n-grams of 3: the documents a b c d and e f give abc, bcd, bcd, bcd and ef0, ef0. Their last n-grams
    start at the positions 1 and 4, so those of the six tokens start at 0, 1, 1, 1, 4, 4.
    """
    ends = offsets[1:]
    last_start_D = np.maximum(ends - NGRAM, offsets[:-1])  # a document shorter than NGRAM has one n-gram, at its start
    start_T = np.minimum(np.arange(block.low, block.high), block.per_token(last_start_D))
    end_T = block.per_token(ends)
    # The hash of an n-gram is the sum of its ids, each times an odd factor of its place, modulo 2**64, then mixed.
    hashes_T = np.zeros(len(start_T), dtype=np.uint64)
    for index, factor in enumerate(np.random.Philox(key=NGRAM + 1).random_raw(NGRAM) | np.uint64(1)):
        position_T = start_T + index
        # Beyond the end of a short document, zeros stand for tokens: ids count from 1, so that no token is zero. The
        # minimum keeps a position beyond the last document in bounds.
        token_T = ids_T[np.minimum(position_T, len(ids_T) - 1)].astype(np.uint64) + np.uint64(1)
        hashes_T += token_T * (position_T < end_T) * factor
    return (_mix(hashes_T) >> np.uint64(32)).astype(np.uint32)


def _mix(values: Keys) -> Keys:
    """Return a hash of each value: the finalizer of SplitMix64 (Steele et al., 2014), which mixes all bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
