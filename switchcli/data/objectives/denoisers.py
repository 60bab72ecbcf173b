"""Pre-training objectives that a recipe can name: prefix language modeling, UL2's denoisers and span corruption.

An objective is a spec that acts. All rows have a fixed size: `inputs_length` and `targets_length` tokens, made of
`raw_tokens_per_row` tokens of text and `num_draws` uniform random numbers. `build(tokenizer)` returns the function that
corrupts rows. Span corruption has its own file.

Legend  R rows  L raw tokens of a row  D denoisers
"""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from switchcli.data.objectives.example_packing import concatenated_ranges, pad_rows
from switchcli.data.objectives.span_corruption import (
    Corrupt,
    Draws,
    Ids,
    SpanCorruption,
    SpanCounts,
    corrupt_spans,
    get_sentinels,
    max_raw_tokens,
)
from switchcli.data.rng import uniform
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError
from switchcli.spec import MAX_SIZE, Spec


class PrefixLanguageModel(Spec):
    """Prefix language modeling: a text is split at a random position into inputs and targets, without sentinels.

    Every position is equally likely at which both parts have a token and fit their rows together with EOS.
    """

    kind: Literal["prefix_lm"] = "prefix_lm"
    """`prefix_lm` splits a text at a random position; the model continues the first part."""
    inputs_length: int = Field(default=512, ge=2, le=MAX_SIZE)
    """Tokens of the encoder's input, including EOS; 512 as in T5."""
    targets_length: int = Field(default=512, ge=2, le=MAX_SIZE)
    """Tokens of a target row, including EOS; 512, so that any position of a text of 512 tokens is possible."""
    text_length: int | None = Field(default=None, ge=2, le=MAX_SIZE)
    """Tokens of text in a row; T5 takes as many as `inputs_length` and `targets_length`. Absent: as many as both hold
    together, which leaves only one position to split at."""

    @model_validator(mode="after")
    def _can_be_split(self) -> Self:
        max_length = self.inputs_length + self.targets_length - 2
        if self.raw_tokens_per_row > max_length:
            raise ValueError(
                f"text_length ({self.text_length}) must be at most {max_length}, what inputs_length "
                f"({self.inputs_length}) and targets_length ({self.targets_length}) hold beside an EOS each"
            )
        return self

    @property
    def raw_tokens_per_row(self) -> int:
        return self.text_length or self.inputs_length + self.targets_length - 2

    @property
    def num_draws(self) -> int:
        return 1

    def build(self, tokenizer: Tokenizer) -> Corrupt:
        return self.corrupt

    def corrupt(self, raw_RL: Ids, draws: Draws) -> tuple[Ids, Ids]:
        """Return inputs [R, inputs_length] and targets [R, targets_length] of raw ids [R, raw_tokens_per_row]."""
        num_rows, length = raw_RL.shape
        row_R = np.arange(num_rows)
        # Prefixes have min_prefix..max_prefix tokens: both parts have a token, and fit their rows with EOS.
        min_prefix = max(1, length - (self.targets_length - 1))
        max_prefix = min(length - 1, self.inputs_length - 1)
        prefix_R = min_prefix + (draws[:, 0] % np.uint64(max_prefix - min_prefix + 1)).astype(np.int64)
        is_prefix_RL = np.arange(length) < prefix_R[:, None]
        # Indexing with a mask goes row by row, so that it puts the prefixes, or the rests, end to end.
        return (
            pad_rows(raw_RL[is_prefix_RL], prefix_R, row_R, (num_rows, self.inputs_length)),
            pad_rows(raw_RL[~is_prefix_RL], length - prefix_R, row_R, (num_rows, self.targets_length)),
        )


class Denoiser(Spec):
    """One setting of span corruption, and the prompt that identifies it to the model."""

    prompt: str
    """Text before the inputs; empty: none."""
    noise_density: float = Field(gt=0.0, lt=1.0)
    """Fraction of the tokens that are hidden."""
    mean_span_length: float | None = Field(default=None, ge=1.0)
    """Average length of a hidden span, in tokens. Absent: one span, the end of the text: prefix language modeling."""
    rate: float = Field(default=1.0, gt=0.0)
    """Frequency of this denoiser, relative to the rates of the others; equal by default, as in UL2."""

    def span_counts(self, raw_length: int) -> SpanCounts:
        return SpanCounts.of(raw_length, self.noise_density, self.mean_span_length)


