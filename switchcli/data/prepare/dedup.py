"""Duplicates: which documents say what an earlier one says, the same or nearly, found from their token ids.

Each document is boiled down to a few 64-bit keys, wherever it is read (`signatures`); documents that share one are
duplicates, whoever compares them (`kept`). Near ones are found by MinHash (Broder, 1997) in bands.

Legend  T tokens  D documents  B bands  M minima of a band
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.spec import Spec

NGRAM: Final = 5
BANDS: Final = 14
MINIMA: Final = 8
KEYS_AT_ONCE: Final = 2**24
"""Compared at once: some 1 GB."""
_TOKENS_AT_ONCE: Final = 2**16

Keys = NDArray[np.uint64]
Ids = NDArray[np.uint16] | NDArray[np.uint32]


class Duplicates(Spec):
    """Documents that go, since an earlier one is there: the same token by token, or one nearly the same.

    Near: each of 14 bands takes 8 minima over the document's 5-grams of tokens, and two documents with a Jaccard
    similarity s of these share a band with probability 1 - (1 - s^8)^14: 0.05 at s = 0.5, 0.21 at 0.6, 0.56 at 0.7,
    0.92 at 0.8, 0.9996 at 0.9, 1 at 1. A document of fewer than 5 tokens is like those with the very same alone.
    """

    kind: Literal["exact", "near"] = "near"

    @property
    def num_keys(self) -> int:
        """The number of keys of each document (B)."""
        return 1 if self.kind == "exact" else BANDS

    def signatures(self, ids_T: Ids, offsets: NDArray[np.int64]) -> Keys:
        """Keys [D, B] of documents end to end, each from an offset [D + 1] to the next; of any lengths, none too.

        Column by column in memory (Fortran order): `kept` reads it column by column.
        """
        if self.kind == "exact":
            return _sums(ids_T, offsets)[:, None]
        minima = _minima(ids_T, offsets).reshape(BANDS, MINIMA, -1)
        keys_BD = np.zeros((BANDS, minima.shape[-1]), dtype=np.uint64)
        for index in range(MINIMA):
            keys_BD = _mix(keys_BD + minima[:, index])
        return keys_BD.T


def first_occurrences(
    signatures: Sequence[Keys], track: Callable[[range], Iterable[int]] = lambda bands: bands
) -> list[NDArray[np.bool_]]:
    """Return for each piece a mask [D] of the documents that share no key, in the same band, with an earlier one.

    It does not matter whether that earlier one stays: so a document's fate depends on no order of comparing, nor on
    how documents are shared out among pieces. Arrays may be memory-mapped: `KEYS_AT_ONCE` keys are held at once.
    `track` shows progress over the bands.
    """
    starts = np.cumsum([0, *(len(piece) for piece in signatures)])
    stays = np.ones(starts[-1], dtype=np.bool_)
    if len(stays):
        num_ranges = -(-len(stays) // KEYS_AT_ONCE)
        edges = [index * 2**64 // num_ranges for index in range(num_ranges + 1)]
        for band in track(range(signatures[0].shape[1])):
            for low, high in pairwise(edges):
                stays[_repeats([piece[:, band] for piece in signatures], starts, low, high - 1)] = False
    return [stays[first:end] for first, end in pairwise(starts)]


def _repeats(columns: Sequence[Keys], starts: NDArray[np.int64], low: int, high: int) -> NDArray[np.int64]:
    """The documents with a key of low..high that an earlier document has."""
    found = []
    for column, start in zip(columns, starts, strict=False):
        (rows,) = np.nonzero((column >= np.uint64(low)) & (column <= np.uint64(high)))
        found.append((column[rows], rows + start))
    keys, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(keys, kind="stable")  # stable: of equal keys the earliest document is first
    again = keys[order[1:]] == keys[order[:-1]]
    return rows[order[1:][again]]


class _Block(NamedTuple):
    """A range of tokens, low..high, of one or several documents."""

    low: int
    high: int
    owners: NDArray[np.int64]
    """The documents that have tokens in it."""
    firsts: NDArray[np.int64]
    """Where each of them begins, from `low`."""

    def spread(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """[T]: of each token, the value of its document."""
        return np.repeat(values[self.owners], np.diff(self.firsts, append=self.high - self.low))


def _blocks(offsets: NDArray[np.int64]) -> Iterator[_Block]:
    """All tokens, so few at a time that what is computed of them stays in the processor's cache."""
    (filled,) = np.nonzero(np.diff(offsets))
    starts = offsets[filled]
    for low in range(0, int(offsets[-1]), _TOKENS_AT_ONCE):
        high = min(low + _TOKENS_AT_ONCE, int(offsets[-1]))
        inside = slice(np.searchsorted(starts, low, side="right") - 1, np.searchsorted(starts, high))
        yield _Block(low, high, filled[inside], np.maximum(starts[inside] - low, 0))


def _sums(ids_T: Ids, offsets: NDArray[np.int64]) -> Keys:
    """[D]: of each document, the sum of a random function of each token and its position."""
    sums = np.zeros(len(offsets) - 1, dtype=np.uint64)
    for block in _blocks(offsets):
        positions = np.arange(block.low, block.high) - block.spread(offsets)
        values = _mix(_mix(positions.astype(np.uint64)) + ids_T[block.low : block.high])
        sums[block.owners] += np.add.reduceat(values, block.firsts)
    return sums


def _minima(ids_T: Ids, offsets: NDArray[np.int64]) -> NDArray[np.uint32]:
    """[B * M, D]: of each document, the least value of each of B * M random functions over its n-grams."""
    draws = np.random.Philox(key=NGRAM).random_raw(2 * BANDS * MINIMA) >> np.uint64(32)
    factors, terms = draws.astype(np.uint32).reshape(2, -1)
    minima = np.full((BANDS * MINIMA, len(offsets) - 1), 2**32 - 1, dtype=np.uint32)
    for block in _blocks(offsets):
        grams = _grams(ids_T, offsets, block)
        hashes = np.empty_like(grams)
        for least, factor, term in zip(minima, factors | np.uint32(1), terms, strict=True):
            np.multiply(grams, factor, out=hashes)
            np.add(hashes, term, out=hashes)
            least[block.owners] = np.minimum(least[block.owners], np.minimum.reduceat(hashes, block.firsts))
    return minima


def _grams(ids_T: Ids, offsets: NDArray[np.int64], block: _Block) -> NDArray[np.uint32]:
    """[T]: a hash of the n-gram that begins at each token; near a document's end that of its last one, again."""
    ends = offsets[1:]
    starts = np.minimum(np.arange(block.low, block.high), block.spread(np.maximum(ends - NGRAM, offsets[:-1])))
    ends_T = block.spread(ends)
    grams = np.zeros(len(starts), dtype=np.uint64)
    for index, factor in enumerate(np.random.Philox(key=NGRAM + 1).random_raw(NGRAM) | np.uint64(1)):
        place = starts + index
        token = ids_T[np.minimum(place, len(ids_T) - 1)].astype(np.uint64) + np.uint64(1)
        grams += token * (place < ends_T) * factor  # a short document is a gram that ends in nothings
    return (_mix(grams) >> np.uint64(32)).astype(np.uint32)


def _mix(values: Keys) -> Keys:
    """Bits of each value spread over all 64: the finaliser of SplitMix64 (Steele et al., 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
