"""Ranks of one command: started here by torchrun, or found where srun started them. No torch until they start.

torchrun watches its ranks: it ends the others when one fails, forwards signals and collects error files. This module
chooses its options, and says in one line why the ranks ended.

`accelerate launch --cpu` starts a single process whatever number it is given (accelerate 1.15); torchrun does not.
`DistributedContext` finds its ranks as it finds those of any launcher.
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
from switchcli.distributed.signals import stop_signals
from switchcli.errors import (
    DistributedError,
    Interrupted,
    LostRankError,
    OtherRankError,
    SwitchError,
    training_location,
)
from switchcli.startup import LAUNCHER

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SAVING_SECONDS = 300
"""How long the ranks may take to save after a signal before they are killed."""
TORCHRUN_SAVING_SECONDS = 30
"""SAVING_SECONDS with the torchrun of torch 2.12 and older, which has no option for it. After the failure of a rank,
torchrun of every version gives the others as long to end."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""The environment variable that gives a rank of torchrun the path of its error file."""


class Exit(NamedTuple):
    """How a rank ended, or all of them: the exit code, and why when it is not 0; a rank has said so on stderr."""

    exit_code: int
    error: str | None
    where: str = ""
    """After which step a rank ended for the sake of all, or of one that is lost: then `launch` raises it to be said."""


def launch(processes: int, arguments: Sequence[str]) -> Exit:
    """Run `python -m switchcli ARGUMENTS` as `processes` ranks, by torchrun.

    A rank that fails ends the others; the code is that of the rank that failed first, as it printed why.

    Raises:
        DistributedError: a rank was killed, or ended without a word, or all were stopped without saving.
        Interrupted: all were stopped, and have saved.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    logging.disable(logging.CRITICAL)  # the ranks say themselves why they end
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ[LAUNCHER] = str(os.getpid())
    with tempfile.TemporaryDirectory() as logs:
        options = [
            "--standalone",
            f"--nproc-per-node={processes}",
            *([f"--shutdown-timeout={SAVING_SECONDS}"] if _takes_shutdown_timeout() else []),
            "--signals-to-handle=SIGQUIT",  # the others are handled here
            f"--log-dir={logs}",  # for the error files; a folder of torchrun's own would stay
            "-m",
            "switchcli",
            *arguments,
        ]
        try:
            with _signals_forwarded():
                run(get_args_parser().parse_args(options))  # type: ignore[no-untyped-call]
        except ChildFailedError as failure:
            return _first_of(failure.failures, _reports(logs))
        except SignalException as stopped:
            # torchrun drops the exit codes of ranks that it has stopped.
            told = _reports(logs)
            if 0 in told:
                return _said(told[0])
            if all(one.where in ("", errors.OUTSIDE) for one in told.values()):  # it came before all could handle it
                signal.raise_signal(stopped.sigval)
            raise DistributedError("stopped, and no word of how the ranks ended: the same command goes on") from None
        finally:
            del os.environ[LAUNCHER]
    return Exit(0, None)


def saving_seconds() -> int:
    """Return how many seconds ranks that `launch` starts have to save after a signal. Depends on the torch version."""
    return SAVING_SECONDS if _takes_shutdown_timeout() else TORCHRUN_SAVING_SECONDS


def _takes_shutdown_timeout() -> bool:
    """Return whether this torch's torchrun has `--shutdown-timeout` (2.13 has, 2.11 has not)."""
    from torch.distributed.run import get_args_parser

    return "--shutdown-timeout" in get_args_parser().format_help()


@contextmanager
def _signals_forwarded() -> Iterator[None]:
    """Have torchrun forward the first stopping signal to the ranks and wait until they end.

    Signals after the first go to the ranks as well, which leave at once at a second Ctrl-C: torchrun's own handlers
    would cut its wait short, as its handler of SIGQUIT still does.
    """
    import psutil
    from torch.distributed.elastic.multiprocessing.api import SignalException

    asked = ended = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if ended:
            return
        if not asked:
            asked = True
            raise SignalException("stopped", signal.Signals(number))  # which torchrun catches
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    previous = {number: signal.getsignal(number) for number in (*stop_signals(), signal.SIGQUIT)}
    try:
        for number in previous:
            signal.signal(number, forward)
        yield
    finally:
        ended = True
        for number, handler in previous.items():
            signal.signal(number, handler)


