"""The meeting of the ranks: reject an environment in which they cannot meet, and say what a rank waits for.

The variables are those of torchrun: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

from switchcli.errors import RecipeError
from switchcli.startup import LAUNCHER

RESOLVING_SECONDS = 3.0
"""How long a name is looked up again that is not known: that of a machine that starts may be known a moment later."""
ANNOUNCING_SECONDS = 3.0
"""A rank that has waited so long says what it waits for."""
ASKING_SECONDS = 1.5
"""How long the store of rank 0 may take to say which ranks have come."""
ASKING = "asking the store"
"""The name of the thread in which torch asks. Python must not exit normally within it: C++ would end the process."""
NAMED = 8
"""How many missing ranks a message names at most."""
CHECK_PORT = "see that rank 0 was started, and that no other program uses that port"
UNSET = "start the ranks with --processes or torchrun, or unset RANK and WORLD_SIZE to run one process"


def check_environment(environment: Mapping[str, str]) -> None:
    """Reject what a launcher, or a user, has set if the ranks cannot meet by it.

    Raises:
        RecipeError: which variable, its value, the rule, and the fix.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if name in environment and not _is_number(environment[name]):
            raise RecipeError(f"{name} is {environment[name]!r} and must be a number: {UNSET}")
    world, rank = (int(environment.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
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
    _resolve(environment["MASTER_ADDR"])


def _is_number(text: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", text) is not None


def _resolve(address: str) -> None:
    deadline = time.monotonic() + RESOLVING_SECONDS
    while True:
        try:
            socket.getaddrinfo(address, None)
        except UnicodeError:
            pass
        except OSError as error:
            if error.errno != socket.EAI_NONAME:
                return  # a failure of the network may pass: torch goes on trying
        else:
            return
        if time.monotonic() > deadline:
            raise RecipeError(
                f"MASTER_ADDR is {address!r}, a name that is not known: give the name or address of rank 0's machine"
            )
        time.sleep(0.2)


@contextmanager
def announce_waiting() -> Iterator[None]:
    """Say on stderr what this rank waits for, if meeting the others takes ANNOUNCING_SECONDS.

    The first rank of each machine says so. Ranks of `--processes` do not: their launcher knows whether one has ended.
    """
    if LAUNCHER in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    met = Event()
    thread = Thread(target=_announce, args=(met,), name="meeting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        met.set()


def _announce(met: Event) -> None:
    if met.wait(ANNOUNCING_SECONDS):
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", "29500"))
    here = f"rank {rank} of {world} waits at {address!r}, port {port},"
    answers: list[str] = []
    # torch may wait for minutes for an answer of a program that is no store.
    asking = Thread(
        target=lambda: answers.append(_waited_for(rank, world, address, port, here, met)), name=ASKING, daemon=True
    )
    asking.start()
    asking.join(ASKING_SECONDS)
    said = answers[0] if answers else f"{here} where no store of rank 0 answers: {CHECK_PORT}"
    if not met.is_set() and os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"warning: {said}\n")


def _waited_for(rank: int, world: int, address: str, port: int, here: str, met: Event) -> str:
    """Return what rank `rank` waits for, after it has told the store of rank 0 that it is here."""
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError as error:
        return f"{here} for rank 0, which does not answer there ({error.strerror or error}): see if it was started"
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        store.set(f"switchcli/waits/{rank}", "")
        met.wait(0.5)  # the others say so at about the same time
        missing = [str(one) for one in range(world) if not store.check([f"switchcli/waits/{one}"])]
    except (RuntimeError, ValueError):  # what torch raises if the program at that port is another one
        return f"{here} where no store of rank 0 answers: {CHECK_PORT}"
    names = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
    return f"{here} and {world - len(missing)} of {world} ranks have come: rank {names} is missing"
