"""Packing: several short examples in one row, so that a short task does not pay for the longest input.

Each example's inputs and targets end in EOS, which no text holds: the model takes the end of a segment from there.

Legend  R rows  S source  T target positions  X examples
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.data.prepare.store import TokenStore
from switchcli.data.rng import permutation
from switchcli.spec import EOS, PAD

OPEN_ROWS = 32
"""Rows that wait for an example that fits: more pack closer and take longer."""


class RowLengths(NamedTuple):
    """What a row has room for, in tokens."""

    inputs: int
    targets: int


class PackedExamples(NamedTuple):
    """Which examples share a row, for the whole of a run. An example is cut where it is longer than a row."""

    inputs: TokenStore
    targets: TokenStore
    lengths: RowLengths
    example_X: NDArray[np.int64]
    """The examples, row by row."""
    end_R: NDArray[np.int64]
    """The end of each row's examples."""

    @property
    def num_rows(self) -> int:
        return len(self.end_R)

    @property
    def num_cut(self) -> int:
        """Examples whose inputs or targets are longer than a row."""
        stores = zip((self.inputs, self.targets), self.lengths, strict=True)
        return int(np.logical_or(*(np.diff(store.offsets) > length for store, length in stores)).sum())

    def rows(self, row_R: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs [R, S] and targets [R, T] of some rows, int64, padded at the end."""
        start_R = np.concatenate([[0], self.end_R[:-1]])[row_R]
        count_R = self.end_R[row_R] - start_R
        example_X = self.example_X[concatenated_ranges(start_R, count_R)]
        place_X = np.repeat(np.arange(len(row_R)), count_R)
        inputs, targets = (
            _rows_of(store, example_X, place_X, (len(row_R), length))
            for store, length in zip((self.inputs, self.targets), self.lengths, strict=True)
        )
        return inputs, targets


def pack(inputs: TokenStore, targets: TokenStore, lengths: RowLengths, seed: int) -> PackedExamples:
    """Pack all examples, in a random order: each into the first of the open rows that has room for it."""
    needs = np.stack([np.diff(store.offsets) for store in (inputs, targets)], axis=1)
    needs = np.minimum(needs, np.array(lengths))
    open_rows: list[_Row] = []
    full: list[_Row] = []
    for example in permutation(len(needs), seed, 0, 0):
        source, target = (int(need) for need in needs[example])
        row = next((row for row in open_rows if row.source >= source and row.target >= target), None)
        if row is None:
            if len(open_rows) == OPEN_ROWS:
                full.append(open_rows.pop(int(np.argmin([row.source for row in open_rows]))))
            row = _Row(lengths)
            open_rows.append(row)
        row.add(int(example), source, target)
    return pack_as_given(inputs, targets, lengths, [row.examples for row in full + open_rows])


def pack_as_given(
    inputs: TokenStore, targets: TokenStore, lengths: RowLengths, rows: Sequence[Sequence[int]]
) -> PackedExamples:
    """Rows of examples as they are given."""
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    examples = np.array([example for row in rows for example in row], dtype=np.int64)
    return PackedExamples(inputs, targets, lengths, examples, ends)


def store_from_texts(texts: Iterable[NDArray[np.int64]]) -> TokenStore:
    """A store in memory of ids, EOS after each text."""
    return store_from_ids([np.append(ids, EOS) for ids in texts])


def store_from_ids(texts: Sequence[NDArray[np.int64]]) -> TokenStore:
    """The same as they are; a text without ids is none."""
    found = [ids.astype(np.uint32) for ids in texts if len(ids)]
    offsets = np.cumsum([0, *map(len, found)], dtype=np.int64)
    return TokenStore(np.concatenate([np.zeros(0, np.uint32), *found]), offsets)


def concatenated_ranges(start: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """start[0], start[0] + 1, ... for count[0] of them, then start[1], ..."""
    before = np.cumsum(count) - count
    return np.repeat(start - before, count) + np.arange(count.sum())


class _Row:
    def __init__(self, lengths: RowLengths) -> None:
        self.source, self.target = lengths
        self.examples: list[int] = []

    def add(self, example: int, source: int, target: int) -> None:
        self.examples.append(example)
        self.source -= source
        self.target -= target


def _rows_of(
    store: TokenStore, example_X: NDArray[np.int64], place_X: NDArray[np.int64], shape: tuple[int, int]
) -> NDArray[np.int64]:
    """The examples, each in the row that `place_X` says; what is longer than a row is cut."""
    start_X = store.offsets[example_X]
    length_X = np.minimum(store.offsets[example_X + 1] - start_X, shape[1]) - 1
    return pad_rows(store.gather(concatenated_ranges(start_X, length_X)), length_X, place_X, shape)


def pad_rows(
    ids: NDArray[np.integer], length_X: NDArray[np.int64], row_X: NDArray[np.int64], shape: tuple[int, int]
) -> NDArray[np.int64]:
    """Texts, which lie end to end in `ids`, each in its row of ascending `row_X` with EOS behind it; padded."""
    behind_X = np.cumsum(length_X + 1) - (length_X + 1)
    first = np.searchsorted(row_X, np.arange(shape[0]))
    place_X = row_X * shape[1] + behind_X - np.append(behind_X, 0)[first][row_X]
    out = np.full(shape, PAD, dtype=np.int64)
    out.reshape(-1)[concatenated_ranges(place_X, length_X)] = ids
    out.reshape(-1)[place_X + length_X] = EOS
    return out
