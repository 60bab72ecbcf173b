"""TokenDataset: the rows of one shard as a plain gather has them; of several, by windows, and no more open than two."""

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from cpu_ratio import cpu_ratio
from hypothesis import given
from hypothesis import strategies as st
from messages import naming_words
from numpy.typing import NDArray

from switchcli.data import dataset as module
from switchcli.data.dataset import TokenDataset, group_small_shards
from switchcli.data.objectives.packed_documents import WholeDocumentObjective
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.store import TokenShard, TokenStore
from switchcli.data.rng import CHUNKS, DOCUMENTS, permutation
from switchcli.errors import DataError
from switchcli.spec import EOS

CORRUPTION = SpanCorruption(inputs_length=16)
LENGTH = CORRUPTION.raw_tokens_per_row
SPACING = 10_000
"""Distance between the tokens of two shards."""
WHOLE = WholeDocumentObjective(SpanCorruption(inputs_length=32))
TEXT = [[50, 3, 17, 200], [2, 9, 31, 44, 60], [1, 1, 5], [400], [33, 80, 7, 90, 21, 16], [LENGTH], [300, 2]]
"""Lengths of documents, by shard: one shard is less than a row."""

Ids = NDArray[np.int64]
lengths = st.lists(st.integers(1, 60), min_size=1, max_size=30)
numbers = st.integers(0, 2**62)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_SHARDS", 2)


def store(documents: Sequence[int], first: int = 100) -> TokenStore:
    """Documents of these lengths; token number i is first + i."""
    offsets = np.cumsum([0, *documents], dtype=np.int64)
    return TokenStore((first + np.arange(offsets[-1])).astype(np.uint32), offsets)


def stores(text: Sequence[Sequence[int]] = TEXT) -> list[TokenStore]:
    """Shards among which no token comes twice."""
    return [store(documents, 100 + SPACING * number) for number, documents in enumerate(text)]


def chunks(
    text: Sequence[Sequence[int]] = TEXT, seed: int = 3, rows: SpanCorruption | WholeDocumentObjective = CORRUPTION
) -> TokenDataset:
    return TokenDataset([*map(TokenShard.of, stores(text))], rows, seed)


def epoch_of(found: TokenDataset, number: int) -> Ids:
    return found.raw_rows(number * found.rows_per_epoch + np.arange(found.rows_per_epoch))


