"""The launcher of `--processes`: it starts the ranks of one command by torchrun.

torchrun watches the ranks that it starts: it ends the others when one fails, forwards signals and collects error files.
This module chooses its options, and reports in one line why the ranks ended. torch is imported only to start ranks.

`accelerate launch --cpu` would not do: it starts a single process whatever number it is given (accelerate 1.15).
`DistributedContext` finds the ranks of any launcher.
"""

import json
import logging
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from switchcli import errors
from switchcli.errors import (
    DistributedError,
    Interrupted,
    LostRankError,
    OtherRankError,
    SwitchError,
    training_location,
)
from switchcli.system.processor import available_processors, is_thread_count_set
from switchcli.system.signals import handling, stop_signals
from switchcli.system.startup import LAUNCHER

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SAVING_SECONDS = 300
"""How long the ranks may take to save after a signal before they are killed."""
TORCHRUN_SAVING_SECONDS = 30
"""The saving time with the torchrun of torch 2.12 and older, which has no option for it. torchrun of every version also
gives the other ranks this time to end after one has failed."""
_FORCED_SECONDS = 5
"""How long ranks may take to end at a Ctrl-C that follows another signal before they are killed."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""The environment variable that gives a rank of torchrun the path of its error file."""


class Exit(NamedTuple):
    """How a rank, or the whole command, ended."""

    exit_code: int
    error: str | None
    """The error message, which a rank has printed to stderr; None after success."""
    location: str = ""
    """Where in training a rank ended because all were stopped or another rank was lost: such errors are not printed by
    the ranks but raised by `launch`, once for all. Empty for a rank that failed itself."""


def launch(processes: int, arguments: Sequence[str]) -> Exit:
    """Run `python -m switchcli ARGUMENTS` as `processes` ranks of torchrun, and return how they ended.

    A rank that fails ends the others; the exit code and error are those of the rank that failed first.

    Raises:
        LostRankError: a rank was killed, or ended without an error report.
        DistributedError: the ranks were stopped and have not reported how they ended.
        Interrupted: the ranks were stopped, and have saved.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    logging.disable(logging.CRITICAL)  # the ranks print why they end; torchrun would repeat it
    if not is_thread_count_set():
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_processors() // processes))
    os.environ[LAUNCHER] = str(os.getpid())
    with tempfile.TemporaryDirectory() as logs:
        options = [
            "--standalone",
            f"--nproc-per-node={processes}",
            *([f"--shutdown-timeout={SAVING_SECONDS}"] if has_shutdown_timeout() else []),
            "--signals-to-handle=SIGQUIT",  # _forward_signals handles the others
            f"--log-dir={logs}",  # for the error files; torchrun would not remove a folder of its own
            "-m",
            "switchcli",
            *arguments,
        ]
        try:
            with _forward_signals():
                run(get_args_parser().parse_args(options))
        except ChildFailedError as failure:
            return _first_failure(failure.failures, _read_reports(logs))
        except SignalException as stopped:
            # torchrun drops the exit codes of ranks that it has stopped: only their reports tell how they ended.
            reports = _read_reports(logs)
            if 0 in reports:
                return _raise_if_common(reports[0])
            if all(report.location in ("", errors.OUTSIDE) for report in reports.values()):
                # The signal came before all ranks could handle it: end this process by it as well.
                signal.raise_signal(stopped.sigval)
            raise DistributedError(
                "stopped, and the ranks have not reported how they ended: run the same command again to go on from the "
                "last save"
            ) from None
        finally:
            del os.environ[LAUNCHER]
    return Exit(0, None)


def kill_with_children(pid: int) -> None:
    """Kill a process and all that it has started, such as the ranks of a run."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                member.kill()


def saving_seconds() -> int:
    """Return how many seconds the ranks have to save after a signal; it depends on the version of torch."""
    return SAVING_SECONDS if has_shutdown_timeout() else TORCHRUN_SAVING_SECONDS


def has_shutdown_timeout() -> bool:
    """Return whether torchrun has the option `--shutdown-timeout`: torch 2.13 has it, 2.11 does not."""
    from torch.distributed.run import get_args_parser

    return "--shutdown-timeout" in get_args_parser().format_help()


