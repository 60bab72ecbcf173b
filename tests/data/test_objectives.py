"""Prefix language modeling and UL2's denoisers: every token in one of inputs and targets, as a slow reading says."""

from collections import Counter
from typing import cast

import numpy as np
import pytest
import slow_span_corruption as slow
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import naming_words
from numpy.typing import NDArray
from pydantic import ValidationError

from switchcli.data.objectives.denoisers import Denoiser, Denoisers, PrefixLanguageModel
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError

FIRST_ID, EOS = 1000, 1  # raw ids are 1000 and on; sentinels are 900 and down
SENTINELS = 900 - np.arange(300)


class _Tokenizer:
    """Tokenizer with what objectives use: a prompt has one id per character."""

    def __init__(self, sentinels: NDArray[np.int64] = SENTINELS, unknown: str = "") -> None:
        self.sentinels, self._unknown = sentinels, unknown

    def encode(self, text: str) -> list[int]:
        return [2 if character in self._unknown else ord(character) for character in text]


def tokenizer(sentinels: NDArray[np.int64] = SENTINELS, unknown: str = "") -> Tokenizer:
    return cast("Tokenizer", _Tokenizer(sentinels, unknown))


def corrupt(
    spec: PrefixLanguageModel | Denoisers, rows: int, seed: int
) -> tuple[list[list[int]], list[list[int]], list[list[int]], list[list[int]]]:
    """Raw ids, draws, inputs, targets."""
    raw = FIRST_ID + np.arange(rows * spec.raw_tokens_per_row).reshape(rows, -1)
    draws = np.random.Philox(seed).random_raw(rows * spec.num_draws).reshape(rows, -1)
    inputs, targets = spec.build(tokenizer())(raw, draws)
    assert inputs.shape == (rows, spec.inputs_length)
    assert targets.shape == (rows, spec.targets_length)
    assert inputs.dtype == targets.dtype == np.int64
    return raw.tolist(), draws.tolist(), inputs.tolist(), targets.tolist()


# Prefix language modeling


@st.composite
def prefix_lms(draw: st.DrawFn) -> PrefixLanguageModel:
    inputs, targets = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    text = draw(st.none() | st.integers(2, inputs + targets - 2))
    return PrefixLanguageModel(inputs_length=inputs, targets_length=targets, text_length=text)


@settings(deadline=None)
@given(spec=prefix_lms(), seed=st.integers(0, 2**32))
def test_a_prefix_and_the_rest_are_the_text(spec: PrefixLanguageModel, seed: int) -> None:
    for raw, _, inputs, targets in zip(*corrupt(spec, 4, seed), strict=True):
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
    found = Counter(inputs.index(EOS) for inputs in corrupt(spec, 7000, 1)[2])
    assert set(found) == set(places)
    expected = 7000 / len(places)
    assert sum((count - expected) ** 2 / expected for count in found.values()) < 22.5, "99.9 % of 6 degrees"


def test_a_text_that_cannot_be_parted() -> None:
    with pytest.raises(ValidationError, match=naming_words("text_length 12 11 inputs_length 8 targets_length 5")):
        PrefixLanguageModel(inputs_length=8, targets_length=5, text_length=12)


# Denoisers


def denoisers() -> st.SearchStrategy[Denoisers]:
    one = st.builds(
        Denoiser,
        prompt=st.sampled_from(["", "[R]", "[S]", "X"]),
        noise_density=st.floats(0.05, 0.6),
        mean_span_length=st.none() | st.floats(2.0, 70.0),
        rate=st.floats(0.1, 3.0),
    )
    return st.builds(
        Denoisers,
        inputs_length=st.integers(8, 150),
        prompt_tokens=st.integers(3, 5),
        denoisers=st.tuples(one, one, one),
    ) | st.sampled_from([Denoisers(inputs_length=length) for length in (512, 256, 128)])


