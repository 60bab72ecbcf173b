"""Span corruption: T5's objective on chunks of token ids (section 2.1 of the paper).

What it is not: it reads no text and draws no random numbers; `switchcli.data.text_batches` does both.

    raw      a b c d e f g h i j         spans "c d" and "g h i j" are hidden
    inputs   a b <0> e f <1> </s>
    targets  <0> c d <1> g h i j </s>    no closing sentinel, as in T5's code

Texts of any lengths are corrupted at once, end to end: a chunk a row here, and what `objectives` and `whole_documents`
make of it.

Legend  R rows  L raw tokens  S source  T target positions  X texts  N items of a text
"""

from bisect import bisect_left
from collections.abc import Callable
from functools import cached_property, partial
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from switchcli.data.objectives.example_packing import concatenated_ranges, pad_rows
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError
from switchcli.spec import MOST, Spec

MAX_RAW = 1 << 23
"""Tokens of text of a row, at most."""
Ids = NDArray[np.int64]
Draws = NDArray[np.uint64]
Corrupt = Callable[[Ids, Draws], tuple[Ids, Ids]]
"""`(raw_RL, draws)`: inputs [R, S] and targets [R, T], int64, padded with 0, of raw ids and uniform numbers."""


class SpanCounts(NamedTuple):
    """How the tokens of a text are shared out."""

    num_kept: int
    num_noise: int
    num_spans: int

    @property
    def inputs(self) -> int:
        return self.num_kept + self.num_spans + 1

    @property
    def targets(self) -> int:
        return self.num_noise + self.num_spans + 1

    @classmethod
    def of(cls, raw_length: int, noise_density: float, mean_span_length: float | None) -> Self:
        """Return T5's counts for a text: at least one kept and one hidden token, and one span without a mean.

        Products and quotients are float32, as in T5, and round half to even: of 190 tokens 15 % are 28.500002, so 29
        are hidden, where float64 would give 28.5 and 28.
        """
        density = float(np.float32(noise_density))
        num_noise = min(max(_rounded(float(np.float32(raw_length)) * density), 1), raw_length - 1)
        if mean_span_length is None:
            return cls(raw_length - num_noise, num_noise, 1)
        num_spans = max(_rounded(float(np.float32(num_noise)) / float(np.float32(mean_span_length))), 1)
        return cls(raw_length - num_noise, num_noise, num_spans)

    def check(self, noise_density: float, mean_span_length: float | None) -> None:
        """Raise a ValueError where spans would touch."""
        if self.num_spans > self.num_kept:
            raise ValueError(
                f"noise_density ({noise_density}) and mean_span_length ({mean_span_length}) make "
                f"{self.num_spans} spans, but only {self.num_kept} tokens are left to part them: lower "
                "noise_density or raise mean_span_length"
            )


def _rounded(x: float) -> int:
    """Round the float32 nearest to x, half to even.

    The float64 product or quotient of two float32 numbers, rounded to float32, is what float32 arithmetic gives:
    float64 keeps more than twice the digits, so rounding twice is harmless.
    """
    return round(float(np.float32(x)))


def max_raw_tokens(fits: Callable[[int], bool]) -> int:
    """Return the most raw tokens, at least 2, that fit. More tokens never make shorter inputs.

    Raises ValueError where more than MAX_RAW fit, as when nearly all tokens are hidden.
    """
    top = 4
    while fits(top):
        top *= 2
        if top > MAX_RAW:
            raise ValueError(
                f"noise_density hides so much that a row takes more than {MAX_RAW:,} tokens of text: lower it, or take "
                "a smaller inputs_length"
            )
    return 2 + bisect_left(range(3, top + 1), True, key=lambda length: not fits(length))


