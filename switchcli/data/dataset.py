"""TokenDataset: the shards of a text as an endless sequence of raw rows. A row is a pure function of (seed, row).

Each epoch goes through the shards in a random order, a window of them at a time, so that no more than a window is open,
however large the text is. The documents of a shard are shuffled and put end to end without EOS between (T5), and cut
into chunks; the tail shorter than a chunk is left out. Whole documents are packed into rows once. The rows of a window
are shuffled, so that neither a shard nor a long document fills a batch.

Legend  R rows  L raw tokens of a row  S shards  W windows  D documents  X pieces of documents
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from switchcli.data.config import RowObjective
from switchcli.data.objectives.example_packing import concatenated_ranges
from switchcli.data.objectives.packed_documents import WholeDocumentObjective
from switchcli.data.prepare.store import TokenShard, TokenStore
from switchcli.data.rng import CHUNKS, DOCUMENTS, SHARDS, permutation
from switchcli.errors import DataError

WINDOW_SHARDS = 8
SMALL_TOKENS = 2**20
"""Shards of fewer are put together, in memory."""
_KEPT = 2
"""Epochs and windows: where a batch goes from one to the next, and workers are ahead, both are in use."""

K = TypeVar("K")
V = TypeVar("V")


class EpochOrder(NamedTuple):
    """An epoch's."""

    shard_S: NDArray[np.int64]
    end_W: NDArray[np.int64]
    """The rows of the epoch up to the end of each window."""


class CountedShard(NamedTuple):
    """A shard, and how many rows are in it."""

    shard: TokenShard
    num_rows: int


