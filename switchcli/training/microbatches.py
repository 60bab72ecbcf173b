"""Microbatches: which rows of a step's batch each rank takes, and in how many forward passes."""

from collections.abc import Iterator
from typing import NamedTuple, Self

from switchcli.data.batch import Batch, BatchSource
from switchcli.spec import PAD


class RealTokens(NamedTuple):
    """Counts of tokens that are not padding. The losses of a step are divided by them."""

    inputs: int
    targets: int

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Count the real tokens of a batch in the host's memory."""
        assert PAD == 0, "count_nonzero is faster than a comparison and a sum"
        return cls(int(batch.inputs_BS.count_nonzero()), int(batch.targets_BT.count_nonzero()))


class Microbatch(NamedTuple):
    """Consecutive rows of a step's batch: one forward pass."""

    number: int
    """Index among the microbatches of all ranks in the step. It seeds dropout and jitter."""
    batch: Batch
    real: RealTokens


class Microbatches:
    """The microbatches of one rank: every step's batch is divided into microbatches, in equal numbers for each rank.

    Rank r of a world takes the consecutive microbatches r * count to (r + 1) * count - 1 of the step. How the batch is
    divided depends on the size of a microbatch alone, so any number of ranks computes the same microbatches.
    """

    def __init__(self, source: BatchSource, batch: int, microbatch: int, rank: int, world: int) -> None:
        """Divide the batches of `source`.

        Args:
            source: the batches of the run.
            batch: sequences of a step, over all ranks.
            microbatch: sequences of a microbatch, which divide those of a rank (`batch_problem`).
            rank: the index of this rank among the data-parallel ranks, which share the batch.
            world: the number of data-parallel ranks.
        """
        self.microbatch = microbatch
        self.count = batch // world // microbatch
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
