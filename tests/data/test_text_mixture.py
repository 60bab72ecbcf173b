"""Mixtures of texts: shares by hand and by bisection, kept to the row, the same on any ranks."""

import re
from collections import Counter
from itertools import chain
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from messages import naming_words
from numpy.typing import NDArray

from switchcli.data.batch import Batch
from switchcli.data.dataset import TokenDataset
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.store import TokenShard, TokenStore
from switchcli.data.text_batches import PreparedTextSource
from switchcli.data.text_mixture import TemperatureMixing, TextMixing, TextMixture, WeightedMixing
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.errors import RecipeError
from switchcli.training.microbatches import Loader, Microbatches

TOKENS = [8_000, 1_000, 1]
CORRUPTION = SpanCorruption(inputs_length=16)
LENGTH = CORRUPTION.raw_tokens_per_row
BATCH, MICROBATCH = 16, 2
MC4 = [int(2.6e12 * 0.9**rank) for rank in range(101)]
"""Tokens of 101 languages, of which the smallest has a 40,000th of the largest."""


@pytest.mark.parametrize(
    ("mixing", "weights", "wanted"),
    [
        (WeightedMixing(), [1.0, 1.0, 1.0], [1 / 3, 1 / 3, 1 / 3]),
        (WeightedMixing(), [3.0, 1.5, 0.5], [0.6, 0.3, 0.1]),
        (TemperatureMixing(alpha=0.0), [1.0, 1.0, 1.0], [1 / 3, 1 / 3, 1 / 3]),
        (TemperatureMixing(alpha=1.0), [1.0, 1.0, 1.0], [8000 / 9001, 1000 / 9001, 1 / 9001]),
        # 8000 ** 0.3 = 14.822688, 1000 ** 0.3 = 7.943282, 1 ** 0.3 = 1
        (TemperatureMixing(), [1.0, 1.0, 1.0], [14.822688 / 23.76597, 7.943282 / 23.76597, 1 / 23.76597]),
        (TemperatureMixing(alpha=0.0), [2.0, 1.0, 1.0], [1 / 3, 1 / 3, 1 / 3]),  # a recipe has no such weights
    ],
)
def test_shares_are_those_by_hand(mixing: TextMixing, weights: list[float], wanted: list[float]) -> None:
    np.testing.assert_allclose(mixing.row_fractions(TOKENS, weights, [1, 1, 1], 100), wanted, rtol=1e-6)


def test_what_a_text_may_not_show_goes_to_the_others_in_proportion() -> None:
    mixing = WeightedMixing(max_epochs=2.0)
    # 100 rows a run: at most 2 epochs of 5 rows are a tenth; 0.9 is left for 2 to 1.
    np.testing.assert_allclose(mixing.row_fractions([1, 1, 1], [2.0, 1.0, 1.0], [500, 500, 5], 100), [0.6, 0.3, 0.1])
    # The second is full only because the third gave some to it: 2 epochs of 14 rows.
    np.testing.assert_allclose(mixing.row_fractions([1, 1, 1], [2.0, 1.0, 1.0], [500, 14, 5], 100), [0.62, 0.28, 0.1])
    # As much as there is.
    np.testing.assert_allclose(mixing.row_fractions([1, 1, 1], [2.0, 1.0, 1.0], [20, 20, 10], 100), [0.4, 0.4, 0.2])
    nearly = WeightedMixing(max_epochs=1.0).row_fractions([1, 1], [1.0, 1.0], [499_999, 500_001], 10**6)
    np.testing.assert_allclose(nearly, [0.499999, 0.500001], rtol=1e-9)
    np.testing.assert_allclose(WeightedMixing().row_fractions([1, 1], [1.0, 1.0], [1, 1], 10**6), [0.5, 0.5])


def filled(wanted: list[float], most: list[float]) -> list[float]:
    """Shares min(most, level * wanted) that add up to 1, the level found by bisection."""
    low, high = 0.0, 1.0
    while sum(min(cap, high * want) for want, cap in zip(wanted, most, strict=True)) < 1 and high < 1e18:
        high *= 2
    for _ in range(200):
        level = (low + high) / 2
        total = sum(min(cap, level * want) for want, cap in zip(wanted, most, strict=True))
        low, high = (level, high) if total < 1 else (low, level)
    return [min(cap, high * want) for want, cap in zip(wanted, most, strict=True)]


texts = st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.01, 100), st.integers(1, 1000)), min_size=1, max_size=9)


