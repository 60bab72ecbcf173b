"""Chunks: the shards of a text as an endless sequence of raw rows, a pure function of (seed, row): nothing is replayed.

Each epoch goes through the shards in a random order, a window of them at a time, so that no more than a window is open,
however large the text is. The documents of a shard are shuffled and put end to end without EOS between (T5), and cut
into chunks; the tail shorter than a chunk is left out. The chunks of a window are shuffled, so that neither a shard nor
a long document fills a batch.

Legend  R rows  L raw tokens of a chunk  S shards  W windows  D documents  X pieces of documents
"""

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from switchcli.data.draws import CHUNKS, DOCUMENTS, SHARDS, permutation
from switchcli.data.packing import ranges
from switchcli.data.store import Shard, TokenStore
from switchcli.errors import DataError

WINDOW_SHARDS = 8
_KEPT_WINDOWS = 2
"""Where a batch goes from one window to the next, and workers are ahead, both are in use."""


class Chunks:
    """Rows of `raw_length` tokens, epoch after epoch. Workers may ask at the same time."""

    def __init__(self, shards: Sequence[Shard], raw_length: int, seed: int, label: str = "") -> None:
        """Raises DataError, naming the text's `label`, when there is less than a row."""
        self._shards = [shard for shard in shards if shard.num_tokens >= raw_length]
        self._raw_length, self._seed = raw_length, seed
        self._rows_S = np.array([shard.num_tokens // raw_length for shard in self._shards], dtype=np.int64)
        self.rows_per_epoch = int(self._rows_S.sum())
        """Rows that show each token once at most."""
        if not self.rows_per_epoch:
            documents, tokens = (sum(one[place] for one in shards) for place in (0, 1))
            raise DataError(
                f"data{f' ({label})' if label else ''}: {tokens} tokens in {documents} documents, but one row takes {raw_length}: add text, or take a "
                "smaller inputs_length (for the held-out part, a larger held_out_fraction)"
            )
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()
        self._lock = Lock()

    def raw(self, row_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Raw ids int64 [R, L] of rows of the endless sequence."""
        raw_RL = np.empty((len(row_R), self._raw_length), dtype=np.int64)
        epoch_R, place_R = np.divmod(row_R, self.rows_per_epoch)
        for epoch in np.unique(epoch_R):
            order_S = permutation(len(self._shards), self._seed, int(epoch), SHARDS)
            end_W = np.cumsum(np.add.reduceat(self._rows_S[order_S], np.arange(0, len(order_S), WINDOW_SHARDS)))
            window_R = np.searchsorted(end_W, place_R, side="right")
            for number in np.unique(window_R[epoch_R == epoch]):
                mine_R = (epoch_R == epoch) & (window_R == number)
                start = end_W[number - 1] if number else 0
                raw_RL[mine_R] = self._window(int(epoch), int(number), order_S).raw(place_R[mine_R] - start)
        return raw_RL

    def _window(self, epoch: int, number: int, order_S: NDArray[np.int64]) -> "_Window":
        with self._lock:
            if (epoch, number) not in self._windows:
                numbers = order_S[number * WINDOW_SHARDS : (number + 1) * WINDOW_SHARDS].tolist()
                shards = {index: self._shards[index] for index in numbers}
                self._windows[epoch, number] = _Window(shards, self._raw_length, self._seed, epoch, number)
            self._windows.move_to_end((epoch, number))
            if len(self._windows) > _KEPT_WINDOWS:
                self._windows.popitem(last=False)
            return self._windows[epoch, number]


class _Window:
    """Some shards of an epoch, the chunks of all of them in one random order."""

    def __init__(self, shards: dict[int, Shard], raw_length: int, seed: int, epoch: int, number: int) -> None:
        self._shards, self._raw_length, self._seed, self._epoch = shards, raw_length, seed, epoch
        self._numbers = list(shards)
        self._end_S = np.cumsum([shard.num_tokens // raw_length for shard in shards.values()])
        self._chunks = permutation(int(self._end_S[-1]), seed, epoch, CHUNKS, number)
        self._laid: dict[int, _Laid] = {}
        self._lock = Lock()

    def raw(self, place_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Raw ids [R, L] of the rows at these places of the window."""
        raw_RL = np.empty((len(place_R), self._raw_length), dtype=np.int64)
        chunk_R = self._chunks[place_R]
        shard_R = np.searchsorted(self._end_S, chunk_R, side="right")
        for shard in np.unique(shard_R):
            mine_R = shard_R == shard
            start = self._end_S[shard - 1] if shard else 0
            raw_RL[mine_R] = self._enter(self._numbers[shard]).raw(chunk_R[mine_R] - start, self._raw_length)
        return raw_RL

    def _enter(self, number: int) -> "_Laid":
        with self._lock:
            if number not in self._laid:
                self._laid[number] = _Laid(self._shards[number].open(), self._seed, self._epoch, number)
            return self._laid[number]


class _Laid:
    """The documents of a shard end to end, in the order of an epoch."""

    def __init__(self, store: TokenStore, seed: int, epoch: int, number: int) -> None:
        self._tokens = store.tokens
        order_D = permutation(store.num_documents, seed, epoch, DOCUMENTS, number)
        self._end_D = np.cumsum(np.diff(store.offsets)[order_D])
        # Where a shuffled position lies in the store: the position plus the shift of its document.
        self._shift_D = store.offsets[1:][order_D] - self._end_D

    def raw(self, chunk_R: NDArray[np.int64], raw_length: int) -> NDArray[np.int64]:
        """Raw ids [R, L] of some chunks."""
        start_R = chunk_R * raw_length
        first_R = np.searchsorted(self._end_D, start_R, side="right")
        count_R = np.searchsorted(self._end_D, start_R + raw_length - 1, side="right") - first_R + 1
        document_X, start_X = ranges(first_R, count_R), np.repeat(start_R, count_R)
        begin_X = np.maximum(start_X, np.where(document_X > 0, self._end_D[document_X - 1], 0))
        end_X = np.minimum(start_X + raw_length, self._end_D[document_X])
        place = ranges(begin_X + self._shift_D[document_X], end_X - begin_X)
        return self._tokens[place].reshape(len(chunk_R), raw_length).astype(np.int64)
