"""Loader: threads that prepare the batches of the next steps while the model computes."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from switchcli.distributed.context import DistributedContext
from switchcli.training.microbatches import Microbatch, Microbatches


class Loader:
    """A context manager that yields microbatches step by step, prepared a few steps ahead.

    Threads suffice: preparing a batch is file reading and numpy, which mostly release the interpreter lock, and threads
    share one cache. The microbatches are the same with any number of threads.
    """

    def __init__(self, microbatches: Microbatches, workers: int, ahead: int, context: DistributedContext) -> None:
        """Start `workers` threads that prepare up to `ahead` steps after the current one; 0: the caller does it."""
        self._microbatches, self._ahead, self._context = microbatches, ahead, context
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="batches") if workers else None
        self.seconds_waited = 0.0
        """Seconds that callers have waited for batches, in total."""

    def from_step(self, first: int, last: int) -> Iterator[tuple[int, list[Microbatch]]]:
        """Yield each step from `first` up to `last`, exclusive, with its microbatches in pinned memory.

        Raises whatever reading the batch raises.
        """
        pending: dict[int, Future[list[Microbatch]]] = {}
        for step in range(first, last):
            started = time.perf_counter()
            if self._pool is None:
                microbatches = self._load(step)
            else:
                # Keep this step and the next `ahead` ones in progress, up to the last step, last - 1.
                for next_step in range(step, min(step + self._ahead, last - 1) + 1):
                    if next_step not in pending:
                        pending[next_step] = self._pool.submit(self._load, next_step)
                microbatches = pending.pop(step).result()
            self.seconds_waited += time.perf_counter() - started
            yield step, microbatches

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _load(self, step: int) -> list[Microbatch]:
        return [self._context.pin_memory(microbatch) for microbatch in self._microbatches(step)]
