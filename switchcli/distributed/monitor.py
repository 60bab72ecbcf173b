"""Watch: what a rank sees of the others of its machine while it waits for them in a library. On Linux alone.

They are the processes of the same parent to which a launcher has given the same place to meet. It needs no torch.
"""

import os
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from threading import Thread

from switchcli.distributed.launch import Ended, children, how_ended, join_srun, report_of
from switchcli.distributed.signals import STOPPING, signals_read
from switchcli.errors import DistributedError, Interrupted, InterruptedByForce

STOPPED_LOOKS = 10
"""In a row, of a rank that is then killed. Where all are suspended nobody looks; a debugger stops in another way."""
WAITING_SECONDS = 2.0
"""For a library to return, once this rank was asked to end."""
STOPPED = f"was stopped by a signal (SIGSTOP, perhaps), and was killed {STOPPED_LOOKS} s later"


class Watch:
    """Looks in a thread of its own, within `looking`, which is for a main thread that handles signals in Python.

    No handler runs until a library returns. So `give_up` is called here, with the number of the signal, when this rank
    was asked to end and has waited in vain: for a rank that has ended; or, where the signal is to end the command at
    once, for anything. `unheeded` says that such a signal, if one has come, was not handled yet.
    """

    def __init__(self, give_up: Callable[[int], None], unheeded: Callable[[], bool]) -> None:
        self._give_up, self._unheeded = give_up, unheeded
        self._siblings: dict[int, tuple[int, int]] = {}  # the number of each process, and a descriptor of it
        self._ended: dict[int, str] = {}
        self._looks: Counter[int] = Counter()

    @contextmanager
    def looking(self) -> Iterator[None]:
        with signals_read() as signals:  # whose end ends the thread
            Thread(target=self._run, args=(signals,), name="watch", daemon=True).start()
            yield

    def lost(self) -> str:
        """The first rank that was seen to end otherwise than well, and how, in words; nothing if none was."""
        for rank, (pid, handle) in self._living().items():
            if select.select([handle], [], [], 0)[0]:
                self._ended.setdefault(rank, self._how_ended(rank, pid))
        return next((how for how in list(self._ended.values()) if how), "")

    def lost_soon(self) -> str:
        """The same in a moment: what a process has open is closed before its end can be seen."""
        until = time.monotonic() + 0.5
        while not (lost := self.lost()) and time.monotonic() < until:
            time.sleep(0.01)
        return lost

    def _run(self, signals: int) -> None:
        asked, at_once, deadline = 0, False, inf
        while (left := deadline - time.monotonic()) > 0:
            self._look()
            # Before the signal, too: one that the training loop has handled must not count once the loop has ended.
            before = self._unheeded()
            handles = [signals, *(handle for _, handle in self._living().values())]
            if came := signals in select.select(handles, [], [], min(1.0, left))[0]:
                if not (numbers := os.read(signals, 64)):
                    os.close(signals)
                    return
                asked = asked or next((number for number in numbers if number in STOPPING), 0)
            at_once = (at_once or (came and before)) and self._unheeded()
            lost = self.lost()  # at every look: how one has ended is there to read until its parent asks
            deadline = min(deadline, time.monotonic() + WAITING_SECONDS) if asked and (lost or at_once) else inf
        self._give_up(asked)

    def _look(self) -> None:
        """Meet those that are new, and end one that is stopped."""
        known = {os.getpid(), *(pid for pid, _ in self._siblings.values())}
        for pid in children(os.getppid()) - known:
            self._meet(pid)
        for rank, (pid, handle) in self._living().items():
            with suppress(OSError):
                self._looks[rank] = self._looks[rank] + 1 if _stat(pid)[0] == "T" else 0
                if self._looks[rank] == STOPPED_LOOKS:
                    report_of(rank, Ended(DistributedError.exit_code, f"rank {rank} {STOPPED}"))
                    signal.pidfd_send_signal(handle, signal.SIGKILL)

    def _meet(self, pid: int) -> None:
        """Know the process from now on, if it is a rank of this run; a task of srun's is told otherwise that it is."""
        with suppress(OSError, KeyError, ValueError, DistributedError):
            given = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="surrogateescape").split("\0")
            theirs = dict(line.split("=", 1) for line in given if "=" in line)
            join_srun(theirs)
            if all(theirs.get(name) == os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")):
                self._siblings[int(theirs["RANK"])] = pid, os.pidfd_open(pid)

    def _living(self) -> dict[int, tuple[int, int]]:
        return {rank: one for rank, one in list(self._siblings.items()) if rank not in self._ended}

    def _how_ended(self, rank: int, pid: int) -> str:
        """In words; nothing of an end that is well, was asked for, or is gone: its parent has read it."""
        if self._looks[rank] > STOPPED_LOOKS / 2:  # another rank may look, and kill, before this one
            return f"rank {rank} {STOPPED}"
        code = 0
        with suppress(OSError):
            code = os.waitstatus_to_exitcode(int(_stat(pid)[-1]))
        asked = code in (Interrupted.exit_code, InterruptedByForce.exit_code) or -code in STOPPING
        return "" if code == 0 or asked else f"rank {rank} {how_ended(code)}"


def _stat(pid: int) -> list[str]:
    """The fields of a process from its state, a letter, to how it ended, which is 0 while it has not."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
