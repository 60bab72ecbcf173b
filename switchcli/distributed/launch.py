"""Ranks of one command: started by torchrun from here, or found where srun started them.

torchrun watches the ranks that it starts: it ends the others when one fails, forwards signals and collects error files.
This module chooses its options, and reports in one line why the ranks ended. torch is imported only to start ranks.

`accelerate launch --cpu` would not do: it starts a single process whatever number it is given (accelerate 1.15).
`DistributedContext` finds the ranks of any launcher.
"""

import json
import logging
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
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
from switchcli.system.signals import stop_signals
from switchcli.system.startup import LAUNCHER

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SAVING_SECONDS = 300
"""How long the ranks may take to save after a signal before they are killed."""
TORCHRUN_SAVING_SECONDS = 30
"""The saving time with the torchrun of torch 2.12 and older, which has no option for it. torchrun of every version also
gives the other ranks this time to end after one has failed."""
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
            *([f"--shutdown-timeout={SAVING_SECONDS}"] if _has_shutdown_timeout() else []),
            "--signals-to-handle=SIGQUIT",  # _forward_signals handles the others
            f"--log-dir={logs}",  # for the error files; torchrun would not remove a folder of its own
            "-m",
            "switchcli",
            *arguments,
        ]
        try:
            with _forward_signals():
                run(get_args_parser().parse_args(options))  # type: ignore[no-untyped-call]
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
    return SAVING_SECONDS if _has_shutdown_timeout() else TORCHRUN_SAVING_SECONDS


def _has_shutdown_timeout() -> bool:
    """Return whether torchrun has the option `--shutdown-timeout`: torch 2.13 has it, 2.11 does not."""
    from torch.distributed.run import get_args_parser

    return "--shutdown-timeout" in get_args_parser().format_help()


@contextmanager
def _forward_signals() -> Iterator[None]:
    """Have torchrun forward the first stopping signal to the ranks, and wait until they end.

    This process sends later signals to the ranks itself; at a second Ctrl-C they exit at once. torchrun's own handlers,
    such as that of SIGQUIT, would cut its wait short.
    """
    import psutil
    from torch.distributed.elastic.multiprocessing.api import SignalException

    is_stopping = has_ended = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        if has_ended:
            return
        if not is_stopping:
            is_stopping = True
            raise SignalException("stopped", signal.Signals(number))  # torchrun catches it and stops the ranks
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    previous = {number: signal.getsignal(number) for number in (*stop_signals(), signal.SIGQUIT)}
    try:
        for number in previous:
            signal.signal(number, forward)
        yield
    finally:
        has_ended = True
        for number, handler in previous.items():
            signal.signal(number, handler)


def _first_failure(failures: Mapping[int, "ProcessFailure"], reports: Mapping[int, Exit]) -> Exit:
    """Return how the rank ended that made all others end.

    Args:
        failures: what torchrun knows of each rank that failed, by rank: exit code (minus the signal) and time.
        reports: what the ranks have written to their error files, by rank.

    Raises:
        LostRankError, DistributedError, Interrupted: as `launch` says.
    """
    # torchrun rounds times down to seconds; those in the error files are exact.
    times = {rank: failure.error_file_data.get("timestamp", failure.timestamp) for rank, failure in failures.items()}
    codes = {rank: failures[rank].exitcode for rank in sorted(times, key=times.__getitem__)}  # the earliest first
    # After the first failure torchrun sends SIGTERM to the others, and SIGKILL to those that have not ended in time.
    deadline = min(times.values()) + TORCHRUN_SAVING_SECONDS - 1  # 1 s for the rounding
    hung = {rank for rank, code in codes.items() if code == -signal.SIGKILL and times[rank] >= deadline}
    # Followers ended because of another rank: they report so, or torchrun ended them.
    followers = set(hung)
    for rank, code in codes.items():
        if rank in reports:
            if reports[rank].location:
                followers.add(rank)
        elif code == -signal.SIGTERM:
            followers.add(rank)

    def priority(rank: int) -> int:
        """Rank killed by a signal, rank that failed, hung rank, follower with a report, follower without."""
        if rank in followers:
            if rank in hung:
                return 2
            return 3 if rank in reports else 4
        return 0 if codes[rank] < 0 else 1

    first = min(codes, key=priority)  # the earliest of those with the same priority
    if first not in reports or (codes[first] < 0 and first not in followers):
        how = "was stopped or hung, and was killed" if first in hung else _describe_exit(codes[first])
        lost = LostRankError(f"rank {first} {how}")
        # The note is read by `training_location`. min prefers "after step N" to "outside training".
        locations = [report.location for report in reports.values() if report.location]
        lost.add_note(min(locations, default=errors.UNKNOWN))
        raise lost
    # If the main rank failed itself, its message is the one that it has printed for all.
    return _raise_if_common(reports[0] if 0 in reports and 0 not in followers else reports[first])


def _raise_if_common(report: Exit) -> Exit:
    """Return the report of a rank that printed its own error. Raise that of one that ended as all ranks did."""
    if report.location:
        raise (Interrupted if report.exit_code == Interrupted.exit_code else DistributedError)(report.error)
    return report


def _describe_exit(code: int) -> str:
    """Return how a rank ended, from its exit code or minus the number of a signal; it follows "rank 1"."""
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
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


def is_rank() -> bool:
    """Return whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_srun(environment: MutableMapping[str, str]) -> None:
    """Set the variables that torchrun sets for a rank, if srun started this process as one of several tasks.

    These are RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Those that are set stay,
    and nothing is done if RANK is set.

    Raises:
        DistributedError: there are several tasks, and the machine of the first one is not known.
    """
    rank = environment.get("SLURM_PROCID", "0")
    # A batch script is not a task, but SLURM_NTASKS is set in it: this variable counts only where the rank is not 0.
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1") if rank != "0" else "1")
    if "RANK" in environment or tasks == "1":
        return
    # The first machine of a list such as `node[03-05,9]`, `a,b` or `a`: a name, and the first number in brackets.
    host = re.match(r"([\w.-]+)(?:\[(\d+)[\d,-]*\])?(?:,|$)", environment.get("SLURM_STEP_NODELIST", ""))
    if "MASTER_ADDR" not in environment and host is None:
        raise DistributedError(
            f"started by srun with {tasks} tasks: set MASTER_ADDR and MASTER_PORT for them to meet at, or use torchrun"
        )
    if host is not None:
        environment.setdefault("MASTER_ADDR", host[1] + (host[2] or ""))
    # All tasks derive the same port, from 20000 to 29999, from the last four digits of the job's number.
    job = environment.get("SLURM_JOB_ID", "0")
    if "MASTER_PORT" not in environment and not re.fullmatch("[0-9]+", job):
        raise DistributedError(f"SLURM_JOB_ID ({job!r}) must be a number: set MASTER_PORT for the tasks to meet at")
    environment.setdefault("MASTER_PORT", str(20000 + int(job[-4:])))
    environment.update(RANK=rank, WORLD_SIZE=tasks, LOCAL_RANK=environment.get("SLURM_LOCALID", "0"))
    local_tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))  # of `2(x3)` or `4,2`
    if local_tasks is not None:
        environment.setdefault("LOCAL_WORLD_SIZE", local_tasks[0])
