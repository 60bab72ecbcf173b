"""Loader: threads that make the next batches while the model computes: the same ones, only sooner."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from switchcli.distributed.context import DistributedContext
from switchcli.train.microbatches import Microbatch, Microbatches


class Loader:
    """Microbatches by their step, a few steps ahead of the one that is asked for; used in a `with`.

    Making them is reading, and numpy, which mostly leave the interpreter to others: threads do, and share one cache.
    """

    def __init__(self, microbatches: Microbatches, workers: int, ahead: int, context: DistributedContext) -> None:
        """`workers` threads, 0 for none, make the microbatches of up to `ahead` steps after the one asked for."""
        self._microbatches, self._ahead, self._context = microbatches, ahead, context
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="batches") if workers else None
        self.seconds_waited = 0.0
        """By those who asked, in all."""

    def from_step(self, first: int, last: int) -> Iterator[tuple[int, list[Microbatch]]]:
        """Yield each step from `first` up to `last`, exclusive, with its microbatches, in memory from which the
        device copies without a wait. Raises what making them raises."""
        begun: dict[int, Future[list[Microbatch]]] = {}
        for step in range(first, last):
            started = time.perf_counter()
            if self._pool is None:
                made = self._made(step)
            else:
                for wanted in range(step, min(step + self._ahead, last - 1) + 1):
                    if wanted not in begun:
                        begun[wanted] = self._pool.submit(self._made, wanted)
                made = begun.pop(step).result()
            self.seconds_waited += time.perf_counter() - started
            yield step, made

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _made(self, step: int) -> list[Microbatch]:
        return [self._context.pin_memory(micro) for micro in self._microbatches(step)]
