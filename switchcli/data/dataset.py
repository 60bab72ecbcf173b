"""TokenDataset: the shards of a text as an endless sequence of raw rows. Each row is a pure function of (seed, row).

An epoch visits the shards in a random order, one window of WINDOW_SHARDS shards after the other, so that only the
shards of a window are open, however large the text is. Within a shard, documents are shuffled and concatenated without
EOS between them, as in T5, and cut into rows; what is left at the end of a shard, less than a row, is not used. Rows of
whole documents are packed once. The rows of a window are shuffled, so that no batch is filled by one shard or one long
document.

Legend  R rows  L raw tokens of a row  S shards  W windows  D documents  X pieces of documents
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.data.config import RowObjective
from switchcli.data.objectives.example_packing import concatenated_ranges
from switchcli.data.objectives.packed_documents import WholeDocumentObjective
from switchcli.data.prepare.store import TokenShard, TokenStore
from switchcli.data.rng import CHUNKS, DOCUMENTS, SHARDS, permutation
from switchcli.errors import DataError

WINDOW_SHARDS = 8
"""Shards whose rows are shuffled together."""
SMALL_TOKENS = 2**20
"""Tokens below which a shard is merged with others, in memory."""
_NUM_CACHED = 2
"""Epoch orders and windows that are kept: where a batch extends over the end of one, or the next batch is made
ahead, two are in use."""


class EpochOrder(NamedTuple):
    """The order of the shards in an epoch, and its division into windows."""

    shard_S: NDArray[np.int64]
    """Indices of `TokenDataset._shards`, in the order of the epoch."""
    end_W: NDArray[np.int64]
    """The number of rows of the epoch up to the end of each window."""


class CountedShard(NamedTuple):
    """A shard and its number of rows."""

    number: int
    """Number of the shard in its text, which seeds the order of its documents."""
    shard: TokenShard
    num_rows: int


class TokenDataset:
    """Rows of raw tokens, epoch after epoch. Several threads may read at the same time."""

    def __init__(self, shards: Sequence[TokenShard], rows: RowObjective, seed: int, label: str = "") -> None:
        """Count the rows of each shard. For rows of whole documents this reads the index of every shard.

        Raises DataError, which names the text's `label`, if there is less than one row.
        """
        counted = [count_rows(shard, rows, seed, number) for number, shard in enumerate(shards)]
        self._shards = [shard for shard in counted if shard.num_rows]  # the others take no part in epochs
        self._rows_S = np.array([shard.num_rows for shard in self._shards], np.int64)
        self._rows, self._seed = rows, seed
        self.rows_per_epoch = int(self._rows_S.sum())
        """The number of rows of an epoch. They show each token at most once."""
        if not self.rows_per_epoch:
            num_tokens = sum(shard.num_tokens for shard in shards)
            num_documents = sum(shard.num_documents for shard in shards)
            min_tokens = 2 if isinstance(rows, WholeDocumentObjective) else rows.raw_tokens_per_row
            raise DataError(
                f"data{f' ({label})' if label else ''}: {num_tokens} tokens in {num_documents} documents, but one row "
                f"takes {min_tokens}: add text, or take a smaller inputs_length (for the held-out part, a larger "
                "held_out_fraction)"
            )
        self._order = lru_cache(_NUM_CACHED)(self._make_order)
        self._window = lru_cache(_NUM_CACHED)(self._make_window)

    def raw_rows(self, row_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return raw ids int64 [R, L] of these rows of the endless sequence."""
        raw_RL = np.empty((len(row_R), self._rows.raw_tokens_per_row), dtype=np.int64)
        epoch_R, row_in_epoch_R = np.divmod(row_R, self.rows_per_epoch)
        for epoch in np.unique(epoch_R):
            order = self._order(int(epoch))
            window_R = np.searchsorted(order.end_W, row_in_epoch_R, side="right")  # valid for rows of this epoch
            for window in np.unique(window_R[epoch_R == epoch]):
                in_window_R = (epoch_R == epoch) & (window_R == window)
                first_row = order.end_W[window - 1] if window else 0
                shuffled = self._window(int(epoch), int(window))
                raw_RL[in_window_R] = shuffled.raw_rows(row_in_epoch_R[in_window_R] - first_row)
        return raw_RL

    def _make_order(self, epoch: int) -> EpochOrder:
        shard_S = permutation(len(self._rows_S), self._seed, epoch, SHARDS)
        # Sums of the rows of WINDOW_SHARDS shards each; the last window may have fewer shards.
        first_shard_W = np.arange(0, len(shard_S), WINDOW_SHARDS)
        rows_W = np.add.reduceat(self._rows_S[shard_S], first_shard_W)
        return EpochOrder(shard_S, np.cumsum(rows_W))

    def _make_window(self, epoch: int, window: int) -> "ShuffleWindow":
        window_shards = self._order(epoch).shard_S[window * WINDOW_SHARDS : (window + 1) * WINDOW_SHARDS]
        shards = [self._shards[index] for index in window_shards.tolist()]
        return ShuffleWindow(shards, self._rows, self._seed, epoch, window)


# The rows of one shard, before they are shuffled


