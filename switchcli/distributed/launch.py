"""Ranks of one command: started here as torchrun would, or found where srun started them. No torch until they start.

`accelerate launch --cpu` starts a single process whatever number it is given (accelerate 1.15); torch's launcher does
not. `Runtime` finds its ranks as it finds those of any launcher.
"""

import json
import logging
import os
import re
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from switchcli import errors
from switchcli.distributed.signals import signals_read, stopping
from switchcli.errors import DistributedError, Interrupted, LostRank, OtherRankError, SwitchError, where
from switchcli.startup import LAUNCHER

SAVING_SECONDS = 300
"""How long the ranks may take to save after a signal before they are killed."""
TORCHRUN_SAVING_SECONDS = 30
"""SAVING_SECONDS with the torchrun of torch 2.12 and older, which has no option for it."""
REPORT_SECONDS = 30
"""How long `launch` waits for the main rank's report after it was stopped several times over."""
REPORTS = "SWITCHCLI_REPORTS"
"""The environment variable by which `launch` names its ranks the folder for their reports."""


class Ended(NamedTuple):
    """How a rank ended, or all of them: the exit code, and why when it is not 0; a rank has said so on stderr."""

    exit_code: int
    error: str | None
    where: str = ""
    """After which step a rank ended for the sake of all, or of one that is lost: then `launch` raises it to be said."""


def launch(processes: int, arguments: Sequence[str]) -> Ended:
    """Run `python -m switchcli ARGUMENTS` as `processes` ranks.

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
    forwarded = (*stopping(), signal.SIGQUIT)
    own = {number: signal.getsignal(number) for number in forwarded}
    with tempfile.TemporaryDirectory() as reports:
        os.environ.update({REPORTS: reports, LAUNCHER: str(os.getpid())})
        options = [
            "--standalone",
            f"--nproc-per-node={processes}",
            *([f"--shutdown-timeout={SAVING_SECONDS}"] if _takes_shutdown_timeout() else []),
            f"--signals-to-handle={','.join(one.name for one in forwarded)}",
            f"--log-dir={reports}",  # else a folder of its own stays
            "-m",
            "switchcli",
            *arguments,
        ]
        try:
            with _second_ctrl_c_handed_on():
                run(get_args_parser().parse_args(options))  # type: ignore[no-untyped-call]
        except ChildFailedError as failure:
            in_order = sorted(failure.failures.items(), key=lambda item: item[1].timestamp)
            return _first_of({rank: one.exitcode for rank, one in in_order}, reports)
        except SignalException as stopped:
            # torch forwarded the signal and forgets how the ranks took it; the main one tells.
            if told := _awaited(reports, forwarded):
                return _said(told)
            others = [one for rank in range(processes) if (one := _reported(reports, rank))]
            if all(one.where in ("", errors.OUTSIDE) for one in others):  # it came before all could heed it
                signal.signal(stopped.sigval, own[stopped.sigval])
                signal.raise_signal(stopped.sigval)
            raise DistributedError("stopped, and no word of how the ranks ended: the same command goes on") from None
        finally:
            del os.environ[LAUNCHER]
    return Ended(0, None)


def saving_seconds() -> int:
    """Return how many seconds ranks that `launch` starts have to save after a signal. Depends on the torch version."""
    return SAVING_SECONDS if _takes_shutdown_timeout() else TORCHRUN_SAVING_SECONDS


def _takes_shutdown_timeout() -> bool:
    """Return whether this torch's torchrun has `--shutdown-timeout` (2.13 has, 2.11 has not)."""
    from torch.distributed.run import get_args_parser

    return "--shutdown-timeout" in get_args_parser().format_help()


@contextmanager
def _second_ctrl_c_handed_on() -> Iterator[None]:
    """Within, a second SIGINT reaches the ranks, in a session of their own, as one: torch would ask them again to save,
    and wait. On Linux alone."""

    def hand_on(signals: int) -> None:
        seen = 0
        while select.select([signals], [], []) and (numbers := os.read(signals, 64)):
            seen += numbers.count(signal.SIGINT)
            for pid in children(os.getpid()) if signal.SIGINT in numbers and seen > 1 else ():
                with suppress(OSError):
                    os.kill(pid, signal.SIGINT)
        os.close(signals)

    if sys.platform != "linux":
        yield
        return
    with signals_read() as signals:
        Thread(target=hand_on, args=(signals,), name="second Ctrl-C", daemon=True).start()
        yield


def children(parent: int) -> set[int]:
    """The processes that it has started and that have not been waited for; on Linux."""
    found: set[int] = set()
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        with suppress(OSError):
            found |= {*map(int, path.read_text().split())}
    return found


def _first_of(ended: Mapping[int, int], reports: str) -> Ended:
    """Whose end was that of all, of ranks in the order in which they were seen to end, with their exit codes.

    One that was killed comes before those that lost it, and torch ends the rest by SIGTERM.
    """
    told = {rank: one for rank in ended if (one := _reported(reports, rank))}
    follow = {rank for rank, code in ended.items() if (told[rank].where if rank in told else code == -signal.SIGTERM)}
    rank = min(ended, key=lambda one: (one in follow, ended[one] >= 0))
    if rank not in told or (ended[rank] < 0 and rank not in follow):
        lost = LostRank(told[rank].error if rank in told else f"rank {rank} {how_ended(ended[rank])}")
        lost.add_note(min((one.where for one in told.values() if one.where), default=errors.UNKNOWN))  # a step first
        raise lost
    return _said(told[0] if 0 in told and 0 not in follow else told[rank])  # the main one's words are those of all


def _said(ended: Ended) -> Ended:
    if ended.where:
        raise (Interrupted if ended.exit_code == Interrupted.exit_code else DistributedError)(ended.error)
    return ended


def how_ended(code: int) -> str:
    """In words, after `rank 1`: by an exit code, or minus the number of a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ": for want of memory, perhaps" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code} ({signal.Signals(-code).name}{hint})"


def report(error: SwitchError, words: str) -> bool:
    """Leave why this rank ends for the `launch` that started it; False when none did."""
    if REPORTS not in os.environ or not is_rank():
        return False
    place = where(error) if isinstance(error, (LostRank, OtherRankError, Interrupted)) else ""
    return report_of(int(os.environ["RANK"]), Ended(error.exit_code, words, place))


def report_of(rank: int, told: Ended) -> bool:
    """The same of a rank that cannot say it itself."""
    if REPORTS not in os.environ:
        return False
    try:
        (Path(os.environ[REPORTS]) / str(rank)).write_text(json.dumps(told), encoding="utf-8")
    except OSError:  # the launcher is gone
        return False
    return True


def _awaited(reports: str, forwarded: Sequence[signal.Signals]) -> Ended | None:
    """Return what the main rank reports, if it does soon; another of the `forwarded` signals does not end the wait."""
    for number in forwarded:
        signal.signal(number, signal.SIG_IGN)
    until, gone = time.monotonic() + REPORT_SECONDS, False
    while (ended := _reported(reports, 0)) is None and not gone and time.monotonic() < until:
        time.sleep(0.05)
        gone = sys.platform == "linux" and not children(os.getpid())
    return ended


def _reported(reports: str, rank: int) -> Ended | None:
    path = Path(reports) / str(rank)
    return Ended(*json.loads(told)) if path.is_file() and (told := path.read_text(encoding="utf-8")) else None


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
