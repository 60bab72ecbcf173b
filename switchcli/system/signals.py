"""Signals that ask a run to stop.

The first signal sets a flag that training, evaluation and scoring poll; a later Ctrl-C raises KeyboardInterrupt. See
also commands/_exit.py and launch.py.
"""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from threading import Thread, current_thread, main_thread
from types import FrameType, TracebackType
from typing import Final, Self, TypeVar

T = TypeVar("T")

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
"""The signals at which a run saves and stops.

Batch systems send SIGUSR1 or SIGUSR2 ahead of a time limit. SIGHUP comes when the terminal is closed. SIGXCPU comes at
the soft limit of CPU time, and then once a second until the hard limit.
"""


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the stopping signals by `handler`. The previous handlers are restored at the end.

    SIGHUP stays ignored if it is: `nohup` does so for commands that outlive their terminal. Python allows handlers in
    the main thread alone.
    """
    previous = {number: signal.getsignal(number) for number in STOPPING}
    if previous[signal.SIGHUP] is signal.SIG_IGN:
        del previous[signal.SIGHUP]
    try:
        for number in previous:
            signal.signal(number, handler)
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class StopTraining(Exception):
    """A stop was requested on some rank. All ranks raise it together.

    It is caught in runs/train/trainer.py, which saves.
    """


class StopRequest:
    """A context manager that sets `requested` at the first stopping signal.

    A SIGINT after the first signal raises KeyboardInterrupt. Outside the main thread, only `request` sets the flag.
    """

    def __init__(self, acknowledge: Callable[[], None] | None = None) -> None:
        """`acknowledge` is called once, in another thread and at once, if the first signal is a Ctrl-C."""
        self.requested = False
        self._acknowledge = acknowledge
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if current_thread() is main_thread():
            if self._acknowledge is not None:
                self._stack.enter_context(_calling_at_sigint(self._acknowledge))
            self._stack.enter_context(handling(self._on_signal))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def request(self) -> None:
        """Request a stop without a signal; any thread may call it."""
        self.requested = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


NEVER: Final = StopRequest()
"""What nobody requests, for work that does not end early."""


@contextmanager
def _calling_at_sigint(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` in a thread of its own as soon as a SIGINT comes, if no other handled signal has come before.

    A handler of Python waits for the main thread, which may be in a backward pass for seconds. Its wake-up descriptor
    gets the number of a signal at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        if os.read(reader, 1) == bytes([signal.SIGINT]):
            action()

    thread = Thread(target=watch, name="signals", daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        with suppress(BlockingIOError):  # full of signals, of which the first has ended the thread
            os.write(writer, b"\0")  # no signal has this number
        thread.join()
        os.close(reader)
        os.close(writer)


def run_interruptibly(action: Callable[[], T]) -> T:
    """Return what `action` returns, or raise what it raises; signals are handled while it waits in a library.

    `action` runs in a thread of its own. Signal handlers run in this thread; if one raises, `action` is abandoned.
    """
    return ThreadPoolExecutor(1).submit(action).result()