class Denoisers(Spec):
    """UL2's mixture of denoisers (Tay et al. 2022, Table 1): the denoiser of each row is drawn by the rates.

    A row takes as much text as fits the inputs of every denoiser.
    """

    kind: Literal["denoisers"] = "denoisers"
    """`denoisers` mixes several settings of span corruption, as UL2 does."""
    inputs_length: int = Field(default=512, ge=3, le=MAX_SIZE)
    """Tokens of the encoder's input, including its prompt, sentinels and EOS; 512 as in UL2."""
    prompt_tokens: int = Field(default=4, ge=0, le=MAX_SIZE)
    """Room for the longest prompt in the inputs, in tokens; 4 hold a space and the three characters of `[R]`."""
    denoisers: Annotated[tuple[Denoiser, ...], Field(min_length=1)] = (
        Denoiser(prompt="[R]", noise_density=0.15, mean_span_length=3.0),
        Denoiser(prompt="[R]", noise_density=0.15, mean_span_length=8.0),
        Denoiser(prompt="[S]", noise_density=0.25),
        Denoiser(prompt="[X]", noise_density=0.5, mean_span_length=3.0),
        Denoiser(prompt="[X]", noise_density=0.5, mean_span_length=8.0),
        Denoiser(prompt="[X]", noise_density=0.15, mean_span_length=64.0),
        Denoiser(prompt="[X]", noise_density=0.5, mean_span_length=64.0),
    )
    """The denoisers; by default UL2's seven."""

    @model_validator(mode="after")
    def _spans_fit(self) -> Self:
        if self.inputs_length < self.prompt_tokens + 3:
            raise ValueError(
                f"inputs_length ({self.inputs_length}) must be at least {self.prompt_tokens + 3}, 3 more than "
                f"prompt_tokens ({self.prompt_tokens})"
            )
        for denoiser, counts in zip(self.denoisers, self._row_counts, strict=True):
            counts.check(denoiser.noise_density, denoiser.mean_span_length)
        return self

    @cached_property
    def raw_tokens_per_row(self) -> int:
        room = self.inputs_length - self.prompt_tokens
        return max_raw_tokens(
            lambda length: all(denoiser.span_counts(length).inputs_length <= room for denoiser in self.denoisers)
        )

    @property
    def _row_counts(self) -> list[SpanCounts]:
        """The span counts of a row for each denoiser."""
        return [denoiser.span_counts(self.raw_tokens_per_row) for denoiser in self.denoisers]

    @property
    def targets_length(self) -> int:
        """Tokens of a target row: those of the denoiser with the longest targets. Shorter targets are padded."""
        return max(counts.targets_length for counts in self._row_counts)

    @property
    def num_draws(self) -> int:
        """The number of random numbers that a row takes: one chooses the denoiser, the others divide the spans."""
        return 1 + (self.raw_tokens_per_row - 2)

    @property
    def num_sentinels(self) -> int:
        return max(counts.num_spans for counts in self._row_counts)

    def build(self, tokenizer: Tokenizer) -> Corrupt:
        """Return the function that corrupts rows.

        Raises DataError if prompts are too long or have the same ids, or if the tokenizer has too few sentinels.
        """
        prompts = dict.fromkeys(denoiser.prompt for denoiser in self.denoisers)
        ids = {prompt: tuple(tokenizer.encode(prompt)) if prompt else () for prompt in prompts}
        longest = max(prompts, key=lambda prompt: len(ids[prompt]))
        if len(ids[longest]) > self.prompt_tokens:
            raise DataError(
                f"data.objective.prompt_tokens ({self.prompt_tokens}) must be at least {len(ids[longest])}, the ids "
                f"of the prompt {longest!r} by this tokenizer"
            )
        if len(set(ids.values())) < len(ids):
            raise DataError(
                f"data.objective.denoisers: this tokenizer gives some of the prompts {', '.join(map(repr, ids))} the "
                "same ids: take other prompts, of characters that it knows"
            )
        prompt_ids = [np.array(ids[denoiser.prompt], dtype=np.int64) for denoiser in self.denoisers]
        sentinels = get_sentinels(tokenizer, self.num_sentinels)
        return partial(self.corrupt, sentinels=sentinels, prompts=prompt_ids)

    def corrupt(self, raw_RL: Ids, draws: Draws, sentinels: Ids, prompts: Sequence[Ids]) -> tuple[Ids, Ids]:
        """Return inputs [R, inputs_length] and targets [R, targets_length] of raw ids [R, raw_tokens_per_row].

        `prompts` are the ids of each denoiser's prompt; the other arguments are as in `SpanCorruption.corrupt`.
        """
        num_rows, row_R = len(raw_RL), np.arange(len(raw_RL))
        denoiser_R = self.choose(draws[:, 0])
        counts_R3 = np.array(self._row_counts)[denoiser_R]
        first_draw_R = row_R * self.num_draws + 1  # in the flattened draws, behind the one that chose the denoiser
        corrupted = corrupt_spans(raw_RL.ravel(), counts_R3, draws.ravel(), first_draw_R, sentinels)

        # Insert the prompt of each row's denoiser before the row's inputs.
        # Example: denoisers with the prompts A B, none and C, and three rows of the denoisers 2, 1 and 0, which have
        # three inputs each. End to end the prompts are A B C. That of denoiser 2 begins at 2, and that of denoiser 0 at
        # 0, so the rows take the positions 2, 0, 1: C A B. The inputs of the rows begin at 0, 3 and 6, so C is inserted
        # at 0, and A and B at 6: C x x x, x x x, A B x x x.
        prompt_length_D = np.array([len(prompt) for prompt in prompts])
        prompt_start_D = np.cumsum(prompt_length_D) - prompt_length_D
        prompt_length_R = prompt_length_D[denoiser_R]
        prompt_position = concatenated_ranges(prompt_start_D[denoiser_R], prompt_length_R)
        first_input_R = np.cumsum(corrupted.num_inputs_X) - corrupted.num_inputs_X
        insert_position = np.repeat(first_input_R, prompt_length_R)
        prompted = corrupted._replace(
            inputs=np.insert(corrupted.inputs, insert_position, np.concatenate(prompts)[prompt_position]),
            num_inputs_X=prompt_length_R + corrupted.num_inputs_X,
        )
        return prompted.in_rows(row_R, (num_rows, self.inputs_length), (num_rows, self.targets_length))

    def choose(self, draw_R: Draws) -> NDArray[np.int64]:
        """Return the denoiser of each row [R], chosen by a uniform random number."""
        cumulative_rate_D = np.cumsum([denoiser.rate for denoiser in self.denoisers])
        return np.searchsorted(cumulative_rate_D / cumulative_rate_D[-1], uniform(draw_R), side="right")


TextObjective = SpanCorruption | PrefixLanguageModel | Denoisers
ObjectiveSpec = Annotated[TextObjective, Field(discriminator="kind")]
"""The objectives that a recipe can name by `kind`."""
