"""Contestants in processes of their own, and what is printed of them: ratios within a round, tables in Markdown."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

from contestants import Refused
from machine import Job

from switchcli.system.startup import SPIN_VARIABLES, limit_spinning

FOLDER = Path(__file__).parent


class Live:
    """A contestant in a process of its own that waits for its turns.

    Raises:
        Refused: it cannot run here, was not ready within the job's limit, or ended within a turn.
    """

    def __init__(self, job: Job) -> None:
        environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # its time to compile is reported
        if "environment" in job:
            environment = {key: value for key, value in environment.items() if key not in SPIN_VARIABLES}
            environment |= job["environment"]
        else:
            limit_spinning(environment)
        print(" ".join(str(value) for value in job.values()), file=sys.stderr, flush=True)
        self._ours = job["who"] == "switchcli" and not job.get("compile")
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed on exit
        command = [sys.executable, str(FOLDER / "contestants.py"), json.dumps(job)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)
        limit = threading.Timer(job["limit"], self._process.kill)
        limit.start()
        try:
            self.notes = self._answer()
        except BaseException as error:
            late = limit.finished.is_set()
            self.__exit__(None, None, None)
            if late:
                raise Refused(f"{job['who']} was not ready after {job['limit']} s") from error
            raise
        finally:
            limit.cancel()

    def turn(self) -> Job:
        """Return the seconds and processor seconds of one turn, the work done in it, and the most memory so far."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # it has ended: the missing answer says so
            self._process.stdin.write("turn\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Job:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith('{"contestant": '):  # not a line that a library prints
                found: Job = json.loads(line)
                if "refused" in found:
                    raise Refused(found["refused"])
                return found
        code = self._process.wait()
        self._stderr.seek(0)
        errors = self._stderr.read()
        if self._ours:
            sys.exit(errors[-4000:])
        last = (errors.splitlines() or [""])[-1]
        raise Refused(f"its process ended with exit code {code}: {last[:200]}".replace("|", "/"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            assert stream
            with suppress(BrokenPipeError):
                stream.close()


def in_turns(live: Sequence[Live], rounds: int) -> list[list[Job]]:
    """Let all take turns, in the reverse order every second round, and return the turns of each.

    Raises:
        Refused: one has ended.
    """
    found: list[list[Job]] = [[] for _ in live]
    for number in range(rounds):
        order = range(len(live))
        for each in order if number % 2 else reversed(order):
            found[each].append(live[each].turn())
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    found = [one / other for one, other in zip(ours, theirs, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> None:
    heads = list(heads)
    for row in chain((heads, ["---"] * len(heads)), rows):
        print("| " + " | ".join(row) + " |", flush=True)
    print()
