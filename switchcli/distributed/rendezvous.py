"""Which rank this process is, and where the ranks meet: environment variables that torchrun, srun or a user sets.

The variables are RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from threading import Timer

from switchcli.errors import DistributedError, RecipeError
from switchcli.system.startup import LAUNCHER

WAITING_SECONDS = 3.0
"""How long a rank waits for the others before it says so."""
DEFAULT_PORT = "29500"
"""The port where ranks meet if MASTER_PORT is not set."""
UNSET = (
    "start the ranks with --processes or torchrun, or unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE to run "
    "one process"
)


def is_rank() -> bool:
    """Return whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def prepare_rank() -> None:
    """Find the ranks that srun started, and check the variables with which the ranks meet.

    Raises:
        RecipeError: a variable is missing or wrong.
        DistributedError: srun started this task without an address where the ranks meet.
    """
    join_srun(os.environ)
    check_environment(os.environ)


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
    # The tasks of each machine: `2(x3),1` is 2, 2, 2 and 1.
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks_of = [number for number, times in runs for _ in range(int(times or 1))]
    machine = environment.get("SLURM_NODEID", "0")
    if _is_number(machine) and int(machine) < len(tasks_of):
        environment.setdefault("LOCAL_WORLD_SIZE", tasks_of[int(machine)])


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise a RecipeError for variables with which ranks cannot meet. torch itself reports an unknown address."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if name in environment:
            _check_number(name, environment[name])
    if environment.get("LOCAL_WORLD_SIZE") == "0":
        raise RecipeError(f"LOCAL_WORLD_SIZE is 0 and must be at least 1: {UNSET}")
    rank, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    if "RANK" in environment and "WORLD_SIZE" not in environment:
        raise RecipeError(f"RANK is {rank} and WORLD_SIZE is not set: {UNSET}")
    if rank >= world:
        raise RecipeError(f"RANK ({rank}) must be less than WORLD_SIZE ({world}): {UNSET}")
    if world == 1:
        return
    for name in ("RANK", "MASTER_ADDR"):
        if not environment.get(name):
            raise RecipeError(f"WORLD_SIZE is {world} and {name} is not set: {UNSET}")
    port = environment.get("MASTER_PORT", DEFAULT_PORT)
    if not _is_number(port) or not 0 < int(port) < 2**16:
        raise RecipeError(f"MASTER_PORT is {port!r} and must be a number from 1 to 65535: give a port that is free")


def local_rank() -> int:
    """Return the number of this rank on its machine; 0 if no launcher gave one.

    Raises:
        RecipeError: LOCAL_RANK is no number.
    """
    text = os.environ.get("LOCAL_RANK", "0")
    _check_number("LOCAL_RANK", text)
    return int(text)


def _check_number(name: str, text: str) -> None:
    """Raise RecipeError unless `text`, the value of the variable `name`, is a number."""
    if not _is_number(text):
        raise RecipeError(f"{name} is {text!r} and must be a number without leading zeros: {UNSET}")


def _is_number(text: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]{0,8}", text) is not None


@contextmanager
def warn_of_waiting() -> Iterator[None]:
    """Print a warning if the code in this context, in which the ranks meet, takes longer than WAITING_SECONDS.

    The first rank of each machine prints it. Ranks of `--processes` do not: their launcher knows whether one has ended.
    """
    waits_for_others = is_rank() and os.environ["WORLD_SIZE"] != "1"
    if not waits_for_others or LAUNCHER in os.environ or os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    address, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", DEFAULT_PORT)
    warning = (
        f"warning: rank {rank} of {world} waits for the others at {address!r}, port {port}: see that all "
        "were started, and that no other program uses that port\n"
    )
    timer = Timer(WAITING_SECONDS, sys.stderr.write, [warning])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
