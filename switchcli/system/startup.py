"""Process setup before any large import: rank, OpenMP's spinning, the launcher's death, a broken stderr.

This module imports the standard library only, so that it takes effect within the first milliseconds.
"""

import ctypes
import io
import os
import signal
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

SPIN_COUNT = "2000"
"""Iterations for which a thread of libgomp spins at a barrier before it sleeps, see docs/results/speed.md."""
SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
"""Environment variables that set how long OpenMP's threads spin, of GNU, the standard and Intel."""
LAUNCHER = "SWITCHCLI_LAUNCHER"
"""The environment variable that gives a rank of `--processes` the process ID of its launcher."""
PR_SET_PDEATHSIG = 1  # Linux, sys/prctl.h
SAFE_PATH = "PYTHONSAFEPATH"
"""The environment variable of every Python process that this program starts: `python -m` and `-c` would put the current
folder first on the module path, and that folder may hold a stranger's `typer.py`."""


def is_main_rank() -> bool:
    """Return whether this process prints: it is rank 0, or no rank."""
    return os.environ.get("RANK", "0") == "0"


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's threads sleep soon at a barrier, unless the user has set how long they spin.

    By default libgomp's threads spin for milliseconds, which takes the cores from every other process and from the
    thread that they wait for. libgomp reads the variable when it is loaded: call this before torch is imported.
    """
    if not any(name in environment for name in SPIN_VARIABLES):
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT


def keep_modules_of_current_folder_out(environment: MutableMapping[str, str]) -> None:
    """Let no process that this one starts import modules from the current folder.

    The exception is `python -m switchcli` in a folder that holds this package, from which all of them import it.
    """
    if sys.path[0] != str(Path(__file__).parents[2]):
        environment[SAFE_PATH] = "1"


def end_with_launcher() -> None:
    """Ask for SIGTERM when the launcher of this rank dies, or send it now if the launcher is dead already.

    Call this first in a rank of `--processes`: until then the rank outlives its launcher. In any other process it does
    nothing. The kernel sends the signal on Linux only; elsewhere a launcher that dies later leaves its ranks running.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if str(os.getppid()) != launcher:
        os.kill(os.getpid(), signal.SIGTERM)


def reopen_closed_streams() -> None:
    """Open /dev/null as stdin, stdout or stderr where the shell has closed it: `<&-`, `>&-`.

    Otherwise the next file that is opened gets the free descriptor, and what a child process prints goes into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode))


class _LenientFile(io.FileIO):
    """A file that ignores write errors and drops the data."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def make_stderr_lenient() -> None:
    """Replace `sys.stderr` by a stream to the same file descriptor that ignores write errors.

    A message must not end a run: after the terminal was closed, every write fails with EIO.
    """
    stream = sys.__stderr__
    if stream is not None and sys.stderr is stream:
        file = io.BufferedWriter(_LenientFile(stream.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True)
