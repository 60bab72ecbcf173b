"""Prefix language modeling: the model continues a text.

Legend  R rows  L raw tokens of a row
"""

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from switchcli.data.objectives.example_packing import pad_rows
from switchcli.data.objectives.span_corruption import Corrupt, Draws, Ids
from switchcli.data.tokenizer.tokenizer import Tokenizer
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