@contextmanager
def _forward_signals() -> Iterator[None]:
    """Have torchrun forward the first stopping signal to the ranks, and wait until they end.

    This process sends later signals to the ranks itself; at a second Ctrl-C they exit at once, or are killed if they
    cannot: one that waits for a rank which hangs runs no handler. torchrun's own handlers, such as that of SIGQUIT,
    would cut its wait short.
    """
    import psutil
    from torch.distributed.elastic.multiprocessing.api import SignalException

    is_stopping = is_forced = False

    def kill_ranks() -> None:
        for rank in psutil.Process().children():
            kill_with_children(rank.pid)

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping, is_forced
        if not is_stopping:
            is_stopping = True
            raise SignalException("stopped", signal.Signals(number))  # torchrun catches it and stops the ranks
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if number == signal.SIGINT and not is_forced:
            is_forced = True
            killer.start()

    killer = Timer(_FORCED_SECONDS, kill_ranks)
    try:
        with handling(forward, (*stop_signals(), signal.SIGQUIT)):
            yield
    finally:
        killer.cancel()


def _first_failure(failures: Mapping[int, "ProcessFailure"], reports: Mapping[int, Exit]) -> Exit:
    """Return how the rank ended that made all others end: the earliest that did not follow another one.

    Example: rank 1 is killed at 10 s, without a report. Rank 0 misses it and reports at 12 s, with a location, that a
    rank is lost. torchrun ends rank 2 by SIGTERM at 12 s. The kinds are 1 for rank 0, 0 for rank 1, 2 for rank 2: the
    first failure is that of rank 1.

    Args:
        failures: what torchrun knows of each rank that failed, by rank: exit code (minus the signal) and time.
        reports: what the ranks have written to their error files, by rank.

    Raises:
        LostRankError, DistributedError, Interrupted: as `launch` says.
    """

    def order(rank: int) -> tuple[int, float]:
        """0: the rank failed itself. 1: it reports that it followed another one. 2: torchrun ended it by SIGTERM."""
        failure = failures[rank]
        if rank in reports:
            kind = 1 if reports[rank].location else 0
        else:
            kind = 2 if failure.exitcode == -signal.SIGTERM else 0
        # torchrun rounds times down to seconds; those in the error files are exact.
        return kind, failure.error_file_data.get("timestamp", failure.timestamp)

    first = min(failures, key=order)
    if first in reports:
        return _raise_if_common(reports[first])
    lost = LostRankError(f"rank {first} {_describe_exit(failures[first].exitcode)}")
    # The note is read by `training_location`. min prefers "after step N" to "outside training".
    locations = [report.location for report in reports.values() if report.location]
    lost.add_note(min(locations, default=errors.UNKNOWN))
    raise lost


def _raise_if_common(report: Exit) -> Exit:
    """Return the report of a rank that printed its own error. Raise that of one that ended as all ranks did."""
    if report.location:
        raise (Interrupted if report.exit_code == Interrupted.exit_code else DistributedError)(report.error)
    return report


def _describe_exit(code: int) -> str:
    """Return how a rank ended, from its exit code or minus the number of a signal; it follows "rank 1"."""
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ", perhaps for lack of memory, or because it hung" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code} ({signal.Signals(-code).name}{hint})"


def write_error_file(error: SwitchError, message: str) -> bool:
    """Write why this rank ends to its error file, if torchrun started it.

    torchrun shows the message in its summary, and `launch` reads the file. Return whether `launch` started this rank
    and has its message: it then reports for all ranks that they were stopped, or that one is lost.
    """
    is_written = False
    if error_file := os.environ.get(ERROR_FILE):
        # Errors that all ranks share carry a location (see Exit).
        location = training_location(error) if isinstance(error, (LostRankError, OtherRankError, Interrupted)) else ""
        report = {"message": message, "timestamp": time.time(), "exit_code": error.exit_code, "where": location}
        path = Path(error_file)
        partial = path.with_suffix(".partial")  # renamed when complete: torchrun fails on half a file
        with suppress(OSError):  # the launcher is gone, or the disk is full
            partial.write_text(json.dumps(report), encoding="utf-8")
            partial.replace(path)
            is_written = True
    return LAUNCHER in os.environ and is_written


def _read_reports(logs: str) -> dict[int, Exit]:
    """Return what the ranks have written to their error files, by rank. torchrun names their folders by the rank."""
    reports = {}
    for path in Path(logs).rglob("error.json"):
        report = json.loads(path.read_text("utf-8"))
        reports[int(path.parent.name)] = Exit(report["exit_code"], report["message"], report["where"])
    return reports