def _first_of(failures: Mapping[int, "ProcessFailure"], told: Mapping[int, Exit]) -> Exit:
    """Return how the rank ended that made all end, from torchrun's account of each rank and what the ranks reported.

    A rank follows another if it says so, or if torchrun ended it: by SIGTERM, and by SIGKILL where that was in vain.

    Raises:
        DistributedError: as `launch` says.
        Interrupted: as `launch` says.
    """
    # torchrun rounds times down to seconds; those in the error files are exact.
    times = {rank: one.error_file_data.get("timestamp", one.timestamp) for rank, one in failures.items()}
    codes = {rank: failures[rank].exitcode for rank in sorted(times, key=times.__getitem__)}
    deadline = min(times.values()) + TORCHRUN_SAVING_SECONDS - 1
    hung = {rank for rank, code in codes.items() if code == -signal.SIGKILL and times[rank] >= deadline}
    follow = hung | {rank for rank in codes if (told[rank].where if rank in told else codes[rank] == -signal.SIGTERM)}

    def order(rank: int) -> int:
        if rank in follow:
            return 2 if rank in hung else 3 if rank in told else 4
        return 0 if codes[rank] < 0 else 1

    rank = min(codes, key=order)  # of several the earliest
    if rank not in told or (codes[rank] < 0 and rank not in follow):
        how = "was stopped or hung, and was killed" if rank in hung else describe_exit(codes[rank])
        lost = LostRankError(f"rank {rank} {how}")
        lost.add_note(min((one.where for one in told.values() if one.where), default=errors.UNKNOWN))  # a step first
        raise lost
    return _said(told[0] if 0 in told and 0 not in follow else told[rank])  # the main one's words are those of all


def _said(ended: Exit) -> Exit:
    if ended.where:
        raise (Interrupted if ended.exit_code == Interrupted.exit_code else DistributedError)(ended.error)
    return ended


def describe_exit(code: int) -> str:
    """In words, after `rank 1`: by an exit code, or minus the number of a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ": for want of memory, perhaps" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code} ({signal.Signals(-code).name}{hint})"


def write_error_file(error: SwitchError, words: str) -> bool:
    """Write why this rank ends to its error file, if torchrun started it. torchrun shows the words in its summary.

    Return whether `launch` started it and has its words, to say for all ranks that they were stopped, or one is lost.
    """
    written = False
    if error_file := os.environ.get(ERROR_FILE):
        place = training_location(error) if isinstance(error, (LostRankError, OtherRankError, Interrupted)) else ""
        told = {"message": words, "timestamp": time.time(), "exit_code": error.exit_code, "where": place}
        path = Path(error_file)
        partial = path.with_suffix(".partial")  # torchrun fails on a file that is not complete
        with suppress(OSError):  # the launcher is gone, or the disk is full
            partial.write_text(json.dumps(told), encoding="utf-8")
            partial.replace(path)
            written = True
    return LAUNCHER in os.environ and written


def _reports(logs: str) -> dict[int, Exit]:
    """Return what the ranks have reported, by rank: torchrun gives each a folder named by its rank."""
    told = {int(path.parent.name): json.loads(path.read_text("utf-8")) for path in Path(logs).rglob("error.json")}
    return {rank: Exit(one["exit_code"], one["message"], one["where"]) for rank, one in told.items()}


def is_rank() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_srun(environment: MutableMapping[str, str]) -> None:
    """Name this task of srun's as torchrun names a rank: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT.

    A batch script is no task, though SLURM tells it how many there will be: the step's own number decides.

    Raises:
        DistributedError: several tasks, and no telling where the first of them is.
    """
    rank = environment.get("SLURM_PROCID", "0")
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1") if rank != "0" else "1")
    if "RANK" in environment or tasks == "1":
        return
    # The first of `node[03-05,9]`, `a,b` or `a`.
    host = re.match(r"([\w.-]+)(?:\[(\d+)[\d,-]*\])?(?:,|$)", environment.get("SLURM_STEP_NODELIST", ""))
    if "MASTER_ADDR" not in environment and host is None:
        raise DistributedError(
            f"started by srun with {tasks} tasks: set MASTER_ADDR and MASTER_PORT for them to meet at, or use torchrun"
        )
    if host is not None:
        environment.setdefault("MASTER_ADDR", host[1] + (host[2] or ""))
    job = environment.get("SLURM_JOB_ID", "0")
    if "MASTER_PORT" not in environment and not re.fullmatch("[0-9]+", job):
        raise DistributedError(f"SLURM_JOB_ID ({job!r}) must be a number: set MASTER_PORT for the tasks to meet at")
    environment.setdefault("MASTER_PORT", str(20000 + int(job[-4:])))
    environment.update(RANK=rank, WORLD_SIZE=tasks, LOCAL_RANK=environment.get("SLURM_LOCALID", "0"))
    each = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))  # of `2(x3)` or `4,2`
    if each is not None:
        environment.setdefault("LOCAL_WORLD_SIZE", each[0])
