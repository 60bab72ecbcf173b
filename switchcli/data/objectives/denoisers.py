"""Objectives of pre-training: what a model is given of a text, and what it has to say of it; an acting spec each.

All have static rows, `inputs_length` and `targets_length`; `raw_length` and `num_draws` are the tokens of text and the
uniform numbers that a row takes. `build(tokenizer)` makes what corrupts them. Span corruption has a file of its own.

Legend  R rows  L raw tokens  S source  T target positions  D denoisers
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
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError
from switchcli.spec import MOST, Spec


class PrefixLanguageModel(Spec):
    """A text is parted at a random place: its beginning is given, the rest is to be said. No sentinels.

    Every place is equally likely at which both parts have a token and fit their rows with EOS.
    """

    kind: Literal["prefix_lm"] = "prefix_lm"
    inputs_length: int = Field(default=512, ge=2, le=MOST["row_tokens"])
    targets_length: int = Field(default=512, ge=2, le=MOST["row_tokens"])
    text_length: int | None = Field(default=None, ge=2, le=MOST["row_tokens"])
    """Tokens of text; T5 takes as many as `inputs_length` and `targets_length`. Absent: all that the two hold together,
    which leaves one place to part it at."""

    @model_validator(mode="after")
    def _can_be_parted(self) -> Self:
        most = self.inputs_length + self.targets_length - 2
        if self.raw_tokens_per_row > most:
            raise ValueError(
                f"text_length ({self.text_length}) must be at most {most}, what inputs_length ({self.inputs_length}) "
                f"and targets_length ({self.targets_length}) hold beside an EOS each"
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
        """Inputs [R, inputs_length] and targets [R, targets_length] of raw ids [R, raw_length]."""
        length, row_R = self.raw_tokens_per_row, np.arange(len(raw_RL))
        shortest, longest = max(1, length - self.targets_length + 1), min(length, self.inputs_length) - 1
        prefix_R = shortest + (draws[:, 0] % np.uint64(longest - shortest + 1)).astype(np.int64)
        given_RL = np.arange(length) < prefix_R[:, None]
        return (
            pad_rows(raw_RL[given_RL], prefix_R, row_R, (len(raw_RL), self.inputs_length)),
            pad_rows(raw_RL[~given_RL], length - prefix_R, row_R, (len(raw_RL), self.targets_length)),
        )


class Denoiser(Spec):
    """One way of hiding spans, and the text that tells the model of it."""

    prompt: str
    """Stands before the inputs."""
    noise_density: float = Field(gt=0.0, lt=1.0)
    mean_span_length: float | None = Field(default=None, ge=1.0)
    """Absent: one span, the end of the text, which is prefix language modelling."""
    rate: float = Field(default=1.0, gt=0.0)
    """How often it is taken, next to the others' rates."""

    def lengths(self, raw_length: int) -> SpanCounts:
        return SpanCounts.of(raw_length, self.noise_density, self.mean_span_length)


