"""Jobs in processes of their own, and what is printed of them: ratios within a round, tables in Markdown."""

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
from typing import Any, NamedTuple, Self

from contestants import Refused
from machine import Job, Result

from switchcli.system.startup import SPIN_VARIABLES, limit_spinning

FOLDER = Path(__file__).parent


def run(job: Job) -> Result:
    """The answer of `job`, from a process of its own."""
    print(" ".join(str(value) for value in job.values()), file=sys.stderr, flush=True)
    launcher = []
    if (ranks := job.get("ranks", 1)) > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, str(FOLDER), "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


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

    def turn(self) -> Result:
        """Seconds and processor seconds of one turn, and the most memory so far."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # it has ended: the missing answer says so
            self._process.stdin.write("turn\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Result:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith('{"contestant": '):  # not a line that a library prints
                found: dict[str, Any] = json.loads(line)
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


class Turns(NamedTuple):
    """What two contestants measured in turns: theirs, then ours."""

    seconds: list[list[float]]
    cpu: list[list[float]]
    peaks: list[int]
    """The most memory, in bytes, that each process has had."""


def in_turns(theirs: Live, ours: Live, rounds: int) -> Turns:
    """Let both take turns, the first of a round alternating.

    Raises:
        Refused: one has ended.
    """
    both = [theirs, ours]
    found: list[list[Result]] = [[], []]
    for number in range(rounds):
        for side in (0, 1) if number % 2 else (1, 0):
            found[side].append(both[side].turn())
    seconds, cpu = ([[turn[key] for turn in side] for side in found] for key in ("seconds", "cpu"))
    return Turns(seconds, cpu, [side[-1]["peak"] for side in found])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    found = [one / other for one, other in zip(ours, theirs, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> None:
    heads = list(heads)
    for row in chain((heads, ["---"] * len(heads)), rows):
        print("| " + " | ".join(row) + " |", flush=True)
    print()
