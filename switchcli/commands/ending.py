"""How a command ends before its time: by a signal, or by an error that a user can mend. No torch: it takes seconds."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from switchcli.errors import Interrupted, InterruptedByForce, LostRank, OtherRankError, OutOfMemory, SwitchError, where
from switchcli.parallel.launch import is_rank, join_srun, report, report_stopped
from switchcli.parallel.signals import STOPPING
from switchcli.parallel.watch import STOPPED, Watch, can_watch
from switchcli.report.console import Console
from switchcli.report.output import print_json


@contextmanager
def stoppable(saves_nothing: bool = False) -> Iterator[None]:
    """Within, a stopping signal ends the command at once, but in the training loop, which has its own handlers.

    A command that `saves_nothing` on the way does not go on, but begins anew.

    Raises:
        Interrupted: from within, when the signal comes. All that was done is on the disk, or is done again the same.
        InterruptedByForce: in the loop Ctrl-C was pressed twice; or the command saves nothing.
    """

    came: list[SwitchError] = []

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if saves_nothing:
            came.append(InterruptedByForce(f"stopped by {name}: nothing was written; run it again"))
        else:
            came.append(Interrupted(f"stopped by {name}, nothing is lost: the same command goes on"))
        raise came[-1]

    previous = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        with _watched(came):
            yield
    except BaseException as error:
        # Raised between two steps of a clean-up, or within a library, it may come out as another error.
        if came and error is not came[-1]:
            raise came[-1] from error
        if not isinstance(error, KeyboardInterrupt):
            raise
        raise InterruptedByForce(
            "stopped at once, without saving: the same command goes on from the last save"
        ) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _watched(came: Sequence[SwitchError]) -> Iterator[None]:
    """Within, a rank watches the others of its machine: that one is lost is told by which, and how, and by one of them.

    What `came` is an end by a signal where nothing was being saved: a launcher's, when a rank is lost.
    """
    join_srun(os.environ)
    if not is_rank() or not can_watch():
        yield
        return

    def lost(error: BaseException | None) -> SwitchError:
        if not watch.is_first():
            return OtherRankError(LostRank.exit_code)
        step, how = (error.step, error.how) if isinstance(error, LostRank) else (None, "the other ranks have ended")
        return LostRank(watch.lost() or how, step)

    with Watch(lambda rank: report_stopped(rank, STOPPED), lambda: leave(lost(None))) as watch:
        try:
            yield
        except BaseException as error:
            if isinstance(error, LostRank) or (came and watch.lost()):
                raise lost(error) from error
            raise


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
    """Say why and leave at once: a rank does not wait for the others, which its launcher ends.

    What ranks end with for the sake of all, or of one that is lost, is for the launcher of this command to say.
    """
    rank = os.environ.get("RANK", "0")
    launched = report(error)
    if not (launched and isinstance(error, (Interrupted, LostRank))):
        own = is_rank() and (rank != "0" or isinstance(error, OutOfMemory)) and not isinstance(error, LostRank)
        if rank == "0" or not error.on_every_rank:
            say = Console().message if isinstance(error, Interrupted) else Console().error
            say(f"rank {rank}: {error}" if own else str(error))
    if "--json" in sys.argv and rank == "0" and not launched:
        print_json({"error": str(error), "exit_code": error.exit_code})
    _leave(error.exit_code)


def leave_by_defect(error: Exception) -> NoReturn:
    """The same for a rank that ends as nobody foresaw: what is known of where, and then the traceback."""
    first_line = str(error).partition("\n")[0]
    words = f"rank {os.environ['RANK']}, {where(error)}: {type(error).__name__}: {first_line}"
    Console().error(words)
    traceback.print_exception(error)
    report(SwitchError(words))
    _leave(SwitchError.exit_code)


def _leave(code: int) -> NoReturn:
    with suppress(OSError):  # a full disk is why it leaves, perhaps
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