class Denoisers(Spec):
    """UL2's mixture of denoisers (Tay et al. 2022, Table 1): each row is of one, drawn by the rates.

    A row takes as much text as every denoiser's inputs have room for.
    """

    kind: Literal["denoisers"] = "denoisers"
    inputs_length: int = Field(default=512, ge=3, le=MOST["row_tokens"])
    """Tokens of the encoder's input: its prompt, sentinels and EOS included."""
    prompt_tokens: int = Field(default=4, ge=0, le=MOST["row_tokens"])
    """Room for the longest prompt in the inputs."""
    denoisers: Annotated[tuple[Denoiser, ...], Field(min_length=1)] = (
        Denoiser(prompt="[R]", noise_density=0.15, mean_span_length=3.0),
        Denoiser(prompt="[R]", noise_density=0.15, mean_span_length=8.0),
        Denoiser(prompt="[S]", noise_density=0.25),
        Denoiser(prompt="[X]", noise_density=0.5, mean_span_length=3.0),
        Denoiser(prompt="[X]", noise_density=0.5, mean_span_length=8.0),
        Denoiser(prompt="[X]", noise_density=0.15, mean_span_length=64.0),
        Denoiser(prompt="[X]", noise_density=0.5, mean_span_length=64.0),
    )

    @model_validator(mode="after")
    def _spans_fit(self) -> Self:
        if self.inputs_length < self.prompt_tokens + 3:
            raise ValueError(
                f"inputs_length ({self.inputs_length}) must be at least {self.prompt_tokens + 3}, 3 more than "
                f"prompt_tokens ({self.prompt_tokens})"
            )
        for one in self.denoisers:
            one.lengths(self.raw_tokens_per_row).check(one.noise_density, one.mean_span_length)
        return self

    @cached_property
    def raw_tokens_per_row(self) -> int:
        room = self.inputs_length - self.prompt_tokens
        return max_raw_tokens(lambda length: all(one.lengths(length).inputs <= room for one in self.denoisers))

    @property
    def targets_length(self) -> int:
        """Of the denoiser that hides most: the others' targets are padded."""
        return max(one.lengths(self.raw_tokens_per_row).targets for one in self.denoisers)

    @property
    def num_draws(self) -> int:
        """One for the choice of a denoiser, the others as in span corruption."""
        return self.raw_tokens_per_row - 1

    @property
    def num_sentinels(self) -> int:
        return max(one.lengths(self.raw_tokens_per_row).num_spans for one in self.denoisers)

    def build(self, tokenizer: Tokenizer) -> Corrupt:
        """Raises DataError when prompts are longer than their room or not told apart, or sentinels are too few."""
        texts = dict.fromkeys(one.prompt for one in self.denoisers)
        ids = {text: tuple(tokenizer.encode(text)) if text else () for text in texts}
        longest = max(texts, key=lambda text: len(ids[text]))
        if len(ids[longest]) > self.prompt_tokens:
            raise DataError(
                f"data.objective.prompt_tokens ({self.prompt_tokens}) must be at least {len(ids[longest])}, the ids "
                f"of the prompt {longest!r} by this tokenizer"
            )
        if len(set(ids.values())) < len(ids):
            raise DataError(
                f"data.objective.denoisers: by this tokenizer some of the prompts {', '.join(map(repr, ids))} are the "
                "same ids: take other prompts, of characters that it knows"
            )
        prompts = [np.array(ids[one.prompt], dtype=np.int64) for one in self.denoisers]
        sentinels = get_sentinels(tokenizer, self.num_sentinels)
        return partial(self.corrupt, sentinels=sentinels, prompts=prompts)

    def corrupt(self, raw_RL: Ids, draws: Draws, sentinels: Ids, prompts: Sequence[Ids]) -> tuple[Ids, Ids]:
        """Inputs [R, inputs_length] and targets [R, targets_length] of raw ids [R, raw_length].

        `prompts` are the ids of each denoiser's.
        """
        denoiser_R, row_R = self.choose(draws[:, 0]), np.arange(len(raw_RL))
        share_D3 = np.array([one.lengths(self.raw_tokens_per_row) for one in self.denoisers])
        first_R = row_R * self.num_draws + 1
        hidden = corrupt_spans(raw_RL.ravel(), share_D3[denoiser_R], draws.ravel(), first_R, sentinels)
        length_D = np.array([len(prompt) for prompt in prompts])
        prompt_R = length_D[denoiser_R]
        prompted = np.insert(
            hidden.inputs,
            np.repeat(np.cumsum(hidden.inputs_X) - hidden.inputs_X, prompt_R),
            np.concatenate(prompts)[concatenated_ranges((np.cumsum(length_D) - length_D)[denoiser_R], prompt_R)],
        )
        return (
            pad_rows(prompted, prompt_R + hidden.inputs_X, row_R, (len(raw_RL), self.inputs_length)),
            pad_rows(hidden.targets, hidden.targets_X, row_R, (len(raw_RL), self.targets_length)),
        )

    def choose(self, draws: Draws) -> NDArray[np.int64]:
        """The denoiser of each row by a uniform number."""
        ends_D = np.cumsum([one.rate for one in self.denoisers])
        return np.searchsorted(ends_D / ends_D[-1], (draws >> np.uint64(11)) * 2.0**-53, side="right")


TextObjective = SpanCorruption | PrefixLanguageModel | Denoisers
ObjectiveSpec = Annotated[TextObjective, Field(discriminator="kind")]
"""The objectives that a recipe can name by `kind`."""
