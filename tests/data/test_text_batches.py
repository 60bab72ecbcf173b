"""The stream: a function of (seed, step), any split of the rows, every token once an epoch."""

from itertools import pairwise
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import naming_words
from numpy.typing import NDArray

from switchcli.data import dataset
from switchcli.data.batch import Batch
from switchcli.data.config import RowObjective
from switchcli.data.dataset import TokenDataset
from switchcli.data.objectives.packed_documents import WholeDocumentObjective
from switchcli.data.objectives.prefix_lm import PrefixLanguageModel
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.store import TokenShard, TokenStore
from switchcli.data.text_batches import PreparedTextSource
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError

CORRUPTION = SpanCorruption(inputs_length=16)
ROWS: list[RowObjective] = [
    *(SpanCorruption(inputs_length=length) for length in (16, 128, 256, 512)),
    PrefixLanguageModel(inputs_length=20, targets_length=20, text_length=20),
    WholeDocumentObjective(SpanCorruption(inputs_length=32)),
]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "WINDOW_SHARDS", 2)


LENGTHS = [1, 50, 3, 17, 200, 2, 9, 31, 44]


class _Sentinels:
    """Tokenizer with what the stream uses."""

    def __init__(self, number: int) -> None:
        self.sentinels: NDArray[np.int64] = 60_000 - np.arange(number)


class Stream(PreparedTextSource):
    """A text in some shards; token number i of all is 100 + i."""

    def __init__(
        self,
        lengths: list[int] = LENGTHS,
        *,
        seed: int = 3,
        batch: int = 8,
        rows: RowObjective = CORRUPTION,
        shards: int = 1,
    ) -> None:
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        tokens = (100 + np.arange(offsets[-1])).astype(np.uint16)
        stores = []
        for edge, end in pairwise(len(lengths) * number // shards for number in range(shards + 1)):
            within = offsets[edge : end + 1]
            stores.append(TokenStore(tokens[within[0] : within[-1]], within - within[0]))
        chunks = TokenDataset([*map(TokenShard.of, stores)], rows, seed)
        self.rows_per_epoch = chunks.rows_per_epoch
        super().__init__([chunks], cast("Tokenizer", _Sentinels(100)), rows, seed, batch)


def raw(batch: Batch) -> list[list[int]]:
    """The raw rows, from inputs and targets."""
    rows = []
    for inputs, targets in zip(batch.inputs_BS.tolist(), batch.targets_BT.tolist(), strict=True):
        hidden: dict[int, list[int]] = {}
        for index in targets[:-1]:
            if index > 50_000:
                hidden[index] = []
            else:
                hidden[list(hidden)[-1]].append(index)
        rows.append([token for index in inputs if index > 1 for token in hidden.get(index, [index])])
    return rows


def equal(a: Batch, b: Batch) -> bool:
    return torch.equal(a.inputs_BS, b.inputs_BS) and torch.equal(a.targets_BT, b.targets_BT)


@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: f"{type(rows).__name__} {rows.inputs_length}")
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**63), step=st.integers(0, 10**6), cuts=st.sets(st.integers(1, 7)), shards=st.integers(1, 6)
)
def test_any_split_of_the_rows_gives_the_same_batch(
    rows: RowObjective, seed: int, step: int, cuts: set[int], shards: int
) -> None:
    lengths = [12 * length for length in LENGTHS]
    whole = Stream(lengths, seed=seed, rows=rows, shards=shards).batch(step, 0, 8)
    assert whole.inputs_BS.shape == (8, rows.inputs_length)
    assert whole.targets_BT.shape == (8, rows.targets_length)
    assert whole.inputs_BS.dtype == whole.targets_BT.dtype == torch.int64
    edges = [0, *sorted(cuts), 8]
    asked = Stream(lengths, seed=seed, rows=rows, shards=shards)
    parts = [asked.batch(step, first, last - first) for first, last in pairwise(edges)]
    assert equal(whole, Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True))))


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    used = Stream()
    for step in (9, 0, 4, 31):
        used.batch(step, 2, 5)
    assert equal(used.batch(5, 0, 8), Stream().batch(5, 0, 8))
    assert not equal(used.batch(5, 0, 8), used.batch(6, 0, 8))
    assert not equal(used.batch(5, 0, 8), Stream(seed=4).batch(5, 0, 8))


def test_a_long_document_does_not_fill_a_batch() -> None:
    rows = raw(Stream([2000, 2000, 2000], batch=12).batch(0, 0, 12))
    assert len({(row[0] - 100) // 2000 for row in rows}) == 3


def test_too_few_sentinels_are_refused() -> None:
    words = "data.objective 227 100 inputs_length noise_density mean_span_length"
    with pytest.raises(DataError, match=naming_words(words)):
        Stream([5000], rows=SpanCorruption(inputs_length=4096))
