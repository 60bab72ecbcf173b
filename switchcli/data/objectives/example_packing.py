"""Packing: several short examples in one row, so that short examples do not pay for the padding of the longest.

The inputs and the targets of each example end in EOS, which no text contains: the model finds the ends of examples by
it (model/packing.py).

Legend  R rows  S source  T target positions  X examples, or texts  K ranges  M numbers of all ranges
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.data.prepare.store import TokenStore
from switchcli.data.rng import EXAMPLES, permutation
from switchcli.spec import EOS, PAD

OPEN_ROWS = 32
"""Rows that wait for an example that fits. More rows give a closer packing, and packing takes longer."""


class RowLengths(NamedTuple):
    """The size of a row, in tokens."""

    inputs: int
    targets: int


class PackedExamples(NamedTuple):
    """The assignment of examples to rows, for a whole run. An example that is longer than a row is truncated."""

    inputs: TokenStore
    targets: TokenStore
    lengths: RowLengths
    example_X: NDArray[np.int64]
    """The numbers of the examples, row after row."""
    end_R: NDArray[np.int64]
    """The end of each row's examples in `example_X`."""

    @property
    def num_rows(self) -> int:
        return len(self.end_R)

    @property
    def num_truncated(self) -> int:
        """The number of examples whose inputs or targets are truncated."""
        inputs_X, targets_X = np.diff(self.inputs.offsets), np.diff(self.targets.offsets)
        return int(((inputs_X > self.lengths.inputs) | (targets_X > self.lengths.targets)).sum())

    def rows(self, row_R: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return inputs [R, S] and targets [R, T] of these rows, int64, padded at the end."""
        position_X, row_X = items_of_rows(self.end_R, row_R)
        example_X = self.example_X[position_X]
        inputs = _examples_in_rows(self.inputs, example_X, row_X, (len(row_R), self.lengths.inputs))
        targets = _examples_in_rows(self.targets, example_X, row_X, (len(row_R), self.lengths.targets))
        return inputs, targets


def pack(inputs: TokenStore, targets: TokenStore, lengths: RowLengths, seed: int) -> PackedExamples:
    """Pack all examples in a random order: each goes to the first open row that has room for it.

    If no open row has room, a new one is opened. If too many are open then, the one with the least room for inputs is
    closed first.
    """
    tokens_X2 = np.stack([np.diff(inputs.offsets), np.diff(targets.offsets)], axis=1)
    tokens_X2 = np.minimum(tokens_X2, np.array(lengths))  # longer examples are truncated
    open_rows: list[_OpenRow] = []
    closed_rows: list[_OpenRow] = []
    for example in permutation(len(tokens_X2), seed, 0, EXAMPLES):
        num_inputs, num_targets = (int(count) for count in tokens_X2[example])
        rows_with_room = (row for row in open_rows if row.input_room >= num_inputs and row.target_room >= num_targets)
        row = next(rows_with_room, None)
        if row is None:
            if len(open_rows) == OPEN_ROWS:
                fullest = int(np.argmin([row.input_room for row in open_rows]))
                closed_rows.append(open_rows.pop(fullest))
            row = _OpenRow(lengths)
            open_rows.append(row)
        row.add(int(example), num_inputs, num_targets)
    return pack_as_given(inputs, targets, lengths, [row.examples for row in closed_rows + open_rows])


def pack_as_given(
    inputs: TokenStore, targets: TokenStore, lengths: RowLengths, rows: Sequence[Sequence[int]]
) -> PackedExamples:
    """Return a packing whose rows hold the examples with these numbers."""
    end_R = np.cumsum([len(row) for row in rows], dtype=np.int64)
    example_X = np.array([example for row in rows for example in row], dtype=np.int64)
    return PackedExamples(inputs, targets, lengths, example_X, end_R)


class _OpenRow:
    """A row that `pack` fills: its examples, and the tokens that it still has room for."""

    def __init__(self, lengths: RowLengths) -> None:
        self.input_room, self.target_room = lengths
        self.examples: list[int] = []

    def add(self, example: int, num_inputs: int, num_targets: int) -> None:
        self.examples.append(example)
        self.input_room -= num_inputs
        self.target_room -= num_targets


def store_from_texts(texts: Iterable[NDArray[np.int64]]) -> TokenStore:
    """Return an in-memory store of texts, given as ids without EOS; EOS is appended to each."""
    return store_from_ids([np.append(ids, EOS) for ids in texts])


def store_from_ids(texts: Sequence[NDArray[np.int64]]) -> TokenStore:
    """Return an in-memory store of texts, given as ids. Texts without ids are left out, and the others renumbered."""
    documents = [ids.astype(np.uint32) for ids in texts if len(ids)]
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return TokenStore(np.concatenate([np.zeros(0, np.uint32), *documents]), offsets)


def _examples_in_rows(
    store: TokenStore, example_X: NDArray[np.int64], row_X: NDArray[np.int64], shape: tuple[int, int]
) -> NDArray[np.int64]:
    """Return examples in their rows, an array of this `shape`; `row_X` is the row of each example, ascending."""
    start_X = store.offsets[example_X]
    num_tokens_X = np.minimum(store.offsets[example_X + 1] - start_X, shape[1])  # truncated to a row
    length_X = num_tokens_X - 1  # without EOS, which `pad_rows` appends, also to a truncated example
    return pad_rows(store.tokens[concatenated_ranges(start_X, length_X)], length_X, row_X, shape)


def items_of_rows(end_R: NDArray[np.int64], row_R: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of the items in these rows, and for each item the index of its row in `row_R`, both [X].

    Row r of a packing has the items end_R[r - 1]..end_R[r].
    """
    start_R = np.append(0, end_R)[row_R]
    count_R = end_R[row_R] - start_R
    return concatenated_ranges(start_R, count_R), np.repeat(np.arange(len(row_R)), count_R)


def pad_rows(
    ids: NDArray[np.integer], length_X: NDArray[np.int64], row_X: NDArray[np.int64], shape: tuple[int, int]
) -> NDArray[np.int64]:
    """Return texts in rows, each followed by EOS, and PAD after the last one of each row; int64, of this `shape`.

    Args:
        ids: tokens of all texts, end to end, without EOS.
        length_X: number of tokens of each text.
        row_X: the row of each text, ascending. Several texts may share a row, and rows may be empty.
        shape: number of rows, and tokens of a row. The texts of a row must fit, EOS included.
    """
    # Start of each text if all texts, with EOS, were end to end in one long row.
    start_X = np.cumsum(length_X + 1) - (length_X + 1)
    # The first text of each row, and its start. Empty rows at the end have none: the appended 0 stands for it.
    first_text_R = np.searchsorted(row_X, np.arange(shape[0]))
    row_start_R = np.append(start_X, 0)[first_text_R]
    # Start of each text in the flattened result: that of its row, plus its distance from the row's first text.
    position_X = row_X * shape[1] + start_X - row_start_R[row_X]
    out = np.full(shape, PAD, dtype=np.int64)
    flat = out.reshape(-1)  # a view
    flat[concatenated_ranges(position_X, length_X)] = ids
    flat[position_X + length_X] = EOS
    return out


def concatenated_ranges(start_K: NDArray[np.int64], count_K: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the ranges start[i] .. start[i] + count[i] - 1, concatenated: int64 [M]."""
    before_K = np.cumsum(count_K) - count_K  # where each range begins in the result
    # At position m of the result, range i has the number start[i] + (m - before[i]).
    return np.repeat(start_K - before_K, count_K) + np.arange(count_K.sum())
