"""Signals that stop a training verb before and after its loop. No torch here: importing it takes seconds as well."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from switchcli.errors import Interrupted, InterruptedByForce
from switchcli.parallel import exit_code
from switchcli.parallel.signals import STOPPING


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, a stopping signal ends the command at once, but in the training loop, which has its own handlers.

    Raises:
        Interrupted: from within, when the signal comes. All that was done is on the disk, or is done again the same.
        InterruptedByForce: in the loop Ctrl-C was pressed twice.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}, nothing is lost: the same command goes on")

    previous = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedByForce(
            "stopped at once, without saving: the same command goes on from the last save"
        ) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def note_exit_code(code: int) -> None:
    """Leave the exit code for a launcher of ours."""
    exit_code.note(code)
