"""`--processes`: start the ranks of one command by torchrun, and forward signals to them.

torchrun ends the other ranks when one fails. `DistributedContext` finds the ranks of any launcher.

`accelerate launch --cpu` would not do: it starts a single process whatever number it is given (accelerate 1.15).
"""

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from switchcli.errors import DistributedError, Interrupted, InterruptedByForce
from switchcli.system.processor import available_processors, is_thread_count_set
from switchcli.system.signals import handling
from switchcli.system.startup import LAUNCHER

SAVING_SECONDS = 300
"""How long the ranks may take to save after a signal before they are killed."""
FORCED_SECONDS = 5
"""How long they may take to end at a Ctrl-C after another signal: one that waits for a hanging rank runs no handler."""
ALONE_SECONDS = 30
"""How long the others may take to end after the first one: a library may drop the exception of a handler."""
NOT_BEGUN = "stopped before the ranks had begun, nothing is lost: the same command goes on"


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m switchcli ARGUMENTS` as `processes` ranks of torchrun, and return the exit code of the command.

    The ranks print their own errors. If one is lost, torchrun's report names it.

    Raises:
        Interrupted: a signal came before the ranks could handle it.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    logging.disable(logging.CRITICAL)  # of torchrun, which logs each rank that it ends
    if not is_thread_count_set():
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_processors() // processes))
    os.environ[LAUNCHER] = str(os.getpid())
    stop = _Stop()
    with tempfile.TemporaryDirectory() as logs, handling(stop):
        options = [
            "--standalone",
            "--local-addr=localhost",  # the ranks would look for the host's full name, which may not resolve
            f"--nproc-per-node={processes}",
            "--signals-to-handle=SIGQUIT",  # `stop` handles the others
            f"--log-dir={logs}",  # torchrun would not remove a folder of its own
            "-m",
            "switchcli",
            *arguments,
        ]
        try:
            run(get_args_parser().parse_args(options))
        except ChildFailedError as failure:
            codes = [rank.exitcode for rank in failure.failures.values()]  # the one that failed first is the first
            code = exit_code(codes, stop.signals)
            if code == DistributedError.exit_code:
                sys.stderr.write(f"{failure}\n")
            return code
    return 0


def exit_code(codes: Sequence[int], signals: Sequence[int]) -> int:
    """Return the exit code of a command from those of its ranks that failed, in the order in which they ended.

    A rank that was killed has minus the number of the signal. `signals` are those that were forwarded to the ranks.

    A rank that failed by itself (1 to 5) counts before ranks that were stopped (75) or lost another rank (6).

    Raises:
        Interrupted: a signal came before the ranks could handle it.
    """
    if (failed := next((code for code in codes if 0 < code < DistributedError.exit_code), None)) is not None:
        return failed
    if signals and Interrupted.exit_code in codes:
        return Interrupted.exit_code
    if signal.SIGINT in signals[1:]:
        return InterruptedByForce.exit_code
    if any(-code in signals or code == InterruptedByForce.exit_code for code in codes if signals):
        raise Interrupted(NOT_BEGUN)
    return codes[0] if codes[0] > 0 else DistributedError.exit_code


class _Stop:
    """A signal handler that forwards stopping signals to the ranks. The first call returns when all ranks have ended.

    torchrun would forget the exit codes of ranks that it stops, and before torch 2.13 kill them after 30 seconds.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        """The signals that came."""
        self._deadline = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        import psutil

        ranks = psutil.Process().children()
        if not ranks:
            raise Interrupted(NOT_BEGUN)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        self.signals.append(number)
        if len(self.signals) > 1:  # within the first call
            if number == signal.SIGINT:
                self._deadline = min(self._deadline, time.monotonic() + FORCED_SECONDS)
            return
        self._deadline = time.monotonic() + SAVING_SECONDS
        # Ranks that have ended stay zombies until torchrun, which waits for this call, asks for their exit codes.
        while left := [rank for rank in ranks if rank.status() != psutil.STATUS_ZOMBIE]:
            if len(left) < len(ranks):
                self._deadline = min(self._deadline, time.monotonic() + ALONE_SECONDS)
            if time.monotonic() > self._deadline:
                for rank in ranks:
                    kill_with_children(rank.pid)
            time.sleep(0.05)


def kill_with_children(pid: int) -> None:
    """Kill a process and all that it has started, such as the ranks of a run."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                member.kill()
