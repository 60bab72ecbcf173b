"""How a command ends before its time: by a signal, or by an error that a user can mend. No torch: it takes seconds."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from switchcli.errors import Interrupted, InterruptedByForce, SwitchError
from switchcli.parallel.launch import is_rank, report
from switchcli.parallel.signals import STOPPING
from switchcli.report.console import Console
from switchcli.report.output import print_json

AGAIN_SECONDS = 1.0
"""After which a signal is given once more that has not ended the command: a library may swallow what it raises."""


@contextmanager
def stoppable(saves_nothing: bool = False) -> Iterator[None]:
    """Within, a stopping signal ends the command at once, but in the training loop, which has its own handlers.

    A command that `saves_nothing` on the way does not go on, but begins anew.

    Raises:
        Interrupted: from within, when the signal comes. All that was done is on the disk, or is done again the same.
        InterruptedByForce: in the loop Ctrl-C was pressed twice; or the command saves nothing.
    """

    came: list[SwitchError] = []
    again: list[threading.Timer] = []

    def stop(number: int, frame: FrameType | None) -> None:
        again.append(threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGTERM)))
        again[-1].daemon = True
        again[-1].start()
        name = signal.Signals(number).name
        if not came and saves_nothing:
            came.append(InterruptedByForce(f"stopped by {name}: nothing was written; run it again"))
        elif not came:
            came.append(Interrupted(f"stopped by {name}, nothing is lost: the same command goes on"))
        raise came[0]

    def swallowed(what: "sys.UnraisableHookArgs") -> None:
        if what.exc_value not in came:
            hook(what)

    previous = {number: signal.signal(number, stop) for number in STOPPING}
    hook, sys.unraisablehook = sys.unraisablehook, swallowed
    try:
        yield
    except BaseException as error:
        # Raised between two steps of a clean-up, or within a library, it may come out as another error.
        if came and error is not came[0]:
            raise came[0] from error
        if not isinstance(error, KeyboardInterrupt):
            raise
        raise InterruptedByForce(
            "stopped at once, without saving: the same command goes on from the last save"
        ) from None
    finally:
        for timer in again:
            timer.cancel()
        sys.unraisablehook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)


def warn(text: str) -> None:
    """An alarm in words, once: on the main rank."""
    if os.environ.get("RANK", "0") == "0":
        Console().warning(text)


def leave_rank() -> None:
    """End a rank that went well at once: where the interpreter takes the process groups down, a thread may abort."""
    if is_rank():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def leave(error: SwitchError) -> NoReturn:
    """Say why and leave at once: a rank does not wait for the others, which its launcher ends."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        say = Console().message if isinstance(error, Interrupted) else Console().error
        say(str(error))
    elif not error.on_every_rank:
        Console().error(f"rank {rank}: {error}")
    launched = report(str(error), error.exit_code)  # then it is for the launcher to print the object
    if "--json" in sys.argv and rank == "0" and not launched:
        print_json({"error": str(error), "exit_code": error.exit_code})
    with suppress(OSError):  # a full disk is why it leaves, perhaps
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code)