@given(texts=texts, max_epochs=st.floats(0.1, 50), rows=st.integers(1, 3000), alpha=st.sampled_from([None, 0, 0.3, 1]))
def test_capped_shares_are_those_of_filling_up_slowly(
    texts: list[tuple[int, float, int]], max_epochs: float, rows: int, alpha: float | None
) -> None:
    tokens, weights, rows_per_epoch = (list(column) for column in zip(*texts, strict=True))
    mixing = (
        WeightedMixing(max_epochs=max_epochs)
        if alpha is None
        else TemperatureMixing(alpha=alpha, max_epochs=max_epochs)
    )
    wanted = mixing.weights(np.array(tokens), np.array(weights)).tolist()
    most = [max_epochs * each / rows for each in rows_per_epoch]
    assume(abs(sum(most) - 1) > 1e-9)  # whose rounding decides
    if sum(most) < 1:
        with pytest.raises(RecipeError, match=r"data\.mixture\.max_epochs\b.*\d.*\btrain\.steps\b"):
            mixing.row_fractions(tokens, weights, rows_per_epoch, rows)
        return
    found = mixing.row_fractions(tokens, weights, rows_per_epoch, rows)
    np.testing.assert_allclose(found, filled(wanted, most), rtol=1e-9, atol=1e-12)
    assert found.sum() == pytest.approx(1)
    assert (found <= most).all()


def test_the_way_out_of_too_little_text_is_one() -> None:
    mixing = WeightedMixing(max_epochs=2.0)
    with pytest.raises(RecipeError, match=naming_words("data.mixture.max_epochs 2 30 100 train.steps")) as raised:
        mixing.row_fractions([1, 1], [1.0, 1.0], [20, 10], 100)
    (found,) = re.findall(r"\b\d+\.\d+", str(raised.value))
    shares = WeightedMixing(max_epochs=float(found)).row_fractions([1, 1], [1.0, 1.0], [20, 10], 100)
    np.testing.assert_allclose(shares, [2 / 3, 1 / 3], atol=0.01)


def shares_of(mixing: TextMixing, tokens: list[int]) -> dict[str, float]:
    found = mixing.row_fractions(tokens, [1.0] * len(tokens), [10**9] * len(tokens), 1)
    return {f"text {number}": float(share) for number, share in enumerate(found)}