class SpanCorruption(Spec):
    """Hides `noise_density` of the tokens in spans of `mean_span_length` on average; lengths are counts of tokens."""

    kind: Literal["span_corruption"] = "span_corruption"
    inputs_length: int = Field(default=512, ge=3, le=MOST["row_tokens"])
    """Tokens of the encoder's input, its sentinels and EOS included."""
    noise_density: float = Field(default=0.15, gt=0.0, lt=1.0)
    mean_span_length: float = Field(default=3.0, ge=1.0)

    @model_validator(mode="after")
    def _spans_fit(self) -> Self:
        self._lengths(self.raw_tokens_per_row).check(self.noise_density, self.mean_span_length)
        return self

    def _lengths(self, raw_length: int) -> SpanCounts:
        return SpanCounts.of(raw_length, self.noise_density, self.mean_span_length)

    @cached_property
    def raw_tokens_per_row(self) -> int:
        """The most raw tokens whose corrupted form fits `inputs_length`: 568 for 512.

        # Deviates: T5's helper counts in float64 here, though its masks count in float32. At other noise than the
        # default a text may then be one token longer or shorter, and T5 cuts or pads the row.
        """
        length = max_raw_tokens(lambda length: self._lengths(length).inputs <= self.inputs_length)
        lengths = self._lengths(length)
        # T5: at half noise the rounding may favour the targets by one token; the inputs are to be the longer.
        return length - 1 if self.noise_density == 0.5 and lengths.targets > lengths.inputs and length > 2 else length

    @property
    def num_noise(self) -> int:
        return self._lengths(self.raw_tokens_per_row).num_noise

    @property
    def num_sentinels(self) -> int:
        """Sentinels that a row needs: one for each hidden span."""
        return self._lengths(self.raw_tokens_per_row).num_spans

    @property
    def targets_length(self) -> int:
        """Tokens of a target row, sentinels and EOS included: 114 for 512."""
        return self._lengths(self.raw_tokens_per_row).targets

    @property
    def num_draws(self) -> int:
        """Random numbers that a row takes: one for each place where a segment may be cut."""
        return self.raw_tokens_per_row - 2

    def span_counts(self, length_X: Ids) -> Ids:
        """Kept tokens, hidden ones and spans [X, 3] of texts of 2 to `raw_length` tokens."""
        return self._span_counts_by_length[length_X]

    @cached_property
    def _span_counts_by_length(self) -> Ids:
        # A short text may leave fewer tokens to part its spans than they are.
        found = [self._lengths(length) for length in range(2, self.raw_tokens_per_row + 1)]
        return np.array([(0, 0, 0)] * 2 + [(kept, noise, min(kept, spans)) for kept, noise, spans in found])

    def build(self, tokenizer: Tokenizer) -> Corrupt:
        """Raises DataError when the tokenizer has fewer sentinels than a row needs."""
        return partial(self.corrupt, sentinels=get_sentinels(tokenizer, self.num_sentinels))

    def corrupt(self, raw_RL: Ids, draws: Draws, sentinels: Ids) -> tuple[Ids, Ids]:
        """Inputs [R, inputs_length] and targets [R, targets_length], int64, padded with 0, of raw ids [R, raw_length].

        `draws` [R, num_draws] are uniform; only their order within a row counts. `sentinels` [>= num_sentinels] are the
        ids in order of use.
        """
        row_R = np.arange(len(raw_RL))
        share_R3 = np.tile(self._lengths(self.raw_tokens_per_row), (len(raw_RL), 1))
        hidden = corrupt_spans(raw_RL.ravel(), share_R3, draws.ravel(), row_R * self.num_draws, sentinels)
        return (
            pad_rows(hidden.inputs, hidden.inputs_X, row_R, (len(raw_RL), self.inputs_length)),
            pad_rows(hidden.targets, hidden.targets_X, row_R, (len(raw_RL), self.targets_length)),
        )


class CorruptedTexts(NamedTuple):
    """Corrupted texts end to end, without EOS, and how many tokens each has."""

    inputs: Ids
    inputs_X: Ids
    targets: Ids
    targets_X: Ids


def corrupt_spans(raw: Ids, share_X3: Ids, draws: Draws, first_X: Ids, sentinels: Ids) -> CorruptedTexts:
    """Corrupt texts that lie end to end in `raw`, each of kept and hidden tokens and spans as `share_X3` says.

    Kept and hidden segments are cut independently, each way of cutting into non-empty ones being equally likely; they
    alternate, a kept one first. A text of N tokens takes N - 2 of the `draws`, from `first_X` on.
    """
    kept_X, noise_X, spans_X = share_X3.T
    kept, noise = (
        _segment_lengths(draws, first_X, kept_X, spans_X),
        _segment_lengths(draws, first_X + kept_X - 1, noise_X, spans_X),
    )
    hidden = np.repeat(np.tile([False, True], len(kept)), np.stack([kept, noise], axis=1).ravel())
    marks = sentinels[concatenated_ranges(np.zeros_like(spans_X), spans_X)]
    return CorruptedTexts(
        _replace_spans(raw, hidden, marks), kept_X + spans_X, _replace_spans(raw, ~hidden, marks), noise_X + spans_X
    )


def get_sentinels(tokenizer: Tokenizer, number: int) -> Ids:
    """The tokenizer's sentinels. Raises DataError when there are fewer."""
    if len(tokenizer.sentinels) < number:
        raise DataError(
            f"data.objective hides {number} spans a row and needs as many sentinels, the tokenizer has "
            f"{len(tokenizer.sentinels)}: take a smaller inputs_length or noise_density, or a larger mean_span_length"
        )
    return tokenizer.sentinels


def _segment_lengths(draws: Draws, first_X: Ids, items_X: Ids, segments_X: Ids) -> Ids:
    """Random lengths >= 1 of each text's segments, which add up to its items: cut where its N - 1 draws are least."""
    place, cuts_X, start_X = np.arange(items_X.max(initial=1) - 1), segments_X - 1, np.cumsum(items_X) - items_X
    least = draws.take(first_X[:, None] + place, mode="clip")
    least[place >= items_X[:, None] - 1] = np.iinfo(np.uint64).max
    # The cuts of each text come first; which they are is enough, so that most are not sorted.
    cut_XN = np.argpartition(least, np.unique(cuts_X[cuts_X > 0]) - 1, axis=1)[:, : cuts_X.max(initial=0)]
    cut = (start_X[:, None] + cut_XN)[np.arange(cut_XN.shape[1]) < cuts_X[:, None]]
    return np.diff(np.sort(np.concatenate([cut, start_X + items_X - 1])), prepend=-1)


def _replace_spans(raw: Ids, mask: NDArray[np.bool_], sentinels: Ids) -> Ids:
    """Each masked span becomes the next of the sentinels."""
    starts = mask.copy()
    starts[1:] &= ~mask[:-1]
    marked = raw.copy()
    marked[starts] = sentinels
    return marked[starts | ~mask]