def plainly(store: TokenStore, raw_length: int, seed: int, epoch: int) -> Ids:
    """An epoch's rows [R, L] of one shard, each token looked up by itself: as it was before there were shards."""
    order_D = permutation(store.num_documents, seed, epoch, DOCUMENTS)
    end_D = np.cumsum(np.diff(store.offsets)[order_D])
    shift_D = store.offsets[1:][order_D] - end_D
    order_R = permutation(store.num_tokens // raw_length, seed, epoch, CHUNKS)
    position_RL = order_R[:, None] * raw_length + np.arange(raw_length)
    return store.tokens[position_RL + shift_D[np.searchsorted(end_D, position_RL, side="right")]].astype(np.int64)


@given(documents=lengths, seed=numbers, epoch=st.integers(0, 2**40), inputs_length=st.integers(3, 40))
def test_the_rows_of_one_shard_are_those_of_the_plain_gather(
    documents: list[int], seed: int, epoch: int, inputs_length: int
) -> None:
    rows, one = SpanCorruption(inputs_length=inputs_length), store(documents)
    if one.num_tokens < rows.raw_tokens_per_row:
        return
    found = TokenDataset([TokenShard.of(one)], rows, seed)
    wanted = plainly(one, rows.raw_tokens_per_row, seed, epoch)
    np.testing.assert_array_equal(epoch_of(found, epoch), wanted)
    backwards = epoch * found.rows_per_epoch + np.arange(found.rows_per_epoch)[::-1]
    np.testing.assert_array_equal(TokenDataset([TokenShard.of(one)], rows, seed).raw_rows(backwards), wanted[::-1])


@given(text=st.lists(lengths, min_size=1, max_size=7), seed=numbers, epoch=st.integers(0, 2**40))
def test_an_epoch_shows_every_token_once_but_for_the_tails_of_shards(
    text: list[list[int]], seed: int, epoch: int
) -> None:
    rows_S = [sum(documents) // LENGTH for documents in text]
    if not any(rows_S):
        return
    found = TokenDataset([*map(TokenShard.of, stores([[1], *text]))], CORRUPTION, seed)
    assert found.rows_per_epoch == sum(rows_S)
    shown = epoch_of(found, epoch)
    assert len(np.unique(shown)) == shown.size == sum(rows_S) * LENGTH
    assert np.bincount(shown[:, 0] // SPACING - 1, minlength=len(text)).tolist() == rows_S
    assert (shown // SPACING == shown[:, :1] // SPACING).all(), "a row is of one shard"


@given(seed=numbers, first=st.integers(0, 2**30), cuts=st.sets(st.integers(1, 199)), rows=st.sampled_from([0, 1]))
def test_any_split_of_the_rows_gives_the_same_ones(seed: int, first: int, cuts: set[int], rows: int) -> None:
    made_by = (CORRUPTION, WHOLE)[rows]
    row_R = first + np.arange(200)  # several windows, and several epochs
    whole = chunks(seed=seed, rows=made_by).raw_rows(row_R)
    asked = chunks(seed=seed, rows=made_by)
    parts = [asked.raw_rows(row_R[begin:end]) for begin, end in pairwise([0, *sorted(cuts), 200])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    order = np.random.default_rng(0).permutation(200)
    np.testing.assert_array_equal(asked.raw_rows(row_R[order]), whole[order])


def test_epochs_differ_in_windows_rows_and_what_lies_end_to_end() -> None:
    found = chunks()
    first, second = (epoch_of(found, epoch) for epoch in (0, 1))
    assert first.tolist() != second.tolist()
    assert {*map(tuple, first)} != {*map(tuple, second)}, "documents were put end to end in another order"
    windows = [{*(rows[:10, 0] // SPACING).tolist()} for rows in (epoch_of(found, epoch) for epoch in range(20))]
    assert len({frozenset(window) for window in windows}) > 3
    assert epoch_of(chunks(seed=4), 0).tolist() != first.tolist()


def test_a_window_mixes_its_shards_and_no_others() -> None:
    text = [[5 * LENGTH] * 6 for _ in range(6)]
    shard_R = epoch_of(chunks(text), 0)[:, 0] // SPACING
    for window in range(3):
        of_window = shard_R[60 * window : 60 * (window + 1)]
        assert len({*of_window}) == 2
        assert np.count_nonzero(np.diff(of_window)) > 10, "not one shard behind the other"
    assert len({*shard_R.tolist()}) == 6


def test_whole_documents_of_several_shards_share_rows_the_same_ones_in_every_epoch() -> None:
    found = chunks(rows=WHOLE)
    epochs = [epoch_of(found, epoch) for epoch in range(2)]
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist()) != epochs[0].tolist()
    assert epochs[0].tolist() != epochs[1].tolist()
    longest = WHOLE.objective.raw_tokens_per_row
    pieces = []
    for row in epochs[0]:
        ends = np.flatnonzero(row == EOS)
        pieces += [part[part != EOS].tolist() for part in np.split(row[: ends[-1] + 1], ends + 1)][:-1]
    wanted = [
        document[start : start + longest]
        for one in stores()
        for document in np.split(one.tokens, one.offsets[1:-1])
        for start in range(0, len(document), longest)
    ]
    assert sorted(pieces) == sorted(piece.tolist() for piece in wanted if len(piece) > 1)


class Opened:
    """Shards that note when they are opened, and know which of their arrays are still held."""

    def __init__(self, number: int, documents: Sequence[int]) -> None:
        self.opened: list[int] = []
        self._held: list[weakref.ref[Ids]] = []
        self.shards = [self._shard(one, documents) for one in range(number)]

    def _shard(self, number: int, documents: Sequence[int]) -> TokenShard:
        def opened() -> TokenStore:
            self.opened.append(number)
            found = store(documents, 100 + 1000 * number)
            self._held.append(weakref.ref(found.tokens))
            return found

        return TokenShard(len(documents), sum(documents), opened)

    def held(self) -> int:
        return sum(array() is not None for array in self._held)


def test_no_more_than_two_windows_are_held() -> None:
    opened = Opened(11, [40, 90, 130])
    found = TokenDataset(opened.shards, CORRUPTION, 0)
    assert opened.opened == []
    most = 0
    for row in range(0, 3 * found.rows_per_epoch, 5):
        found.raw_rows(row + np.arange(5))
        most = max(most, opened.held())
    assert most == 2 * 2
    assert len(opened.opened) == 3 * 11, "once an epoch each"


def test_small_shards_together_show_what_each_alone_would_leave_over() -> None:
    rows, documents = SpanCorruption(inputs_length=512), [120, 1, 379]
    text = [TokenShard.of(store(documents, 100 + 500 * number)) for number in range(1000)]
    with pytest.raises(DataError, match=naming_words("500000 3000 568 inputs_length")):
        TokenDataset(text, rows, 0)
    found = TokenDataset(group_small_shards(text), rows, 0)
    assert found.rows_per_epoch == 500_000 // 568
    shown = epoch_of(found, 0)
    assert shown.shape == (880, 568)
    assert len(np.unique(shown)) == shown.size
    assert shown.min() >= 100
    assert shown.max() < 100 + 500_000


@pytest.mark.parametrize("rows", [CORRUPTION, WHOLE])
@given(text=st.lists(lengths, min_size=1, max_size=12), small=st.integers(1, 1500))
def test_shards_put_together_are_the_same_documents_in_order_and_a_large_one_stays_itself(
    rows: SpanCorruption | WholeDocumentObjective, text: list[list[int]], small: int
) -> None:
    shards = [*map(TokenShard.of, stores(text))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALL_TOKENS", small)
        found = group_small_shards(shards)
    wanted = [document.tolist() for one in stores(text) for document in np.split(one.tokens, one.offsets[1:-1])]
    opened = [one.open() for one in found]
    assert [ids.tolist() for one in opened for ids in np.split(one.tokens, one.offsets[1:-1])] == wanted
    for one in found:
        assert (one.num_documents, one.num_tokens) == (one.open().num_documents, one.open().num_tokens)
        assert any(one is shard for shard in shards) or one.num_tokens < 2 * small
    assert all(any(one is shard for one in found) for shard in shards if shard.num_tokens >= small)
    assert all(first.num_tokens + second.num_tokens >= small for first, second in pairwise(found))


@pytest.mark.unit("rows0")
@pytest.mark.parametrize("rows", [CORRUPTION, WHOLE])
def test_threads_that_ask_at_once_get_the_same_rows(rows: SpanCorruption | WholeDocumentObjective) -> None:
    asked = [start + np.arange(32) for start in range(0, 3000, 24)]
    wanted = [chunks(rows=rows).raw_rows(row_R) for row_R in asked]
    shared = chunks(rows=rows)
    with ThreadPoolExecutor(8) as pool:
        for found, row_RL in zip(pool.map(shared.raw_rows, asked), wanted, strict=True):
            np.testing.assert_array_equal(found, row_RL)


@pytest.mark.parametrize(
    ("text", "rows", "words"),
    [
        ([[5, 3], [16]], CORRUPTION, "data de 24 3 17 inputs_length"),
        ([[1, 1], [1]], WHOLE, "data de 3 3 2"),
        ([], CORRUPTION, "data de 0 0 17"),
    ],
)
def test_less_than_a_row_is_refused_by_name(
    text: list[list[int]], rows: SpanCorruption | WholeDocumentObjective, words: str
) -> None:
    with pytest.raises(DataError, match=naming_words(words)):
        TokenDataset([*map(TokenShard.of, stores(text))], rows, 0, "de")


def test_a_row_of_the_millionth_epoch_is_had_as_soon_as_the_first() -> None:
    def read(epoch: int) -> None:
        opened = Opened(2000, [40] * 25)
        found = TokenDataset(opened.shards, CORRUPTION, 0)
        found.raw_rows(epoch * found.rows_per_epoch + np.arange(8))
        assert 1 <= len(opened.opened) <= 2, "of its window alone"

    assert cpu_ratio(lambda: read(10**6), lambda: read(0)) < 5
