"""Span corruption: T5's objective on rows of token ids (section 2.1 of the paper).

    raw      a b c d e f g h i j         the spans "c d" and "g h i j" are noise: they are hidden
    inputs   a b <0> e f <1> </s>        each noise span becomes a sentinel
    targets  <0> c d <1> g h i j </s>    each span that is kept becomes a sentinel; no closing sentinel, as in T5's code

Texts of different lengths are corrupted together, end to end (`corrupt_spans`). Here each row is one text;
packed_documents.py calls `corrupt_spans` too. Nothing here reads text or draws random numbers: text_batches.py
does.

Legend  R rows  L raw tokens of a row  S source  T target positions  X texts  P gaps between a text's items (tokens)
K cuts of a text
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
from switchcli.spec import MAX_SIZE, Spec

MAX_RAW = 1 << 23
"""Upper bound on the raw tokens of a row."""
Ids = NDArray[np.int64]
Draws = NDArray[np.uint64]
Corrupt = Callable[[Ids, Draws], tuple[Ids, Ids]]
"""A function of raw ids [R, L] and uniform random numbers [R, num_draws] that returns inputs [R, S] and targets [R, T].

All ids are int64. Inputs and targets are padded with 0."""


class SpanCounts(NamedTuple):
    """The numbers of kept tokens, noise tokens and noise spans of a text. It has as many kept spans as noise spans."""

    num_kept: int
    num_noise: int
    num_spans: int

    @property
    def inputs_length(self) -> int:
        """Tokens of the inputs: kept tokens, a sentinel for each noise span, and EOS."""
        return self.num_kept + self.num_spans + 1

    @property
    def targets_length(self) -> int:
        """Tokens of the targets: noise tokens, a sentinel for each kept span, and EOS."""
        return self.num_noise + self.num_spans + 1

    @classmethod
    def of(cls, raw_length: int, noise_density: float, mean_span_length: float) -> Self:
        """Return T5's counts for a text: at least one kept and one noise token.

        Products and quotients are float32, as in T5, and round half to even. For example, 15 % of 190 tokens are
        28.500002 in float32, so 29 tokens are noise. In float64 they would be 28.5 and 28.
        """
        density = float(np.float32(noise_density))
        num_noise = min(max(_round_float32(float(np.float32(raw_length)) * density), 1), raw_length - 1)
        num_spans = max(_round_float32(float(np.float32(num_noise)) / float(np.float32(mean_span_length))), 1)
        return cls(raw_length - num_noise, num_noise, num_spans)


def _round_float32(x: float) -> int:
    """Round x to the nearest float32, then to the nearest integer, half to even.

    If x is the float64 product or quotient of two float32 numbers, its float32 is exactly the result of float32
    arithmetic, because float64 has more than twice the digits.
    """
    return round(float(np.float32(x)))


class SpanCorruption(Spec):
    """T5's span corruption: hides random spans of a text, and the targets are the hidden tokens."""

    kind: Literal["span_corruption"] = "span_corruption"
    """`span_corruption` hides random spans, which the model predicts (T5, and the paper)."""
    inputs_length: int = Field(default=512, ge=3, le=MAX_SIZE)
    """Tokens of the encoder's input, including its sentinels and EOS; 512 as in T5."""
    noise_density: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Fraction of the tokens that are hidden; 0.15 as in T5."""
    mean_span_length: float = Field(default=3.0, ge=1.0)
    """Average length of a hidden span, in tokens; 3 as in T5."""

    @model_validator(mode="after")
    def _spans_fit(self) -> Self:
        counts = self._row_counts
        if counts.num_spans > counts.num_kept:  # too few kept tokens to separate the noise spans
            raise ValueError(
                f"noise_density ({self.noise_density}) and mean_span_length ({self.mean_span_length}) make "
                f"{counts.num_spans} spans, but only {counts.num_kept} tokens are left to separate them: lower "
                "noise_density or raise mean_span_length"
            )
        return self

    def _counts(self, raw_length: int) -> SpanCounts:
        return SpanCounts.of(raw_length, self.noise_density, self.mean_span_length)

    @property
    def _row_counts(self) -> SpanCounts:
        return self._counts(self.raw_tokens_per_row)

    @cached_property
    def raw_tokens_per_row(self) -> int:
        """The largest number of raw tokens whose inputs fit `inputs_length`: 568 for 512 by default.

        At a noise density of 0.5 it may be one less, so that the targets are not longer than the inputs.

        # Deviates: T5's helper counts in float64 here, though its masks count in float32. At other noise than the
        # default a text may then be one token longer or shorter, and T5 cuts or pads the row.
        """
        upper = 4
        while self._counts(upper).inputs_length <= self.inputs_length:
            upper *= 2
            if upper > MAX_RAW:
                raise ValueError(
                    f"noise_density hides so much that a row takes more than {MAX_RAW:,} tokens of text: lower it, or "
                    "take a smaller inputs_length"
                )
        # Index 0 of the range stands for 3 tokens: if index i is the first number that does not fit, 2 + i is the last
        # that does.
        length = 2 + bisect_left(
            range(3, upper + 1), True, key=lambda length: self._counts(length).inputs_length > self.inputs_length
        )
        counts = self._counts(length)
        # At half noise, rounding may make the targets longer than the inputs. T5 then takes one token less.
        if self.noise_density == 0.5 and counts.targets_length > counts.inputs_length and length > 2:
            return length - 1
        return length

    @property
    def num_noise(self) -> int:
        return self._row_counts.num_noise

    @property
    def num_sentinels(self) -> int:
        """The number of sentinels that a row needs: one for each noise span."""
        return self._row_counts.num_spans

    @property
    def targets_length(self) -> int:
        """Tokens of a target row, including sentinels and EOS: 114 for inputs of 512."""
        return self._row_counts.targets_length

    @property
    def num_draws(self) -> int:
        """The number of random numbers that a row takes; see `corrupt_spans`."""
        return self.raw_tokens_per_row - 2

    def span_counts(self, length_X: Ids) -> Ids:
        """Return `SpanCounts` [X, 3] of texts of 2 to `raw_tokens_per_row` tokens."""
        return self._span_counts_by_length[length_X]

    @cached_property
    def _span_counts_by_length(self) -> Ids:
        """`SpanCounts` by length [raw_tokens_per_row + 1, 3]. Lengths 0 and 1 are not used."""
        table = [(0, 0, 0), (0, 0, 0)]
        for length in range(2, self.raw_tokens_per_row + 1):
            num_kept, num_noise, num_spans = self._counts(length)
            # A short text may have too few kept tokens to separate all its spans.
            table.append((num_kept, num_noise, min(num_kept, num_spans)))
        return np.array(table)

    def build(self, tokenizer: Tokenizer) -> Corrupt:
        """Return the function that corrupts rows. Raises DataError if the tokenizer has too few sentinels."""
        return partial(self.corrupt, sentinels=get_sentinels(tokenizer, self.num_sentinels))

    def corrupt(self, raw_RL: Ids, draws: Draws, sentinels: Ids) -> tuple[Ids, Ids]:
        """Return inputs [R, inputs_length] and targets [R, targets_length], int64, padded with 0.

        Args:
            raw_RL: raw ids [R, raw_tokens_per_row].
            draws: uniform random numbers [R, num_draws]. Only their order within a row has an effect.
            sentinels: ids in the order of use, at least `num_sentinels`.
        """
        num_rows, row_R = len(raw_RL), np.arange(len(raw_RL))
        counts_R3 = np.tile(self._row_counts, (num_rows, 1))
        first_draw_R = row_R * self.num_draws  # in the flattened draws
        corrupted = corrupt_spans(raw_RL.ravel(), counts_R3, draws.ravel(), first_draw_R, sentinels)
        return corrupted.in_rows(row_R, (num_rows, self.inputs_length), (num_rows, self.targets_length))


class CorruptedTexts(NamedTuple):
    """Corrupted texts end to end, without EOS."""

    inputs: Ids
    num_inputs_X: Ids
    """The number of input tokens of each text."""
    targets: Ids
    num_targets_X: Ids
    """The number of target tokens of each text."""

    def in_rows(self, row_X: Ids, inputs_shape: tuple[int, int], targets_shape: tuple[int, int]) -> tuple[Ids, Ids]:
        """Return inputs and targets of these shapes, each text followed by EOS, padded; see `pad_rows`."""
        return (
            pad_rows(self.inputs, self.num_inputs_X, row_X, inputs_shape),
            pad_rows(self.targets, self.num_targets_X, row_X, targets_shape),
        )


def corrupt_spans(raw: Ids, counts_X3: Ids, draws: Draws, first_draw_X: Ids, sentinels: Ids) -> CorruptedTexts:
    """Corrupt texts that lie end to end in `raw`.

    The kept tokens of a text are divided into spans at random, with the same probability for each division into
    non-empty spans. So are its noise tokens. Kept and noise spans then alternate, a kept one first.

    Args:
        raw: raw ids of all texts.
        counts_X3: `SpanCounts` of each text.
        draws: uniform random numbers. A text of N tokens uses N - 2 of them, from `first_draw_X` on.
        sentinels: ids in the order of use, the same for each text.
    """
    num_kept_X, num_noise_X, num_spans_X = counts_X3.T
    # num_kept - 1 draws for the kept spans, then num_noise - 1 for the noise spans: N - 2 together.
    kept_lengths = _random_span_lengths(draws, first_draw_X, num_kept_X, num_spans_X)
    noise_lengths = _random_span_lengths(draws, first_draw_X + num_kept_X - 1, num_noise_X, num_spans_X)
    # Both have an element for each span of each text, so interleaving them gives kept, noise, kept, noise, ... in
    # every text. Repeating False, True, False, True, ... by these lengths gives the noise mask, one value a token.
    alternating_lengths = np.stack([kept_lengths, noise_lengths], axis=1).ravel()
    is_noise = np.repeat(np.tile([False, True], len(kept_lengths)), alternating_lengths)
    # The first num_spans sentinels for each text, end to end.
    span_sentinels = sentinels[concatenated_ranges(np.zeros_like(num_spans_X), num_spans_X)]
    return CorruptedTexts(
        inputs=_replace_spans(raw, is_noise, span_sentinels),
        num_inputs_X=num_kept_X + num_spans_X,
        targets=_replace_spans(raw, ~is_noise, span_sentinels),
        num_targets_X=num_noise_X + num_spans_X,
    )


def get_sentinels(tokenizer: Tokenizer, number: int) -> Ids:
    """Return the tokenizer's sentinels. Raises DataError if there are fewer than `number`."""
    if len(tokenizer.sentinels) < number:
        raise DataError(
            f"data.objective hides {number} spans a row and needs as many sentinels, the tokenizer has "
            f"{len(tokenizer.sentinels)}: take a smaller inputs_length or noise_density, or a larger mean_span_length"
        )
    return tokenizer.sentinels


