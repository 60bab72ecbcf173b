"""Prefix language modeling: every token is in one of inputs and targets."""

from collections import Counter
from typing import cast

import numpy as np
import pytest
import slow_span_corruption as slow
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import naming_words
from pydantic import ValidationError

from switchcli.data.objectives.prefix_lm import PrefixLanguageModel
from switchcli.data.tokenizer.tokenizer import Tokenizer

FIRST_ID, EOS = 1000, 1


def corrupt(
    spec: PrefixLanguageModel, rows: int, seed: int
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Raw ids, inputs, targets."""
    raw = FIRST_ID + np.arange(rows * spec.raw_tokens_per_row).reshape(rows, -1)
    draws = np.random.Philox(seed).random_raw(rows * spec.num_draws).reshape(rows, -1)
    inputs, targets = spec.build(cast("Tokenizer", None))(raw, draws)
    assert inputs.shape == (rows, spec.inputs_length)
    assert targets.shape == (rows, spec.targets_length)
    assert inputs.dtype == targets.dtype == np.int64
    return raw.tolist(), inputs.tolist(), targets.tolist()


@st.composite
def prefix_lms(draw: st.DrawFn) -> PrefixLanguageModel:
    inputs, targets = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    text = draw(st.none() | st.integers(2, inputs + targets - 2))
    return PrefixLanguageModel(inputs_length=inputs, targets_length=targets, text_length=text)


@settings(deadline=None)
@given(spec=prefix_lms(), seed=st.integers(0, 2**32))
def test_a_prefix_and_the_rest_are_the_text(spec: PrefixLanguageModel, seed: int) -> None:
    for raw, inputs, targets in zip(*corrupt(spec, 4, seed), strict=True):
        prefix, rest = inputs[: inputs.index(EOS)], targets[: targets.index(EOS)]
        assert prefix + rest == raw
        assert prefix
        assert rest
        assert slow.padded([*prefix, EOS], spec.inputs_length) == inputs
        assert slow.padded([*rest, EOS], spec.targets_length) == targets


@pytest.mark.parametrize(
    ("lengths", "places"),
    [((8, 8, 8), range(1, 8)), ((8, 5, 9), range(5, 8)), ((4, 9, 6), range(1, 4)), ((8, 5, None), range(7, 8))],
)
def test_every_place_that_fits_is_equally_likely(lengths: tuple[int, int, int | None], places: range) -> None:
    spec = PrefixLanguageModel(inputs_length=lengths[0], targets_length=lengths[1], text_length=lengths[2])
    found = Counter(inputs.index(EOS) for inputs in corrupt(spec, 7000, 1)[1])
    assert set(found) == set(places)
    expected = 7000 / len(places)
    assert sum((count - expected) ** 2 / expected for count in found.values()) < 22.5, "99.9 % of 6 degrees"


def test_a_text_that_cannot_be_parted() -> None:
    with pytest.raises(ValidationError, match=naming_words("text_length 12 11 inputs_length 8 targets_length 5")):
        PrefixLanguageModel(inputs_length=8, targets_length=5, text_length=12)