MIXTURES = {
    "thirds": {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3},
    "a small one": {"a": 0.7, "b": 0.2997, "c": 0.0003},
    "101 languages, 0.3": shares_of(TemperatureMixing(alpha=0.3), MC4),
    "101 languages, 0.7": shares_of(TemperatureMixing(alpha=0.7), MC4),
    "101 languages, alike": shares_of(TemperatureMixing(alpha=0.0), MC4),
}


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("name", MIXTURES)
def test_after_ten_thousand_rows_every_share_is_as_intended_within_a_hundredth(name: str, lanes: int) -> None:
    """A hundredth of the fraction itself, or the rows by which a stream shard is rounded."""
    mixture, rows = TextMixture(MIXTURES[name], seed=7, stream_shards=lanes), 10_000
    found = np.array([*mixture.fractions_after(rows).values()])
    intended = np.array([*MIXTURES[name].values()])
    assert found.sum() == pytest.approx(1)
    assert np.abs(found - intended).max() < 0.001
    off = np.abs(found - intended) * rows
    assert (off <= np.maximum(0.01 * intended * rows, 1.5 * np.sqrt(lanes) + 0.5)).all(), (off.max(), intended)
    after_long = np.array([*mixture.fractions_after(10**7 // lanes * lanes).values()])
    np.testing.assert_allclose(after_long, intended, rtol=0.01)


def test_a_share_of_less_than_a_row_of_the_longest_turn_is_refused_by_name() -> None:
    least = 2.0**-20
    assert TextMixture({"a": 1 - 2 * least, "b": 2 * least}, 0).fractions_after(10**6)["b"] > 0
    with pytest.raises(RecipeError, match=naming_words("data.mixture b 9.5e-07 1,048,576 language")):
        TextMixture({"a": 1 - 0.999 * least, "b": 0.999 * least}, 0)


@given(
    weights=st.lists(st.floats(0.05, 10), min_size=2, max_size=6), up=st.lists(st.booleans(), min_size=6, max_size=6)
)
def test_the_last_bits_of_shares_change_no_row(weights: list[float], up: list[bool]) -> None:
    """They are the processor's: a power or a sum may end in another bit on another."""
    shares = {str(number): weight / sum(weights) for number, weight in enumerate(weights)}
    other = {label: float(np.nextafter(share, one)) for (label, share), one in zip(shares.items(), up, strict=False)}
    first, second = TextMixture(shares, 0), TextMixture(other, 0)
    assert first.identity == second.identity
    np.testing.assert_array_equal(first.schedules[0](np.arange(500)), second.schedules[0](np.arange(500)))


def test_the_identity_of_a_mixture_is_of_its_texts_and_how_often_each_comes() -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    others = [{"a": 0.5, "b": 0.31, "c": 0.19}, {"a": 0.5, "b": 0.3, "d": 0.2}, {"a": 0.3, "b": 0.5, "c": 0.2}]
    assert len({TextMixture(one, 0).identity for one in (shares, *others)}) == 4


@given(
    weights=st.lists(st.floats(0.05, 10), min_size=1, max_size=6),
    rows=st.integers(0, 5000),
    seed=st.integers(0, 2**31 - 1),
    lanes=st.sampled_from([1, 4]),
)
def test_shown_is_what_counting_the_turns_row_by_row_gives(
    weights: list[float], rows: int, seed: int, lanes: int
) -> None:
    shares = {str(number): weight / sum(weights) for number, weight in enumerate(weights)}
    mixture = TextMixture(shares, seed, lanes)
    counts: Counter[str] = Counter()
    rows -= rows % lanes
    for turns in mixture.schedules:
        text_R, nth_R = turns(np.arange(rows // lanes))
        counts.update(str(text) for text in text_R.tolist())
        for text in range(len(weights)):
            assert sorted(nth_R[text_R == text]) == list(range(np.count_nonzero(text_R == text))), "rows in order"
    shown = mixture.fractions_after(rows)
    assert shown == {label: pytest.approx(counts[label] / max(1, rows)) for label in shares}
    assert mixture.compare_with_intended(rows) == {
        label: {"shown": shown[label], "intended": round(share, 12)} for label, share in shares.items()
    }


def test_turns_differ_among_lanes_seeds_and_from_one_to_the_next() -> None:
    mixture = TextMixture({"a": 0.5, "b": 0.3, "c": 0.2}, 0, stream_shards=2)
    first, lane = (turns(np.arange(600))[0].tolist() for turns in mixture.schedules)
    other = TextMixture(mixture.fractions, 1).schedules[0](np.arange(600))[0].tolist()
    assert first != lane != other != first
    assert first[:300] != first[300:]
    runs = np.diff(np.flatnonzero(np.diff(first)))
    assert len({*runs.tolist()}) > 1, "in a random order, not one after another"


class _Sentinels:
    """Tokenizer with what the stream uses."""

    sentinels: NDArray[np.int64] = 60_000 - np.arange(100)


def a_text(number: int) -> TokenDataset:
    """Its tokens are number * 1000 + 100 and so on."""
    length = LENGTH * (3 + 7 * number)
    tokens = (100 + 1000 * number + np.arange(length)).astype(np.uint16)
    return TokenDataset([TokenShard.of(TokenStore(tokens, np.array([0, length])))], CORRUPTION, seed=3)


def stream(shares: dict[str, float]) -> PreparedTextSource:
    texts, mixture = [a_text(number) for number in range(len(shares))], TextMixture(shares, seed=3)
    return PreparedTextSource(texts, cast("Tokenizer", _Sentinels()), CORRUPTION, 3, BATCH, mixture)


def texts_shown(batch: Batch) -> list[int]:
    """The text of each row."""
    return [next(index for index in row if 1 < index < 50_000) // 1000 for row in batch.inputs_BS.tolist()]


def test_rows_are_of_the_texts_that_the_turns_say_and_each_goes_through_its_own() -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    found = stream(shares)
    shown = Counter(text for step in range(100) for text in texts_shown(found.batch(step, 0, BATCH)))
    wanted = TextMixture(shares, seed=3).fractions_after(100 * BATCH)
    assert {label: shown[number] / (100 * BATCH) for number, label in enumerate(shares)} == wanted
    firsts: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(60):
        batch = found.batch(step, 0, BATCH)
        for row, text in zip(batch.inputs_BS.tolist(), texts_shown(batch), strict=True):
            firsts[text].append(row[0])  # is never hidden
    for text, shown_of_text in firsts.items():
        raw_RL = a_text(text).raw_rows(np.arange(len(shown_of_text)))
        assert shown_of_text == raw_RL[:, 0].tolist()
        assert len(raw_RL) > 3 * a_text(text).rows_per_epoch


@pytest.mark.unit("1", "2")
@pytest.mark.parametrize("world", [1, 2, 4])
def test_examples_are_the_same_on_any_ranks(world: int) -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    alone = stream(shares)
    loaders = []
    for rank in range(world):
        batches = Microbatches(stream(shares), BATCH, MICROBATCH, rank, world)
        loaders.append(Loader(batches, DistributedContext("cpu", "float32")))
    steps = [(0, 8), (30, 36), (59, 60)]  # from the beginning, and where a run is resumed
    each = [chain(*(loader.from_step(*some) for some in steps)) for loader in loaders]
    for coming in zip(*each, strict=True):
        ((step,), made) = {step for step, _ in coming}, [micro for _, micros in coming for micro in micros]
        assert [micro.number for micro in made] == list(range(BATCH // MICROBATCH))
        whole = alone.batch(step, 0, BATCH)
        for field in range(2):
            assert torch.equal(torch.cat([micro.batch[field] for micro in made]), whole[field])
    for loader in loaders:
        loader.__exit__(None, None, None)
