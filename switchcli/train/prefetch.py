"""Loader: threads that make the next batches while the model computes: the same ones, only sooner."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from switchcli.train.microbatches import Microbatch


class Loader:
    """Microbatches by their step, a few steps ahead of the one that is asked for; used in a `with`.

    Making them is reading, and numpy, which mostly leave the interpreter to others: threads do, and share one cache.
    """

    def __init__(
        self,
        make: Callable[[int], Iterable[Microbatch]],
        last_step: int,
        workers: int,
        ahead: int,
        pinned: Callable[[Microbatch], Microbatch],
    ) -> None:
        """`make` gives a step's microbatches, `pinned` puts one where the device copies it from without a wait."""
        self._make, self._pinned, self._last_step, self._ahead = make, pinned, last_step, ahead
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="batches") if workers else None
        self._begun: dict[int, Future[list[Microbatch]]] = {}
        self.seconds_waited = 0.0
        """By those who asked, in all."""

    def __call__(self, step: int) -> list[Microbatch]:
        """The microbatches of a step, in order. Raises what making them raises."""
        started = time.perf_counter()
        if self._pool is None:
            made = self._made(step)
        else:
            for wanted in range(step, min(step + self._ahead, self._last_step - 1) + 1):
                if wanted not in self._begun:
                    self._begun[wanted] = self._pool.submit(self._made, wanted)
            made = self._begun.pop(step).result()
        self.seconds_waited += time.perf_counter() - started
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _made(self, step: int) -> list[Microbatch]:
        return [self._pinned(micro) for micro in self._make(step)]
