"""Signals that ask a run to stop. A handler sets a flag and nothing else; the loop reads it between two steps."""

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType, TracebackType
from typing import Self, TypeVar

T = TypeVar("T")

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
"""The signals that stop a run after a save.

SIGUSR1 and SIGUSR2 are what batch systems send ahead of a time limit. SIGHUP comes when the terminal is closed, SIGXCPU
when the soft limit of CPU time is reached, and then once a second until the hard limit.
"""


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return STOPPING, without SIGHUP if it is ignored: `nohup` starts a command so that a closed terminal does not
    stop it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(one for one in STOPPING if not (ignored and one == signal.SIGHUP))


class StopTraining(Exception):
    """A stop was requested on some rank. All ranks raise it together, and one place catches it and saves."""


class StopRequest:
    """Sets `requested` at the first stopping signal within its `with`; a second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def request(self) -> None:
        """Ask for a stop from within, in any thread."""
        self.requested = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def run_interruptibly(action: Callable[[], T]) -> T:
    """Return what `action` returns, or raise what it raises. It runs in a thread of its own.

    While it waits in a library, handlers of signals run in this thread and may raise; `action` is then left alone.
    """
    return ThreadPoolExecutor(1).submit(action).result()
