"""SpanStream: the store's tokens as batches of an objective, a pure function of (seed, step).

Each epoch shuffles the documents, puts them end to end without EOS between (T5), cuts that into chunks, and shuffles
the chunks, so that one long document does not fill a batch; the tail shorter than a chunk is left out. Whole
documents are packed into rows once, and each epoch shuffles the rows. Resuming replays nothing.

Legend  R rows  L raw tokens of a row
"""

import numpy as np
import torch
from numpy.typing import NDArray

from switchcli.data.batch import Batch
from switchcli.data.draws import CHUNKS, DOCUMENTS, SPANS, WORDS, permutation, philox
from switchcli.data.spec import Rows
from switchcli.data.store import TokenStore
from switchcli.data.tokenizer import Tokenizer
from switchcli.data.whole_documents import WholeDocuments
from switchcli.errors import DataError


class SpanStream:
    """Rows of an endless sequence of epochs, `batch_sequences` a step. Holds the order of one epoch at a time."""

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, rows: Rows, seed: int, batch_sequences: int) -> None:
        """Raises DataError when the store is smaller than a row, or as the objective says of the tokenizer."""
        self._corrupt = rows.build(tokenizer)
        self._whole = _Whole(store, rows, seed) if isinstance(rows, WholeDocuments) else None
        self.rows_per_epoch = self._whole.num_rows if self._whole else store.num_tokens // rows.raw_length
        """Rows that show each token once at most."""
        if not self.rows_per_epoch:
            raise DataError(
                f"data: {store.num_tokens} tokens in {store.num_documents} documents, but one row takes "
                f"{2 if self._whole else rows.raw_length}: add text, or take a smaller inputs_length (for the held-out "
                "part, a larger held_out_fraction)"
            )
        self._store, self._rows = store, rows
        self._seed, self._batch_sequences = seed, batch_sequences
        self._epoch: _Epoch | None = None

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Rows first..first+count of the step's batch: [count, inputs_length] and [count, targets_length]."""
        epochs, rows = np.divmod(step * self._batch_sequences + np.arange(first, first + count), self.rows_per_epoch)
        raw_RL = np.concatenate([self._raw(int(epoch), rows[epochs == epoch]) for epoch in np.unique(epochs)])
        inputs_RS, targets_RT = self._corrupt(raw_RL, self._draws(step, first, count))
        return Batch(torch.from_numpy(inputs_RS), torch.from_numpy(targets_RT))

    def _raw(self, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._whole:
            return self._whole.raw(epoch, rows)
        if self._epoch is None or self._epoch.number != epoch:
            self._epoch = _Epoch(self._store, self.rows_per_epoch, self._rows.raw_length, self._seed, epoch)
        return self._epoch.raw(rows)

    def _draws(self, step: int, first: int, count: int) -> NDArray[np.uint64]:
        """[count, num_draws]: each row has counts of its own, so that any split of the batch draws the same."""
        counts = -(-self._rows.num_draws // WORDS)
        bits = philox(self._seed, step, SPANS).advance(first * counts)
        return bits.random_raw(count * counts * WORDS).reshape(count, -1)[:, : self._rows.num_draws]


class _Whole:
    """Rows of whole documents, the same in every epoch in another order."""

    def __init__(self, store: TokenStore, rows: WholeDocuments, seed: int) -> None:
        self._store, self._raw_length, self._seed = store, rows.raw_length, seed
        self._documents = permutation(store.num_documents, seed, 0, DOCUMENTS)
        self._pieces = rows.pack(np.diff(store.offsets)[self._documents])
        self.num_rows = len(self._pieces.end_R)
        self._epoch, self._order = -1, self._documents

    def raw(self, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._epoch != epoch:
            self._epoch, self._order = epoch, permutation(self.num_rows, self._seed, epoch, CHUNKS)
        return self._pieces.raw(self._store, self._documents, self._order[rows], self._raw_length)


class _Epoch:
    """One order of the documents and of the chunks cut from them."""

    def __init__(self, store: TokenStore, num_chunks: int, raw_length: int, seed: int, number: int) -> None:
        self.number = number
        self._tokens, self._raw_length = store.tokens, raw_length
        documents = permutation(store.num_documents, seed, number, DOCUMENTS)
        ends = np.cumsum(np.diff(store.offsets)[documents])
        # Where a shuffled position lies in the store: the position plus the shift of its document.
        self._ends, self._shift = ends, store.offsets[1:][documents] - ends
        self._chunks = permutation(num_chunks, seed, number, CHUNKS)

    def raw(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Raw ids int64 [R, L] of the epoch's rows [R]."""
        position_RL = self._chunks[rows][:, None] * self._raw_length + np.arange(self._raw_length)
        document_RL = np.searchsorted(self._ends, position_RL, side="right")
        return self._tokens[position_RL + self._shift[document_RL]].astype(np.int64)
