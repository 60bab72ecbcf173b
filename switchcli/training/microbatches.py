"""Microbatches: which rows of a step's batch each rank takes, and in how many forward passes.

`Loader` is a thread that prepares the batches of the next steps while the model computes.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

from switchcli.data.batch import Batch, BatchSource
from switchcli.distributed.context import DistributedContext
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


STEPS_AHEAD = 2
"""Steps whose batches are prepared in advance, at most."""


class Loader:
    """A context manager that yields microbatches step by step, prepared up to `STEPS_AHEAD` steps ahead.

    A thread suffices: preparing a batch is file reading and numpy, which mostly release the interpreter lock. There is
    one, which asks for the batches in the order of the steps.
    """

    def __init__(self, microbatches: Microbatches, context: DistributedContext) -> None:
        self._microbatches, self._context = microbatches, context
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.seconds_waited = 0.0
        """Seconds that callers have waited for batches, in total."""

    def from_step(self, first: int, last: int) -> Iterator[tuple[int, list[Microbatch]]]:
        """Yield each step from `first` up to `last`, exclusive, with its microbatches in pinned memory.

        Raises whatever reading the batch raises.
        """
        pending: deque[Future[list[Microbatch]]] = deque()
        for step in range(first, last):
            started = time.perf_counter()
            # Keep this step and the next ones in progress, up to the last step, last - 1.
            for next_step in range(step + len(pending), min(step + STEPS_AHEAD, last - 1) + 1):
                pending.append(self._pool.submit(self._load, next_step))
            microbatches = pending.popleft().result()
            self.seconds_waited += time.perf_counter() - started
            yield step, microbatches

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _load(self, step: int) -> list[Microbatch]:
        return [self._context.pin_memory(microbatch) for microbatch in self._microbatches(step)]
