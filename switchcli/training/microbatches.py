"""Microbatches: which rows of a step's batch each rank takes, and in how many forward passes."""

import math
from collections.abc import Iterator
from typing import NamedTuple, Self

from switchcli.data.batch import AnyBatch, BatchSource
from switchcli.errors import RecipeError
from switchcli.spec import PAD


class RealTokens(NamedTuple):
    """Counts of tokens that are not padding. The losses of a step are divided by them."""

    inputs: int
    targets: int

    @classmethod
    def of(cls, batch: AnyBatch) -> Self:
        """Count the real tokens of a batch in the host's memory."""
        assert PAD == 0, "count_nonzero is faster than a comparison and a sum"
        return cls(int(batch.inputs_BS.count_nonzero()), int(batch.targets_BT.count_nonzero()))


class Microbatch(NamedTuple):
    """Consecutive rows of a step's batch: one forward pass."""

    number: int
    """Index among the microbatches of all ranks in the step. It seeds dropout and jitter."""
    batch: AnyBatch
    real: RealTokens


class Microbatches:
    """The microbatches of one rank: every step's batch is divided into microbatches, in equal numbers for each rank.

    Rank r of a world takes the consecutive microbatches r * count to (r + 1) * count - 1 of the step. How the batch is
    divided depends on the size of a microbatch alone, so any number of ranks computes the same microbatches.
    """

    def __init__(
        self,
        source: BatchSource,
        batch: int,
        microbatch: int | None,
        group: int,
        rank: int,
        world: int,
        length: int = 1,
    ) -> None:
        """Divide the batches of `source`.

        Args:
            source: the batches of the run.
            batch: sequences of a step, over all ranks.
            microbatch: sequences of a microbatch; None: all of a rank's sequences.
            group: sequences that are routed together.
            rank: the index of this rank among the data-parallel ranks, which share the batch.
            world: the number of data-parallel ranks.
            length: tokens of a sequence, for error messages.

        Raises:
            RecipeError: see `rows_of_microbatch`.
        """
        self.microbatch = rows_of_microbatch(batch, microbatch, group, world, length)
        self.count = batch // world // self.microbatch
        self._source = source
        self._first = rank * self.count

    def __call__(self, step: int) -> list[Microbatch]:
        """Return this rank's microbatches of a step, in order."""
        return [self._microbatch(step, number) for number in range(self._first, self._first + self.count)]

    def from_step(self, first: int, last: int) -> Iterator[tuple[int, list[Microbatch]]]:
        """Yield each step from `first` up to `last`, exclusive, with its microbatches."""
        for step in range(first, last):
            yield step, self(step)

    def _microbatch(self, step: int, number: int) -> Microbatch:
        batch = self._source.batch(step, number * self.microbatch, self.microbatch)
        return Microbatch(number, batch, RealTokens.of(batch))


def rows_of_microbatch(batch: int, microbatch: int | None, group: int, world: int, length: int = 1) -> int:
    """Return the number of rows of a microbatch: `microbatch`, or all rows of a rank if None. For the parameters see
    `Microbatches`.

    Raises:
        RecipeError: the ranks cannot share the batch evenly, the microbatches do not divide a rank's rows, or groups
            do not divide a microbatch.
    """
    if batch % world:
        next_multiple = (batch // world + 1) * world
        raise RecipeError(
            f"train.batch_tokens ({batch * length}) holds {batch} sequences, which {world} ranks cannot share "
            f"evenly: try {next_multiple * length}, or fewer ranks"
        )
    rows_per_rank = batch // world
    rows = microbatch or rows_per_rank
    if rows_per_rank % rows:
        raise RecipeError(
            f"train.microbatch_tokens ({rows * length}) must divide the {rows_per_rank * length} "
            f"tokens that each of {world} ranks takes in a step: try {math.gcd(rows, rows_per_rank) * length}"
        )
    if rows % group:
        raise RecipeError(
            f"a microbatch of {rows} sequences (on {world} ranks) does not hold whole groups of "
            f"model.router.group_sequences ({group}): let each rank take a multiple of {group * length} tokens"
        )
    return rows