def _random_span_lengths(draws: Draws, first_draw_X: Ids, num_items_X: Ids, num_spans_X: Ids) -> Ids:
    """Divide the items of each text into non-empty spans at random; return the lengths of all spans, text after text.

    A text of N items has N - 1 gaps between items. To divide it into n spans is to cut at n - 1 gaps: at those with the
    smallest draws, so that every choice of gaps is equally likely.

    Example: texts of 5 and 3 items, for 3 and 2 spans. The first has four gaps with the draws 7, 2, 9, 4: its two cuts
    are gaps 1 and 3, so spans end with its items 1, 3 and 4. The second has two gaps with the draws 5, 1: its cut is
    gap 1, so spans end with its items 1 and 2, which are 6 and 7 of both texts end to end. From the ends 1, 3, 4, 6, 7
    come the lengths 2, 2, 1, 2, 1.
    """
    num_cuts_X = num_spans_X - 1
    start_X = np.cumsum(num_items_X) - num_items_X  # position of each text's first item, all texts end to end
    gap_P = np.arange(num_items_X.max(initial=1) - 1)  # gap i is behind item i; as many as the longest text has
    # The draw of each gap. A shorter text reads draws that are not its own, or beyond the end, where "clip" repeats the
    # last draw; its gaps that do not exist then get the largest value, so that they are never among the smallest.
    draw_XP = draws.take(first_draw_X[:, None] + gap_P, mode="clip")
    draw_XP[gap_P >= num_items_X[:, None] - 1] = np.iinfo(np.uint64).max
    # In the example the draws are [7, 2, 9, 4] and [5, 1, max, max].
    # A partition at k puts the k + 1 smallest draws of each row first, in any order, which costs less than sorting. It
    # is made at every number of cuts that occurs, so that the first num_cuts gaps of each row are its cuts.
    cut_counts = np.unique(num_cuts_X[num_cuts_X > 0])
    gap_XK = np.argpartition(draw_XP, cut_counts - 1, axis=1)[:, : num_cuts_X.max(initial=0)]  # K: the most cuts
    is_cut_XK = np.arange(gap_XK.shape[1]) < num_cuts_X[:, None]
    # In the example the gaps are [1, 3] and [1, 0], of which the last is no cut.
    # The position of the last item of each span: the item before a cut, or the last item of a text.
    cuts = (start_X[:, None] + gap_XK)[is_cut_XK]
    span_ends = np.sort(np.concatenate([cuts, start_X + num_items_X - 1]))
    return np.diff(span_ends, prepend=-1)  # the item before the first span would be at -1


def _replace_spans(raw: Ids, mask: NDArray[np.bool_], sentinels: Ids) -> Ids:
    """Replace each run of masked tokens by the next one of the sentinels.

    No run crosses from one text to the next: a text begins with a kept span and ends with a noise span, so the mask
    differs there.
    """
    # A run starts at a masked token whose predecessor is not masked.
    starts = mask.copy()
    starts[1:] &= ~mask[:-1]
    replaced = raw.copy()
    replaced[starts] = sentinels
    return replaced[starts | ~mask]  # the sentinels, and the tokens that are not masked
