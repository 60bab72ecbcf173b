"""What takes turns with this project's code: contestants in processes of their own, and what they say of themselves.

A contestant is built, takes uncounted turns (the first of them compiles), says that it is ready, and then takes one
turn for each line on stdin. One that cannot run says why instead. All of them begin with the same setting of OpenMP's
threads and, unless the row says otherwise, with an allocator that keeps freed memory.
"""

import importlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import torch
from machine import Clock, Job, begin, plain

from switchcli.distributed.context import DistributedContext

BUILDERS = {
    "layer": "layer_against_others",
    "step": "step_against_others",
    "generate": "generate_against_others",
    "busy": "busy_contestant",
    "data": "data_contestant",
}
"""Builder of a contestant of each section, in the file of its name."""


class Refused(Exception):
    """A contestant cannot run here, and why."""


class Contestant(NamedTuple):
    """Work that takes turns."""

    turn: Callable[[], object]
    """Its result, if it is a number, is the amount of work that was done, such as tokens."""
    notes: dict[str, Any]
    """Figures of this contestant, such as its number of parameters."""


class Row(NamedTuple):
    """A contestant of a table, by its name there."""

    name: str
    job: Job
    """The keys of its job."""
    against: Job = {}  # noqa: RUF012  # of a named tuple, and never changed
    """Keys that change this project's job for this row, so that both do the same work."""


def prepare(job: Job) -> tuple[torch.device, DistributedContext | None]:
    """Return the device, and our context unless the job has torch's own allocator."""
    if job.get("allocator") == "default":
        return plain(job), None
    context = begin(job)
    return context.device, context


def check_compiler() -> None:
    """Raise Refused if torch.compile cannot compile for a CPU here."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise Refused(f"torch.compile needs a C++ compiler: {' or '.join(names)} is not on the PATH")


def serve(
    build: Callable[[Job], Contestant], job: Job, turns: IO[str] = sys.stdin, answers: IO[str] = sys.stdout
) -> None:
    """Build the contestant of `job` and let it take turns, with one line of JSON for each."""

    def say(**values: Any) -> None:
        print(json.dumps({"contestant": job["who"], **values}), file=answers, flush=True)

    try:
        if job.get("compile") and torch.device(job["device"] if job["device"] != "auto" else "cpu").type == "cpu":
            check_compiler()
        contestant = build(job)
        wait = Clock(torch.device("cuda" if torch.cuda.is_available() and job["device"] != "cpu" else "cpu"))
        warm_up = [wait(contestant.turn) for _ in range(job.get("warm_up", 2))]
    except Exception as error:
        if job["who"] == "switchcli" and not job.get("compile"):
            raise  # a bug of this project
        say(refused=reason(error))
        return
    say(warm_up=warm_up, **contestant.notes)
    done: object = None

    def turn() -> None:
        nonlocal done
        done = contestant.turn()

    for _ in turns:
        cpu = time.process_time()
        seconds = wait(turn)
        say(
            seconds=seconds,
            cpu=time.process_time() - cpu,
            peak=peak(job),
            done=done if isinstance(done, int) else 1,
        )


def reason(error: Exception) -> str:
    """One line for a table."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    first = text.split(". ")[0].rstrip(".").replace("|", "/")[:200]
    return first if isinstance(error, Refused) else f"{type(error).__name__}: {first}"


def peak(job: Job) -> int:
    """The most bytes that the process, or the GPU of it, has had."""
    if job["device"] != "cpu" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.modules["contestants"] = sys.modules["__main__"]  # one class Refused, whoever imports it
    job = json.loads(sys.argv[1])
    serve(getattr(importlib.import_module(job["section"]), BUILDERS[job["section"]]), job)
