"""Watch: what a rank sees of the others of its machine while it waits for them in a library. On Linux alone.

They are the processes of the same parent that a launcher has given the same place to meet; those of another machine
are not seen. It starts before torch is there, and imports none.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from math import inf
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import NamedTuple, Self

from switchcli.errors import Interrupted
from switchcli.parallel.launch import how_ended, join_srun

LOOK_SECONDS = 1.0
STOPPED_LOOKS = 10
"""A rank that is stopped at so many looks in a row is ended. A look is taken only while this rank runs: a job that is
suspended as a whole counts none. One that a debugger holds is in another state."""
GRACE_SECONDS = 2.0
"""How long a rank that was asked to end may wait for one that has ended before it does."""
MEETING = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
STOPPED = f"was stopped by a signal (SIGSTOP, perhaps) and did not go on for {STOPPED_LOOKS} s, so it was killed"


class Sibling(NamedTuple):
    rank: int
    pid: int
    handle: int
    """A descriptor of this process and no later one of its number: readable when it has ended."""


class Watch:
    """Within its `with`, in the main thread, which must have handlers for the signals: a thread looks at the others.

    `stopped` is called, in that thread, with the number of a rank before it is killed for being stopped, and `give_up`
    when this rank waits, asked to end, for one that has ended: no signal's handler runs until a library returns.
    """

    def __init__(self, stopped: Callable[[int], None], give_up: Callable[[], None]) -> None:
        self._stopped, self._give_up = stopped, give_up
        self._siblings: dict[int, Sibling] = {}
        self._ended: dict[int, str | None] = {}
        self._looks: dict[int, int] = {}
        self._lock = Lock()
        self._here = dict(os.environ)

    def __enter__(self) -> Self:
        self._signals, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        self._thread = Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._told)  # which ends the thread
        self._thread.join()
        os.close(self._signals)
        for sibling in self._siblings.values():
            os.close(sibling.handle)

    def lost(self) -> str | None:
        """The first rank that has ended otherwise than well, in words; None when none was seen to."""
        self._see_ended()
        return next((f"rank {rank} {how}" for rank, how in self._ended.items() if how), None)

    def is_first(self) -> bool:
        """Whether no rank of this machine with a lower number is left."""
        self._see_ended()
        return all(rank > int(self._here["RANK"]) for rank in self._siblings.keys() - self._ended)

    def _run(self) -> None:
        asked, deadline, next_look = False, inf, 0.0
        while time.monotonic() < deadline:
            if time.monotonic() >= next_look:
                self._look()
                next_look = time.monotonic() + LOOK_SECONDS
            if self._signals in _ready([self._signals, *(one.handle for one in self._living())], LOOK_SECONDS / 2):
                numbers = os.read(self._signals, 64)
                if not numbers:
                    return
                asked = asked or signal.SIGTERM in numbers
            if self.lost() and asked:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        self._give_up()

    def _look(self) -> None:
        """Meet those that are new, and end one that is stopped."""
        for process in _children(os.getppid()):
            self._meet(process)
        for sibling in self._living():
            with suppress(OSError):
                is_stopped = _stat(sibling.pid)[0] == "T"
                looks = self._looks[sibling.rank] = self._looks.get(sibling.rank, 0) + 1 if is_stopped else 0
                if looks == STOPPED_LOOKS:
                    self._stopped(sibling.rank)
                    self._ended[sibling.rank] = STOPPED
                    signal.pidfd_send_signal(sibling.handle, signal.SIGKILL)

    def _living(self) -> list[Sibling]:
        return [sibling for rank, sibling in self._siblings.items() if rank not in self._ended]

    def _meet(self, pid: int) -> None:
        """Know the process from now on, if it is a rank of this run."""
        if pid == os.getpid() or any(sibling.pid == pid for sibling in self._siblings.values()):
            return
        with suppress(OSError, ValueError, UnicodeDecodeError):
            theirs = _environment(pid)
            if "RANK" in theirs and all(theirs.get(name) == self._here.get(name) for name in MEETING):
                rank = int(theirs["RANK"])
                self._siblings[rank] = Sibling(rank, pid, os.pidfd_open(pid))

    def _see_ended(self) -> None:
        """Note who has ended, in this order; how is known until its parent has asked for it."""
        with self._lock:
            living = self._living()
            ready = _ready([sibling.handle for sibling in living], 0)
            for rank, pid, handle in living:
                if handle in ready:
                    how: str | None = "has ended"
                    with suppress(OSError):
                        code = os.waitstatus_to_exitcode(int(_stat(pid)[-1]))
                        how = None if code in (0, Interrupted.exit_code) else how_ended(code)
                    self._ended[rank] = how


def can_watch() -> bool:
    """Whether the system shows processes as this file reads them."""
    return sys.platform == "linux" and Path("/proc/self/stat").exists()


def _environment(pid: int) -> dict[str, str]:
    """As it was given; a task of srun's is named as other ranks are."""
    given = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="surrogateescape").split("\0")
    environment = dict(line.split("=", 1) for line in given if "=" in line)
    join_srun(environment)
    return environment


def _children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(number) for number in path.read_text().split()]
    return found


def _stat(pid: int) -> list[str]:
    """The fields of a process from its state, a letter, to how it ended, which 0 is while it has not."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _ready(handles: list[int], seconds: float) -> set[int]:
    """Those that can be read within the time."""
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    return {handle for handle, _ in poll.poll(1000 * seconds)}