class _ContiguousRows:
    """Rows cut from the sequence of all documents of a shard, which are in another random order in each epoch."""

    def __init__(self, store: TokenStore, raw_length: int, seed: int, epoch: int, number: int) -> None:
        self._store, self._raw_length = store, raw_length
        order_D = permutation(store.num_documents, seed, epoch, DOCUMENTS, number)
        # The end of each document in the sequence of shuffled documents.
        self._end_D = np.cumsum(np.diff(store.offsets)[order_D])
        # A token at a position of the sequence is in the store at that position plus the shift of its document: the
        # distance between the ends of the document in both.
        self._shift_D = store.offsets[1:][order_D] - self._end_D

    def raw_rows(self, row_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return raw ids [R, L] of these rows."""
        # Each row is a range of the sequence, which is divided at the ends of documents into pieces.
        start_R = row_R * self._raw_length
        first_document_R = np.searchsorted(self._end_D, start_R, side="right")  # the document of the first token
        last_document_R = np.searchsorted(self._end_D, start_R + self._raw_length - 1, side="right")
        num_pieces_R = last_document_R - first_document_R + 1
        document_X = concatenated_ranges(first_document_R, num_pieces_R)
        row_start_X = np.repeat(start_R, num_pieces_R)
        # A piece is the part of a document that lies in the row, as a range of the sequence.
        document_start_X = np.where(document_X > 0, self._end_D[document_X - 1], 0)
        start_X = np.maximum(row_start_X, document_start_X)
        end_X = np.minimum(row_start_X + self._raw_length, self._end_D[document_X])
        position = concatenated_ranges(start_X + self._shift_D[document_X], end_X - start_X)  # [R * L], in the store
        return self._store.tokens[position].reshape(len(row_R), self._raw_length).astype(np.int64)


class _WholeDocumentRows:
    """Rows of whole documents, packed in one random order for all epochs."""

    def __init__(self, store: TokenStore, rows: WholeDocumentObjective, seed: int, number: int) -> None:
        self._store, self._raw_length = store, rows.raw_tokens_per_row
        self._order_D = permutation(store.num_documents, seed, 0, DOCUMENTS, number)
        self._pieces = rows.pack(np.diff(store.offsets)[self._order_D])
        self.num_rows = len(self._pieces.end_R)

    def raw_rows(self, row_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return raw ids [R, L] of these rows."""
        return self._pieces.raw_rows(self._store, self._order_D, row_R, self._raw_length)


class ShuffleWindow:
    """Some shards of an epoch, with all their rows in one random order."""

    def __init__(self, shards: Sequence[CountedShard], rows: RowObjective, seed: int, epoch: int, number: int) -> None:
        """`number` is that of the window in the epoch."""
        self._shards, self._rows, self._seed, self._epoch = shards, rows, seed, epoch
        # The number of rows up to the end of each shard, before shuffling.
        self._end_S = np.cumsum([shard.num_rows for shard in shards])
        self.num_rows = int(self._end_S[-1])
        self._order = permutation(self.num_rows, seed, epoch, CHUNKS, number)
        self._layouts: dict[int, _ContiguousRows | _WholeDocumentRows] = {}

    def raw_rows(self, position_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return raw ids [R, L] of the rows at these positions of the window."""
        raw_RL = np.empty((len(position_R), self._rows.raw_tokens_per_row), dtype=np.int64)
        row_R = self._order[position_R]
        shard_R = np.searchsorted(self._end_S, row_R, side="right")
        shards = np.unique(shard_R)
        unopened = [shard for shard in shards if shard not in self._layouts]
        if len(unopened) > 1:
            # The first batch of a run waits for them. Threads help, as reading and hashing need no interpreter lock.
            with ThreadPoolExecutor(len(unopened)) as pool:
                list(pool.map(self._layout, unopened))
        for shard in shards:
            in_shard_R = shard_R == shard
            first_row = self._end_S[shard - 1] if shard else 0
            raw_RL[in_shard_R] = self._layout(shard).raw_rows(row_R[in_shard_R] - first_row)
        return raw_RL

    def _layout(self, index: int) -> _ContiguousRows | _WholeDocumentRows:
        """Return the rows of a shard, given by its index in this window. The shard is opened at the first call."""
        if index not in self._layouts:
            number, shard, _ = self._shards[index]
            store, rows = shard.open(), self._rows
            if isinstance(rows, WholeDocumentObjective):
                self._layouts[index] = _WholeDocumentRows(store, rows, self._seed, number)
            else:
                self._layouts[index] = _ContiguousRows(store, rows.raw_tokens_per_row, self._seed, self._epoch, number)
        return self._layouts[index]


def count_rows(shard: TokenShard, rows: RowObjective, seed: int, number: int) -> CountedShard:
    """Return the shard with its number of rows. `number` is the shard's number in the text."""
    if isinstance(rows, WholeDocumentObjective):
        return CountedShard(number, shard, _WholeDocumentRows(shard.open(), rows, seed, number).num_rows)
    return CountedShard(number, shard, shard.num_tokens // rows.raw_tokens_per_row)


def group_small_shards(shards: Sequence[TokenShard]) -> list[TokenShard]:
    """Merge consecutive small shards, so that few tokens are left over at the ends of shards."""
    groups: list[list[TokenShard]] = []
    for shard in shards:
        is_small = shard.num_tokens < SMALL_TOKENS
        if groups and is_small and sum(member.num_tokens for member in groups[-1]) < SMALL_TOKENS:
            groups[-1].append(shard)
        else:
            groups.append([shard])
    return [group[0] if len(group) == 1 else _merge_shards(group) for group in groups]


def _merge_shards(shards: Sequence[TokenShard]) -> TokenShard:
    """Return a shard of the documents of several shards. They are read when it is opened."""

    def open_merged() -> TokenStore:
        stores = [shard.open() for shard in shards]
        lengths = np.concatenate([np.diff(store.offsets) for store in stores])
        return TokenStore(np.concatenate([store.tokens for store in stores]), np.append(0, np.cumsum(lengths)))

    return TokenShard(
        sum(shard.num_documents for shard in shards), sum(shard.num_tokens for shard in shards), open_merged
    )
