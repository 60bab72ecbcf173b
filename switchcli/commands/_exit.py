"""Ending a command early: by a signal, or by an error that the user can fix.

This module imports no torch, which takes seconds to import.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType, MappingProxyType
from typing import Any, NoReturn

from switchcli.distributed.rendezvous import is_rank
from switchcli.errors import (
    Interrupted,
    InterruptedByForce,
    LostRankError,
    OutOfMemory,
    SwitchError,
    cause_chain,
    training_location,
)
from switchcli.system.signals import handling
from switchcli.system.startup import LAUNCHER, is_main_rank
from switchcli.terminal.console import Console, print_json
from switchcli.terminal.safe_text import command_line, one_line

FORCED = "stopped at once, without saving: the same command goes on from the last save, or begins anew if there is none"

CLOSED_PIPE = 128 + signal.SIGPIPE
"""The exit code where the reader of a pipe has closed it, such as `head`: that of a process which the signal ends."""


@contextmanager
def interruptible(saves_nothing: bool = False) -> Iterator[None]:
    """End the command at once when a stop signal comes. The training loop replaces these handlers by its own.

    `saves_nothing` says that the command keeps no intermediate results, so that it starts over when it is run again.

    Raises:
        Interrupted: a signal came. All finished work is on disk, or is repeated identically.
        InterruptedByForce: Ctrl-C followed another stop signal during training, evaluation or scoring, or a signal came
            and the command `saves_nothing`.
    """
    interruption: SwitchError | None = None

    def handle_signal(number: int, frame: FrameType | None) -> None:
        nonlocal interruption
        if any(isinstance(error, (SwitchError, KeyboardInterrupt)) for error in cause_chain(sys.exception())):
            return  # the command already ends, and cleans up
        name = signal.Signals(number).name
        if saves_nothing:
            interruption = InterruptedByForce(f"stopped by {name}: run the same command again")
        else:
            interruption = Interrupted(f"stopped by {name}, nothing is lost: the same command goes on")
        raise interruption

    try:
        with handling(handle_signal):
            yield
    except BaseException as error:
        # A signal during cleanup, or within a library, may surface as another error.
        if interruption is not None and error is not interruption:
            raise interruption from error
        if not isinstance(error, KeyboardInterrupt):
            raise
        raise InterruptedByForce(FORCED) from None


def exit_rank(code: str | int | None) -> None:
    """End this process at once if it is a rank. Torn down by the interpreter, process groups may abort a thread."""
    if is_rank():
        exit_with(code if isinstance(code, int) else 0)


def exit_with(code: int) -> NoReturn:
    """End this process at once, because tearing down torch takes seconds."""
    with suppress(OSError):  # a full disk may be the reason for the exit
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_with_error(error: SwitchError) -> NoReturn:
    """Print the error and end this process at once. A rank does not wait for the others: the launcher ends them."""
    rank = os.environ.get("RANK", "0")
    lines = [*map(one_line, error.lines)]
    if isinstance(error, LostRankError):
        lines = [
            one_line(f"{error}, {training_location(error)}: run the same command again to go on from the last save")
        ]
    text = "\n".join(lines)
    if rank == "0" or not error.on_every_rank:
        if rank != "0" or (is_rank() and isinstance(error, OutOfMemory)):
            lines[0] = f"rank {rank}: {lines[0]}"
        if isinstance(error, Interrupted):
            Console().message(text)
        else:
            Console().error(*lines)
        # Other ranks than those of `--processes` were started by another command.
        if isinstance(error, (Interrupted, InterruptedByForce)) and (LAUNCHER in os.environ or not is_rank()):
            Console().message(f"  {command_line()}")
    print_json_error(text, error.exit_code, error.result)
    exit_with(error.exit_code)


def print_json_error(text: str, exit_code: int, result: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Print an error and an earlier result as a JSON object if the command has `--json` and this is the main rank."""
    if "--json" in sys.argv and is_main_rank():
        with suppress(OSError):  # a closed stdout must not change the exit code
            print_json({"error": text, "exit_code": exit_code, **result})


def exit_with_traceback(error: Exception) -> None:
    """Print an unexpected error with its traceback and its training step, and end this rank. Return if no rank."""
    if is_rank():
        first_line = f"{type(error).__name__}: {error}".split("\n")[0]
        text = f"rank {os.environ['RANK']}, {training_location(error)}: {first_line}"
        Console().error(text)
        traceback.print_exception(error)
        exit_with(SwitchError.exit_code)
