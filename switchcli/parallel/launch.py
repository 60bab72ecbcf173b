"""Ranks of one command: started here as torchrun would, or found where srun started them. No torch until they start.

accelerate's own launcher starts a single process on a machine without a GPU whatever number it is given; torch's,
which it builds on, does not. `Runtime` finds its ranks as it finds those of any launcher.
"""

import ctypes
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple

from switchcli.errors import DistributedError
from switchcli.parallel.signals import STOPPING

SAVING_SECONDS = 300
"""How long the ranks may take to save after a signal before they are killed."""
REPORT_SECONDS = 30
"""How long `launch` waits for the main rank's report after it was stopped several times over."""
PR_SET_PDEATHSIG = 1  # Linux, sys/prctl.h
PASSED_ON = (*STOPPING, signal.SIGHUP, signal.SIGQUIT)
"""What the launcher hands on to its ranks."""
REPORTS = "SWITCHCLI_REPORTS"
"""The environment variable by which `launch` names its ranks the folder for their reports."""


class Ended(NamedTuple):
    """How ranks ended: the exit code that they agree on, and why when it is not 0; a rank has said so on stderr."""

    exit_code: int
    error: str | None


def launch(processes: int, arguments: Sequence[str]) -> Ended:
    """Run `python -m switchcli ARGUMENTS` as `processes` ranks.

    A rank that fails ends the others; the code is that of the rank that failed first, as it printed why.

    Raises:
        DistributedError: a rank was killed, or all were stopped without saving.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    logging.disable(logging.CRITICAL)  # the ranks say themselves why they end
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with tempfile.TemporaryDirectory() as reports:
        os.environ[REPORTS] = reports
        options = [
            "--standalone",
            f"--nproc-per-node={processes}",
            f"--shutdown-timeout={SAVING_SECONDS}",
            f"--signals-to-handle={','.join(one.name for one in PASSED_ON)}",
            f"--log-dir={reports}",  # else a folder of its own stays
            "-m",
            "switchcli",
            *arguments,
        ]
        try:
            run(get_args_parser().parse_args(options))  # type: ignore[no-untyped-call]
        except ChildFailedError as failure:
            # A rank that was killed comes before those that lost it; torch ends the rest by SIGTERM.
            rank, first = min(
                failure.failures.items(),
                key=lambda item: (item[1].exitcode >= 0 or item[1].exitcode == -signal.SIGTERM, item[1].timestamp),
            )
            if first.exitcode < 0:
                raise DistributedError(
                    f"rank {rank} was killed by signal {-first.exitcode}; the others were ended"
                ) from None
            # The main rank's words, unless it was only ended for the failure of another.
            told = [_reported(reports, one) for one in (0, rank)]
            silent = Ended(first.exitcode, f"rank {rank} ended with exit code {first.exitcode}; see what it printed")
            return next((one for one in told if one and one.exit_code == first.exitcode), silent)
        except SignalException as stopped:
            # torch forwarded the signal and forgets how the ranks took it; the main one tells.
            if ended := _awaited(reports):
                return ended
            raise DistributedError(
                f"stopped by {stopped.sigval.name}, and the ranks have not told how they ended: the same command goes "
                "on from the last save"
            ) from None
    return Ended(0, None)


def report(error: str, exit_code: int) -> bool:
    """Leave why this rank ends for the `launch` that started it; False when none did."""
    if REPORTS not in os.environ or not is_rank():  # the launcher itself has it too
        return False
    path = Path(os.environ[REPORTS]) / os.environ["RANK"]
    try:
        path.write_text(json.dumps([exit_code, error]), encoding="utf-8")
    except OSError:  # the launcher is gone
        return False
    return True


def end_with_launcher() -> None:
    """Have this rank of `launch` stop, and save, when the launcher dies without a word: on Linux alone."""
    if REPORTS in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _awaited(reports: str) -> Ended | None:
    """What the main rank reports, if it does soon; more signals, which have been forwarded, do not end the waiting."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    until = time.monotonic() + REPORT_SECONDS
    while (ended := _reported(reports, 0)) is None and time.monotonic() < until:
        time.sleep(0.05)
    return ended


def _reported(reports: str, rank: int) -> Ended | None:
    path = Path(reports) / str(rank)
    if not path.is_file() or not (told := path.read_text(encoding="utf-8")):
        return None
    return Ended(*json.loads(told))


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
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 10000))
    environment.update(RANK=rank, WORLD_SIZE=tasks, LOCAL_RANK=environment.get("SLURM_LOCALID", "0"))
    each = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))  # of `2(x3)` or `4,2`
    if each is not None:
        environment.setdefault("LOCAL_WORLD_SIZE", each[0])