class TokenDataset:
    """Rows of raw tokens, epoch after epoch. Workers may ask at the same time."""

    def __init__(self, shards: Sequence[TokenShard], rows: RowObjective, seed: int, label: str = "") -> None:
        """Rows of whole documents take a look at the index of every shard, some 20 ms each.

        Raises DataError, naming the text's `label`, when there is less than a row.
        """
        self._shards = [count_rows(shard, rows, seed, number) for number, shard in enumerate(shards)]
        self._numbers_S = np.array([number for number, one in enumerate(self._shards) if one.num_rows], dtype=np.int64)
        self._rows_S = np.array([one.num_rows for one in self._shards if one.num_rows], dtype=np.int64)
        self._rows, self._seed = rows, seed
        self.rows_per_epoch = int(self._rows_S.sum())
        """Rows that show each token once at most."""
        if not self.rows_per_epoch:
            tokens, documents = sum(one.num_tokens for one in shards), sum(one.num_documents for one in shards)
            least = 2 if isinstance(rows, WholeDocumentObjective) else rows.raw_tokens_per_row
            raise DataError(
                f"data{f' ({label})' if label else ''}: {tokens} tokens in {documents} documents, but one row takes "
                f"{least}: add text, or take a smaller inputs_length (for the held-out part, a larger "
                "held_out_fraction)"
            )
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], ShuffleWindow] = OrderedDict()
        self._lock = Lock()

    def raw_rows(self, row_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Raw ids int64 [R, L] of rows of the endless sequence."""
        raw_RL = np.empty((len(row_R), self._rows.raw_tokens_per_row), dtype=np.int64)
        epoch_R, place_R = np.divmod(row_R, self.rows_per_epoch)
        for epoch in np.unique(epoch_R):
            order = self._order(int(epoch))
            window_R = np.searchsorted(order.end_W, place_R, side="right")
            for number in np.unique(window_R[epoch_R == epoch]):
                mine_R = (epoch_R == epoch) & (window_R == number)
                start = order.end_W[number - 1] if number else 0
                raw_RL[mine_R] = self._window(int(epoch), int(number), order.shard_S).raw_rows(place_R[mine_R] - start)
        return raw_RL

    def _order(self, epoch: int) -> EpochOrder:
        with self._lock:
            if epoch not in self._orders:
                shard_S = permutation(len(self._rows_S), self._seed, epoch, SHARDS)
                rows_W = np.add.reduceat(self._rows_S[shard_S], np.arange(0, len(shard_S), WINDOW_SHARDS))
                self._orders[epoch] = EpochOrder(shard_S, np.cumsum(rows_W))
            return _used(self._orders, epoch)

    def _window(self, epoch: int, number: int, shard_S: NDArray[np.int64]) -> "ShuffleWindow":
        with self._lock:
            if (epoch, number) not in self._windows:
                numbers = self._numbers_S[shard_S[number * WINDOW_SHARDS : (number + 1) * WINDOW_SHARDS]].tolist()
                shards = {index: self._shards[index] for index in numbers}
                self._windows[epoch, number] = ShuffleWindow(shards, self._rows, self._seed, epoch, number)
            return _used(self._windows, (epoch, number))


def _used(kept: OrderedDict[K, V], key: K) -> V:
    """What is kept under a key; what was used longest ago is not kept any more."""
    kept.move_to_end(key)
    if len(kept) > _KEPT:
        kept.popitem(last=False)
    return kept[key]


class RowLayout(ABC):
    """The documents of a shard as rows."""

    @abstractmethod
    def raw_rows(self, row_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Raw ids [R, L] of some rows."""


class _ContiguousRows(RowLayout):
    """One behind the other in the order of an epoch, cut into chunks."""

    def __init__(self, store: TokenStore, raw_length: int, seed: int, epoch: int, number: int) -> None:
        self._store, self._raw_length = store, raw_length
        order_D = permutation(store.num_documents, seed, epoch, DOCUMENTS, number)
        self._end_D = np.cumsum(np.diff(store.offsets)[order_D])
        # Where a shuffled position lies in the store: the position plus the shift of its document.
        self._shift_D = store.offsets[1:][order_D] - self._end_D

    def raw_rows(self, row_R: NDArray[np.int64]) -> NDArray[np.int64]:
        start_R = row_R * self._raw_length
        first_R = np.searchsorted(self._end_D, start_R, side="right")
        count_R = np.searchsorted(self._end_D, start_R + self._raw_length - 1, side="right") - first_R + 1
        document_X, start_X = concatenated_ranges(first_R, count_R), np.repeat(start_R, count_R)
        begin_X = np.maximum(start_X, np.where(document_X > 0, self._end_D[document_X - 1], 0))
        end_X = np.minimum(start_X + self._raw_length, self._end_D[document_X])
        place = concatenated_ranges(begin_X + self._shift_D[document_X], end_X - begin_X)
        return self._store.gather(place).reshape(len(row_R), self._raw_length).astype(np.int64)


class _WholeDocumentRows(RowLayout):
    """Whole documents that share rows, the same ones in every epoch."""

    def __init__(self, store: TokenStore, rows: WholeDocumentObjective, seed: int, number: int) -> None:
        self._store, self._raw_length = store, rows.raw_tokens_per_row
        self._order_D = permutation(store.num_documents, seed, 0, DOCUMENTS, number)
        self._pieces = rows.pack(np.diff(store.offsets)[self._order_D])
        self.num_rows = len(self._pieces.end_R)

    def raw_rows(self, row_R: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._pieces.raw_rows(self._store, self._order_D, row_R, self._raw_length)


class ShuffleWindow:
    """Some shards of an epoch, the rows of all of them in one random order."""

    def __init__(
        self, shards: Mapping[int, CountedShard], rows: RowObjective, seed: int, epoch: int, number: int
    ) -> None:
        """`shards` by their numbers in the text."""
        self._shards, self._rows, self._seed, self._epoch = shards, rows, seed, epoch
        self._numbers = list(shards)
        self._end_S = np.cumsum([one.num_rows for one in shards.values()])
        self.num_rows = int(self._end_S[-1])
        self._order = permutation(self.num_rows, seed, epoch, CHUNKS, number)
        self._laid: dict[int, RowLayout] = {}

    def raw_rows(self, place_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Raw ids [R, L] of the rows at these places of the window."""
        raw_RL = np.empty((len(place_R), self._rows.raw_tokens_per_row), dtype=np.int64)
        row_R = self._order[place_R]
        shard_R = np.searchsorted(self._end_S, row_R, side="right")
        shards = np.unique(shard_R)
        missing = [number for number in map(self._numbers.__getitem__, shards) if number not in self._laid]
        if len(missing) > 1:  # the first batch of a run waits for them: reading and checking leave the interpreter free
            with ThreadPoolExecutor(len(missing)) as pool:
                list(pool.map(self._enter, missing))
        for shard in shards:
            mine_R = shard_R == shard
            start = self._end_S[shard - 1] if shard else 0
            raw_RL[mine_R] = self._enter(self._numbers[shard]).raw_rows(row_R[mine_R] - start)
        return raw_RL

    def _enter(self, number: int) -> RowLayout:
        if number not in self._laid:
            store, rows = self._shards[number].shard.open(), self._rows
            if isinstance(rows, WholeDocumentObjective):
                self._laid[number] = _WholeDocumentRows(store, rows, self._seed, number)
            else:
                self._laid[number] = _ContiguousRows(store, rows.raw_tokens_per_row, self._seed, self._epoch, number)
        return self._laid[number]


def count_rows(shard: TokenShard, rows: RowObjective, seed: int, number: int) -> CountedShard:
    """The shard of this number with its rows."""
    if isinstance(rows, WholeDocumentObjective):
        return CountedShard(shard, _WholeDocumentRows(shard.open_index(), rows, seed, number).num_rows)
    return CountedShard(shard, shard.num_tokens // rows.raw_tokens_per_row)


def group_small_shards(shards: Sequence[TokenShard]) -> list[TokenShard]:
    """Small shards together, so that what is left over at the end of each is little of it."""
    groups: list[list[TokenShard]] = []
    for shard in shards:
        if groups and sum(one.num_tokens for one in groups[-1]) < SMALL_TOKENS > shard.num_tokens:
            groups[-1].append(shard)
        else:
            groups.append([shard])
    return [group[0] if len(group) == 1 else _merge_shards(group) for group in groups]


def _merge_shards(shards: Sequence[TokenShard]) -> TokenShard:
    def joined(stores: Iterable[TokenStore]) -> TokenStore:
        found = [*stores]
        lengths = np.concatenate([np.diff(store.offsets) for store in found])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.concatenate([store.gather(slice(None)) for store in found])
        return TokenStore(tokens, offsets)

    return TokenShard(
        sum(one.num_documents for one in shards),
        sum(one.num_tokens for one in shards),
        lambda: joined(one.open() for one in shards),
        lambda: joined(one.open_index() for one in shards),
    )
