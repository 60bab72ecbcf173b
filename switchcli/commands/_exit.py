"""How a command ends before its time: by a signal, or by an error that a user can mend. No torch: it takes seconds."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from switchcli.distributed.launch import is_rank, join_srun, write_error_file
from switchcli.distributed.rendezvous import check_environment
from switchcli.distributed.signals import stop_signals
from switchcli.errors import (
    Interrupted,
    InterruptedByForce,
    LostRankError,
    OutOfMemory,
    SwitchError,
    cause_chain,
    training_location,
)
from switchcli.report.console import Console, print_json, silent
from switchcli.report.safe_text import one_line

FORCED = "stopped at once, without saving: the same command goes on from the last save"
AGAIN_SECONDS = 1.0
"""After which a signal is given once more that has not ended the command: a library may swallow what it raises."""


@contextmanager
def interruptible(saves_nothing: bool = False, ranks: bool = False) -> Iterator[None]:
    """Have a stopping signal end the command at once, except in the training loop, which has its own handlers.

    A command that `saves_nothing` on the way does not go on, but begins anew. One that may run on `ranks` finds out
    here whether it is one of several.

    Raises:
        Interrupted: from within, when the signal comes. All that was done is on the disk, or is done again the same.
        InterruptedByForce: in the loop Ctrl-C was pressed twice; or the command saves nothing.
        RecipeError: environment variables by which ranks cannot meet.
        DistributedError: tasks of srun that do not know where to meet.
    """
    came: list[SwitchError] = []
    again = [threading.Timer(0, lambda: None)]

    def asked(number: int) -> SwitchError:
        name = signal.Signals(number).name
        if saves_nothing:
            return InterruptedByForce(f"stopped by {name}: nothing was written; run it again")
        return Interrupted(f"stopped by {name}, nothing is lost: the same command goes on")

    def stop(number: int, frame: FrameType | None) -> None:
        again[0].cancel()
        again[0] = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))
        again[0].daemon = True
        again[0].start()
        if any(isinstance(one, (SwitchError, KeyboardInterrupt)) for one in cause_chain(sys.exception())):
            return  # it is on its way out, and tidies up; if that is a library's doing, it is given again
        if not came:
            came.append(asked(number))
        raise came[0]

    def swallowed(what: "sys.UnraisableHookArgs") -> None:
        if what.exc_value not in came:
            hook(what)

    previous = {number: signal.signal(number, stop) for number in stop_signals()}
    hook, sys.unraisablehook = sys.unraisablehook, swallowed
    try:
        if ranks:
            join_srun(os.environ)
            check_environment(os.environ)
        yield
    except BaseException as error:
        # Raised between two steps of a clean-up, or within a library, it may come out as another error.
        if came and error is not came[0]:
            raise came[0] from error
        if not isinstance(error, KeyboardInterrupt):
            raise
        raise InterruptedByForce(FORCED) from None
    finally:
        again[0].cancel()
        sys.unraisablehook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)


def console() -> Console:
    """Return the console of what a command does before its ranks meet: those other than the first print nothing."""
    return Console() if os.environ.get("RANK", "0") == "0" else silent()


def exit_rank() -> None:
    """End a rank that went well at once: where the interpreter takes the process groups down, a thread may abort."""
    if is_rank():
        sys.stdout.flush()
        exit_with(0)


def exit_with(code: int) -> NoReturn:
    """End this process at once: a torch that is taken down takes seconds."""
    with suppress(OSError):  # a full disk is why it leaves, perhaps
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_with_error(error: SwitchError) -> NoReturn:
    """Say why and leave at once: a rank does not wait for the others, which its launcher ends."""
    rank, lines = os.environ.get("RANK", "0"), [*map(one_line, error.lines)]
    if isinstance(error, LostRankError):
        lines = [
            one_line(f"{error}, {training_location(error)}: run the same command again to go on from the last save")
        ]
    words = "\n".join(lines)
    launched = write_error_file(error, words)  # then it says that all were stopped, or one is lost
    if not (launched and isinstance(error, (Interrupted, LostRankError))) and (rank == "0" or not error.on_every_rank):
        if rank != "0" or (is_rank() and isinstance(error, OutOfMemory)):
            lines[0] = f"rank {rank}: {lines[0]}"
        if isinstance(error, Interrupted):
            Console().message(words)
        else:
            Console().error(*lines)
    if "--json" in sys.argv and rank == "0" and not launched:
        with suppress(OSError):  # the exit code must not change because stdout is gone
            print_json({"error": words, "exit_code": error.exit_code})
    exit_with(error.exit_code)


def exit_with_traceback(error: Exception) -> None:
    """Print where an unexpected error ended this rank, and the traceback, and leave at once. One process returns."""
    if is_rank():
        words = f"rank {os.environ['RANK']}, {training_location(error)}: {type(error).__name__}: {error}".split("\n")[0]
        Console().error(words)
        traceback.print_exception(error)
        write_error_file(SwitchError(words), words)
        exit_with(SwitchError.exit_code)
