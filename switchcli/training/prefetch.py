"""Loader: a thread that prepares the batches of the next steps while the model computes."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from switchcli.distributed.context import DistributedContext
from switchcli.training.microbatches import Microbatch, Microbatches

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