@settings(deadline=None, max_examples=150)
@given(spec=denoisers(), seed=st.integers(0, 2**32))
def test_a_row_is_a_prompt_and_the_slow_reference_of_its_denoiser(spec: Denoisers, seed: int) -> None:
    sentinels = SENTINELS.tolist()
    total = sum(one.rate for one in spec.denoisers)
    for raw, draws, inputs, targets in zip(*corrupt(spec, 5, seed), strict=True):
        at = draws[0] / 2**64 * total
        number = 0
        while at > spec.denoisers[number].rate:
            at -= spec.denoisers[number].rate
            number += 1
        one = spec.denoisers[number]
        share = slow.counts(spec.raw_tokens_per_row, one.noise_density, one.mean_span_length)
        expected = slow.corrupted(raw, share, draws[1:], sentinels)
        prompt = [ord(character) for character in one.prompt]
        assert inputs == slow.padded(prompt + expected[0], spec.inputs_length)
        assert targets == slow.padded(expected[1], spec.targets_length)
        body = inputs[len(prompt) : inputs.index(EOS)]
        assert slow.restored(body, targets[: targets.index(EOS)], sentinels) == raw
        if one.mean_span_length is None:
            assert body == [*raw[: share.kept], sentinels[0]], "the beginning alone is given"


@settings(deadline=None)
@given(spec=denoisers())
def test_a_row_takes_as_much_text_as_all_have_room_for(spec: Denoisers) -> None:
    def needs(length: int) -> list[slow.Counts]:
        return [slow.counts(length, one.noise_density, one.mean_span_length) for one in spec.denoisers]

    def most(length: int) -> int:
        return spec.prompt_tokens + 1 + max(share.kept + share.spans for share in needs(length))

    assert most(spec.raw_tokens_per_row) <= spec.inputs_length < most(spec.raw_tokens_per_row + 1)
    assert spec.targets_length == 1 + max(share.noise + share.spans for share in needs(spec.raw_tokens_per_row))
    assert spec.num_sentinels == max(share.spans for share in needs(spec.raw_tokens_per_row))


def test_the_default_is_ul2s_and_t5s_sentinels_are_enough() -> None:
    spec = Denoisers()
    table = [(one.prompt, one.mean_span_length, one.noise_density) for one in spec.denoisers]
    regular, sequential = [("[R]", 3, 0.15), ("[R]", 8, 0.15)], [("[S]", None, 0.25)]
    assert table == regular + sequential + [("[X]", 3, 0.5), ("[X]", 8, 0.5), ("[X]", 64, 0.15), ("[X]", 64, 0.5)]
    assert (spec.raw_tokens_per_row, spec.targets_length, spec.num_sentinels) == (564, 377, 94)
    spec.build(tokenizer(SENTINELS[:100]))


def test_denoisers_are_taken_by_their_rates() -> None:
    rates = (("a", 1.0), ("b", 2.0), ("c", 5.0))
    parts = tuple(Denoiser(prompt=name, noise_density=0.15, rate=rate) for name, rate in rates)
    spec = Denoisers(inputs_length=12, denoisers=parts)
    found = Counter(chr(inputs[0]) for inputs in corrupt(spec, 8000, 3)[2])
    assert sum((found[name] - 1000 * rate) ** 2 / (1000 * rate) for name, rate in rates) < 13.8, "99.9 %"


@pytest.mark.parametrize(
    ("spec", "of", "words"),
    [
        (
            Denoisers(prompt_tokens=2),
            tokenizer(),
            "data.objective.prompt_tokens 2 3 '[R]'",
        ),
        (
            Denoisers(),
            tokenizer(SENTINELS[:93]),
            "data.objective 94 93 inputs_length noise_density mean_span_length",
        ),
        (Denoisers(), tokenizer(unknown="RSX"), "data.objective.denoisers prompts '[R]' '[S]' '[X]'"),
    ],
)
def test_a_tokenizer_that_will_not_do(spec: Denoisers, of: Tokenizer, words: str) -> None:
    with pytest.raises(DataError, match=naming_words(words)):
        spec.build(of)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"inputs_length": 6}, "inputs_length 6 7 3 prompt_tokens 4"),
        ({"denoisers": ()}, "denoisers 1 1"),
        (
            {"denoisers": (Denoiser(prompt="", noise_density=0.8, mean_span_length=1.0),)},
            "noise_density 0.8 mean_span_length 1.0 406 101 noise_density mean_span_length",
        ),
    ],
)
def test_denoisers_that_cannot_be(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=naming_words(words)):
        Denoisers.model_validate(keys)
