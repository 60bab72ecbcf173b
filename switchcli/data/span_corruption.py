"""Span corruption: T5's objective on chunks of token ids (section 2.1 of the paper).

What it is not: it reads no text and draws no random numbers; `switchcli.data.stream` does both.

    raw      a b c d e f g h i j         spans "c d" and "g h i j" are hidden
    inputs   a b <0> e f <1> </s>
    targets  <0> c d <1> g h i j </s>    no closing sentinel, as in T5's code

Legend  R rows  L raw tokens  S source  T target positions
"""

from functools import cached_property
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from switchcli.spec import EOS, Spec


class Lengths(NamedTuple):
    """How a chunk of raw tokens is shared out: the same counts for each row."""

    num_kept: int
    num_noise: int
    num_spans: int

    @property
    def inputs(self) -> int:
        return self.num_kept + self.num_spans + 1

    @property
    def targets(self) -> int:
        return self.num_noise + self.num_spans + 1


class SpanCorruption(Spec):
    """Hides `noise_density` of the tokens in spans of `mean_span_length` on average; lengths are counts of tokens."""

    kind: Literal["span_corruption"] = "span_corruption"
    inputs_length: int = Field(default=512, ge=3)
    """Tokens of the encoder's input, its sentinels and EOS included."""
    noise_density: float = Field(default=0.15, gt=0.0, lt=1.0)
    mean_span_length: float = Field(default=3.0, ge=1.0)

    @model_validator(mode="after")
    def _spans_fit(self) -> Self:
        lengths = self._lengths(self.raw_length)
        if lengths.num_spans > lengths.num_kept:
            raise ValueError(
                f"noise_density ({self.noise_density}) and mean_span_length ({self.mean_span_length}) make "
                f"{lengths.num_spans} spans, but only {lengths.num_kept} tokens are left to part them: lower "
                "noise_density or raise mean_span_length"
            )
        return self

    def _lengths(self, raw_length: int) -> Lengths:
        """T5's counts; rounding is half to even, and both parts have a token at least."""
        num_noise = min(max(round(raw_length * self.noise_density), 1), raw_length - 1)
        num_spans = max(round(num_noise / self.mean_span_length), 1)
        return Lengths(raw_length - num_noise, num_noise, num_spans)

    @cached_property
    def raw_length(self) -> int:
        """The most raw tokens whose corrupted form fits `inputs_length`: 568 for 512."""
        length = 2
        while self._lengths(length + 1).inputs <= self.inputs_length:
            length += 1
        lengths = self._lengths(length)
        # T5: at half noise the rounding may favour the targets by one token; the inputs are to be the longer.
        return length - 1 if self.noise_density == 0.5 and lengths.targets > lengths.inputs and length > 2 else length

    @property
    def num_noise(self) -> int:
        return self._lengths(self.raw_length).num_noise

    @property
    def num_spans(self) -> int:
        """Hidden spans of a row: the number of sentinels that it needs."""
        return self._lengths(self.raw_length).num_spans

    @property
    def targets_length(self) -> int:
        """Tokens of a target row, sentinels and EOS included: 114 for 512."""
        return self._lengths(self.raw_length).targets

    @property
    def num_draws(self) -> int:
        """Random numbers that a row takes: one for each place where a segment may be cut."""
        return self.raw_length - 2

    def corrupt(
        self, raw_RL: NDArray[np.int64], draws: NDArray[np.uint64], sentinels: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs [R, inputs_length] and targets [R, targets_length], int64, padded with 0, of raw ids [R, raw_length].

        `draws` [R, num_draws] are uniform; only their order within a row counts. `sentinels` [>= num_spans] are the ids
        in order of use. Kept and hidden segments are cut independently, each way of cutting into non-empty ones being
        equally likely; they alternate, a kept one first.
        """
        kept, noise, spans = self._lengths(self.raw_length)
        lengths = np.stack(
            [_segment(draws[:, : kept - 1], kept, spans), _segment(draws[:, kept - 1 :], noise, spans)], axis=-1
        )
        hidden_RL = np.repeat(np.tile([False, True], lengths.size // 2), lengths.ravel()).reshape(raw_RL.shape)
        inputs_RS = np.zeros((len(raw_RL), self.inputs_length), dtype=np.int64)
        targets_RT = np.zeros((len(raw_RL), self.targets_length), dtype=np.int64)
        for out, mask_RL in ((inputs_RS, hidden_RL), (targets_RT, ~hidden_RL)):
            short = _replace_spans(raw_RL, mask_RL, sentinels[:spans])
            out[:, : short.shape[1]] = short
            out[:, short.shape[1]] = EOS
        return inputs_RS, targets_RT


def _segment(draws: NDArray[np.uint64], num_items: int, num_segments: int) -> NDArray[np.int64]:
    """Random lengths [R, num_segments] >= 1, adding up to `num_items`: cut where draws [R, num_items - 1] are least."""
    cuts = np.sort(np.argsort(draws, axis=1)[:, : num_segments - 1], axis=1) + 1
    return np.diff(cuts, axis=1, prepend=0, append=num_items)


def _replace_spans(
    raw_RL: NDArray[np.int64], mask_RL: NDArray[np.bool_], sentinels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Each masked span becomes one sentinel. Every row has as many spans as `sentinels`, and as many masked tokens."""
    starts_RL = mask_RL.copy()
    starts_RL[:, 1:] &= ~mask_RL[:, :-1]
    marked_RL = raw_RL.copy()
    marked_RL[starts_RL] = np.tile(sentinels, len(raw_RL))
    return marked_RL[starts_RL | ~mask_RL].reshape(len(raw_RL), -1)
