"""The rendezvous of the ranks: check the environment that describes it, and report what a rank waits for.

The variables are those of torchrun: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from typing import NamedTuple

from switchcli.distributed.launch import join_srun
from switchcli.errors import RecipeError
from switchcli.system.startup import LAUNCHER

RESOLVE_SECONDS = 3.0
"""How long an unknown host name is looked up again: a machine that is starting may be known a moment later."""
ANNOUNCE_SECONDS = 3.0
"""How long a rank waits for the others before it reports what it waits for."""
STORE_SECONDS = 1.5
"""How long the store of rank 0 may take to answer which ranks have arrived."""
STORE_THREAD = "asking the store"
"""Name of the thread that asks the store. Python must not exit normally while it runs: torch's C++ code would abort."""
MAX_LISTED_RANKS = 8
"""Missing ranks that a message lists; further ones become an ellipsis."""
CHECK_PORT = "see that rank 0 was started, and that no other program uses that port"
UNSET = "start the ranks with --processes or torchrun, or unset RANK and WORLD_SIZE to run one process"


def prepare_rank(environment: MutableMapping[str, str]) -> None:
    """Find the ranks that srun started, and check the variables with which the ranks meet.

    Raises:
        RecipeError: a variable is missing or wrong.
        DistributedError: srun started this task without an address where the ranks meet.
    """
    join_srun(environment)
    check_environment(environment)


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise a RecipeError for variables, set by a launcher or a user, with which ranks cannot meet."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if name in environment and not _is_number(environment[name]):
            raise RecipeError(f"{name} is {environment[name]!r} and must be a number without leading zeros: {UNSET}")
    world, rank = int(environment.get("WORLD_SIZE", "1")), int(environment.get("RANK", "0"))
    if "RANK" in environment and "WORLD_SIZE" not in environment:
        raise RecipeError(f"RANK is {rank} and WORLD_SIZE is not set: {UNSET}")
    if rank >= world:
        raise RecipeError(f"RANK ({rank}) must be less than WORLD_SIZE ({world}): {UNSET}")
    if world == 1:
        return
    for name in ("RANK", "MASTER_ADDR"):
        if not environment.get(name):
            raise RecipeError(f"WORLD_SIZE is {world} and {name} is not set: {UNSET}")
    port = environment.get("MASTER_PORT", "29500")
    if not _is_number(port) or not 0 < int(port) < 2**16:
        raise RecipeError(f"MASTER_PORT is {port!r} and must be a number from 1 to 65535: give a port that is free")
    _check_host(environment["MASTER_ADDR"])


def _is_number(text: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]{0,8}", text) is not None


def _check_host(address: str) -> None:
    """Raise a RecipeError if the address of rank 0's machine is a name that stays unknown."""
    deadline = time.monotonic() + RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except UnicodeError:
            pass  # no valid name
        except OSError as error:
            if error.errno != socket.EAI_NONAME:
                return  # the network may recover: torch tries again
        if time.monotonic() > deadline:
            raise RecipeError(
                f"MASTER_ADDR is {address!r}, a name that is not known: give the name or address of rank 0's machine"
            )
        time.sleep(0.2)


@contextmanager
def announce_waiting() -> Iterator[None]:
    """Print on stderr what this rank waits for, if the code in this context takes longer than ANNOUNCE_SECONDS.

    The first rank of each machine prints. Ranks of `--processes` do not: their launcher knows whether one has ended.
    """
    if LAUNCHER in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    met = Event()
    Thread(target=_announce, args=(met,), name="rendezvous", daemon=True).start()
    try:
        yield
    finally:
        met.set()


class _Rendezvous(NamedTuple):
    """Which rank this process is, and where the ranks meet."""

    rank: int
    world: int
    address: str
    port: int

    def waiting(self) -> str:
        """Return the beginning of a message: which rank waits, and where."""
        return f"rank {self.rank} of {self.world} waits at {self.address!r}, port {self.port},"

    def no_store(self) -> str:
        """Return the message for an address at which something else than the store of rank 0 answers, or nothing."""
        return f"{self.waiting()} where no store of rank 0 answers: {CHECK_PORT}"


def _announce(met: Event) -> None:
    if met.wait(ANNOUNCE_SECONDS):
        return
    port = int(os.environ.get("MASTER_PORT", "29500"))
    rendezvous = _Rendezvous(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["MASTER_ADDR"], port)
    answers: list[str] = []
    # In a thread: if the program at that port is not a store, torch may wait for its answer for minutes.
    query = Thread(target=lambda: answers.append(_missing_ranks(rendezvous, met)), name=STORE_THREAD, daemon=True)
    query.start()
    query.join(STORE_SECONDS)
    message = answers[0] if answers else rendezvous.no_store()
    if not met.is_set() and os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"warning: {message}\n")


def _missing_ranks(rendezvous: _Rendezvous, met: Event) -> str:
    """Register this rank in the store of rank 0, and return a message that says which ranks have not done so."""
    try:
        socket.create_connection((rendezvous.address, rendezvous.port), timeout=1).close()
    except OSError as error:
        reason = error.strerror or error
        return f"{rendezvous.waiting()} for rank 0, which does not answer there ({reason}): see if it was started"
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore(
            rendezvous.address, rendezvous.port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False
        )
        store.set(f"switchcli/waits/{rendezvous.rank}", "")
        met.wait(0.5)  # the other ranks register at about the same time
        missing = [str(rank) for rank in range(rendezvous.world) if not store.check([f"switchcli/waits/{rank}"])]
    except (RuntimeError, ValueError):  # raised by torch if another program uses that port
        return rendezvous.no_store()
    names = ", ".join(missing[:MAX_LISTED_RANKS]) + (", ..." if len(missing) > MAX_LISTED_RANKS else "")
    num_met = rendezvous.world - len(missing)
    return f"{rendezvous.waiting()} and {num_met} of {rendezvous.world} ranks have come: rank {names} is missing"
