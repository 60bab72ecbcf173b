"""Which rows of a step's batch this rank takes, and in which portions."""

import math
from collections.abc import Iterator
from typing import NamedTuple, Self

from switchcli.data.batch import AnyBatch, BatchSource
from switchcli.errors import RecipeError
from switchcli.spec import PAD


class RealTokens(NamedTuple):
    """Numbers of tokens that are not padding: what the losses of a step are divided by."""

    inputs: int
    targets: int

    @classmethod
    def of(cls, batch: AnyBatch) -> Self:
        """Count those of a batch in the host's memory."""
        assert PAD == 0, "count_nonzero is four times as fast as a comparison and a sum"
        return cls(int(batch.inputs_BS.count_nonzero()), int(batch.targets_BT.count_nonzero()))


class Microbatch(NamedTuple):
    """A portion of a step's batch."""

    number: int
    """Index in the whole step. It seeds dropout and jitter."""
    batch: AnyBatch
    real: RealTokens


class Microbatches:
    """Cuts every step's batch into microbatches and gives each rank an equal run of them.

    The cut depends on `microbatch` alone: the same microbatches come out on any number of ranks.
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
        """`batch`, `microbatch` and `group`, those that are routed together, count sequences of `length` tokens.

        Raises:
            RecipeError: as `rows_of_microbatch`.
        """
        self.microbatch = rows_of_microbatch(batch, microbatch, group, world, length)
        self.count = batch // world // self.microbatch
        self._source = source
        self._first = rank * self.count

    def __call__(self, step: int) -> list[Microbatch]:
        """This rank's microbatches of a step, in order."""
        return [self._made(step, number) for number in range(self._first, self._first + self.count)]

    def from_step(self, first: int, last: int) -> Iterator[tuple[int, list[Microbatch]]]:
        """Yield each step from `first` up to `last`, exclusive, with its microbatches."""
        for step in range(first, last):
            yield step, self(step)

    def _made(self, step: int, number: int) -> Microbatch:
        batch = self._source.batch(step, number * self.microbatch, self.microbatch)
        return Microbatch(number, batch, RealTokens.of(batch))


def rows_of_microbatch(batch: int, microbatch: int | None, group: int, world: int, length: int = 1) -> int:
    """Return how many rows a microbatch has: `microbatch`, or if absent the whole share of a rank.

    Raises:
        RecipeError: the batch cannot be shared out evenly.
    """
    if batch % world:
        more = (batch // world + 1) * world
        raise RecipeError(
            f"train.batch_tokens ({batch * length}) holds {batch} sequences, which {world} ranks cannot share "
            f"evenly: try {more * length}, or fewer ranks"
        )
    rows = microbatch or batch // world
    if (batch // world) % rows:
        raise RecipeError(
            f"train.microbatch_tokens ({rows * length}) must divide the {batch // world * length} "
            f"tokens that each of {world} ranks takes a step: set it to "
            f"{math.gcd(rows, batch // world) * length}, say"
        )
    if rows % group:
        raise RecipeError(
            f"a microbatch of {rows} sequences (on {world} ranks) does not hold whole groups of "
            f"model.router.group_sequences ({group}): let each rank take a multiple of {group * length} tokens"
        )
    return rows
