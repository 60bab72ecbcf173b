"""Packing: every example once, whole rows, nothing lost but what is cut, and said to be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchcli.data.objectives import example_packing
from switchcli.data.objectives.example_packing import PackedExamples, RowLengths, pack, pack_as_given, store_from_texts
from switchcli.spec import EOS, PAD

ROOM = RowLengths(12, 6)
PAIRS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10)), min_size=1, max_size=60)


def packed(pairs: list[tuple[int, int]], seed: int = 0) -> PackedExamples:
    """Example n has inputs of ids 1000 + n and targets of 5000 + n, as many as its pair says."""
    inputs, targets = (
        store_from_texts(np.full(pair[side], base + n) for n, pair in enumerate(pairs))
        for side, base in enumerate((1000, 5000))
    )
    return pack(inputs, targets, ROOM, seed)


def segments(row: np.ndarray) -> list[list[int]]:
    """The examples of a row, without their EOS; what stands behind the last must be padding."""
    ends = np.flatnonzero(row == EOS)
    assert (row[ends[-1] + 1 :] == PAD).all()
    return [part.tolist() for part in np.split(row, ends + 1)[:-1]]


@given(PAIRS, st.integers(0, 3))
def test_every_example_is_in_one_row_cut_to_its_room(pairs: list[tuple[int, int]], seed: int) -> None:
    whole = packed(pairs, seed)
    inputs, targets = whole.rows(np.arange(whole.num_rows))
    found = [
        (source[:-1], target[:-1])
        for one, other in zip(inputs, targets, strict=True)
        for source, target in zip(segments(one), segments(other), strict=True)
    ]
    wanted = [
        ([1000 + n] * min(source, ROOM.inputs - 1), [5000 + n] * min(target, ROOM.targets - 1))
        for n, (source, target) in enumerate(pairs)
    ]
    assert sorted(found) == sorted(wanted)
    cut = sum(source > ROOM.inputs - 1 or target > ROOM.targets - 1 for source, target in pairs)
    assert whole.num_truncated == cut


@given(PAIRS, st.data())
def test_rows_come_in_any_choice(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    whole = packed(pairs)
    inputs, targets = whole.rows(np.arange(whole.num_rows))
    chosen = np.array(data.draw(st.lists(st.integers(0, whole.num_rows - 1), min_size=1, max_size=9)))
    some = whole.rows(chosen)
    np.testing.assert_array_equal(some[0], inputs[chosen])
    np.testing.assert_array_equal(some[1], targets[chosen])


@pytest.mark.parametrize("length", [2, 5])
def test_short_examples_fill_the_rows(length: int) -> None:
    whole = packed([(length, 0)] * 300)
    inputs, _ = whole.rows(np.arange(whole.num_rows))
    assert (inputs != PAD).mean() > 0.95


def test_of_too_many_open_rows_the_fullest_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_packing, "OPEN_ROWS", 4)
    whole = packed([(7, 0), (3, 0)] * 200)
    inputs, _ = whole.rows(np.arange(whole.num_rows))
    assert (inputs != PAD).mean() > 0.9, "0.87 if it were the emptiest"


def test_another_seed_packs_otherwise_and_the_same_seed_the_same() -> None:
    pairs = [(n % 7, n % 3) for n in range(50)]
    first, again, other = packed(pairs, 1), packed(pairs, 1), packed(pairs, 2)
    np.testing.assert_array_equal(first.example_X, again.example_X)
    assert (first.example_X != other.example_X).any()


def test_rows_as_given() -> None:
    store = store_from_texts(np.full(n, 9) for n in (1, 2, 3))
    whole = pack_as_given(store, store, ROOM, [[2], [0, 1]])
    inputs, _ = whole.rows(np.arange(2))
    assert [[len(part) for part in segments(row)] for row in inputs] == [[4], [2, 3]]
