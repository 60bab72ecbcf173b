"""Run a sweep: several runs at once, each on its own GPU or on its share of the processors.

A run is the command `switchcli VERB ARGUMENTS --out OUT/NAME`. A run whose folder has a result.json is skipped if its
log says that this command made it. Any other is left to its verb, which resumes an interrupted run and one with more
steps, and refuses a run of other settings. A failed run stops no other run, except those that need its folder.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from switchcli.distributed.signals import stop_signals
from switchcli.errors import Interrupted
from switchcli.processor import available_processors, is_thread_count_set
from switchcli.report.console import Console
from switchcli.report.safe_text import shell_words
from switchcli.runs.sweep_list import SweepRun

RESULT = "result.json"
_COMPLETED = "completed: "
"""The beginning of the line of a log that has the command of a run that is complete."""
STOPPED = "the sweep was stopped"
"""The reason of a run that saved and ended because the sweep was stopped, or that did not start then."""
Status = Literal["done", "skipped", "failed", "not started"]


class Outcome(NamedTuple):
    """How a run of a sweep ended."""

    status: Status
    """`skipped`: it was complete before. `not started`: it needs a run that failed, or the sweep was stopped."""
    reason: str = ""
    """Why it failed or did not start."""
    minutes: float = 0.0


class Sweep:
    """The runs of a sweep, started on a number of slots. A slot is a GPU, or a share of the processors."""

    def __init__(
        self, runs: Sequence[SweepRun], out: Path, slots: Sequence[Mapping[str, str]], console: Console
    ) -> None:
        """`slots`: the environment variables that each slot adds to those of its run."""
        self.runs, self._out, self._console = runs, out, console
        self._free_slots = list(slots)
        self._num_slots = len(slots)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._num_started = 0
        self.stopped = False
        """Whether a signal has stopped the sweep."""
        self.outcomes: dict[str, Outcome] = {}
        """How each run ended, by name."""

    def run(self) -> None:
        """Run everything that is not complete, stage by stage. After a signal (`stopped`) all runs have saved."""
        self._out.mkdir(parents=True, exist_ok=True)
        with self._stopped_by_signals():
            for _, group in itertools.groupby(self.runs, key=lambda run: run.stage):
                stage = list(group)
                with ThreadPoolExecutor(self._num_slots) as pool:
                    list(pool.map(self._run, stage))

    def to_json(self) -> dict[str, Any]:
        """Return the folder of the sweep, and command and outcome of each run, for scripts."""
        return {
            "out": str(self._out),
            "runs": [
                {"name": run.name, "command": command(run, self._out), **self.outcomes[run.name]._asdict()}
                for run in self.runs
            ],
        }

    def _run(self, run: SweepRun) -> None:
        """Run one run on the next free slot, unless it is complete or cannot start, and record how it ended."""
        outcome = self._outcome(run)
        with self._lock:
            self.outcomes[run.name] = outcome

    def _outcome(self, run: SweepRun) -> Outcome:
        with self._lock:
            self._num_started += 1
            label = f"[{self._num_started}/{len(self.runs)}] {run.name}"
            failed = [name for name, outcome in self.outcomes.items() if outcome.status in ("failed", "not started")]
        if self.stopped:
            return Outcome("not started", STOPPED)
        if self._is_complete(run):
            self._console.message(f"{label}: complete already")
            return Outcome("skipped")
        if needed := next((name for name in failed if self._needs(run, name)), None):
            self._console.message(f"{label}: not started: {needed} failed")
            return Outcome("not started", f"needs {needed}")
        with self._lock:
            slot = self._free_slots.pop()
        try:
            return self._run_on(slot, run, label)
        except OSError as error:
            return Outcome("failed", str(error))
        finally:
            with self._lock:
                self._free_slots.append(slot)

    def _run_on(self, slot: Mapping[str, str], run: SweepRun, label: str) -> Outcome:
        log, line = self._log(run), shell_words(*command(run, self._out))
        self._console.message(f"{label}: {line}")
        started = time.monotonic()
        with log.open("ab") as file:
            with self._start(run, file, {**os.environ, **slot}) as process:
                code = process.wait()
            if code == 0:
                file.write(f"{_COMPLETED}{line}\n".encode())
        minutes = (time.monotonic() - started) / 60
        end = "done" if code == 0 else f"exit code {code}"
        self._console.message(f"{label}: {end} after {minutes:.1f} minutes")
        if code == 0:
            return Outcome("done", minutes=minutes)
        # A run that is stopped while Python still starts dies of the signal itself: it has nothing to save.
        if self.stopped and code in (Interrupted.exit_code, -signal.SIGTERM):
            return Outcome("not started", STOPPED, minutes)
        return Outcome("failed", f"exit code {code}: {_last_line(log)} ({log})", minutes)

    def _is_complete(self, run: SweepRun) -> bool:
        """Return whether the run has a result that this command has made. Without a log, any result counts."""
        if not (self._out / run.name / RESULT).exists():
            return False
        completed = _completed_command(self._log(run))
        return completed is None or completed == shell_words(*command(run, self._out))

    def _log(self, run: SweepRun) -> Path:
        return self._out / f"{run.name}.log"

    def _needs(self, run: SweepRun, other: str) -> bool:
        """Return whether an argument of the run is the other run's folder, or lies in it."""
        folder = re.compile(rf"(?<![\w./-]){re.escape(str(self._out / other))}(?![\w.-])")
        return any(folder.search(argument) for argument in run.arguments)

    def _start(self, run: SweepRun, log: BinaryIO, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C then reaches the sweep alone, which forwards it once.
        process = subprocess.Popen(
            [sys.executable, "-m", *command(run, self._out)],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        self._processes.add(process)
        if self.stopped:
            self._signal(process)
        return process

    def _signal(self, process: subprocess.Popen[bytes]) -> None:
        """Ask a run to save and end, once: a second signal would end it without saving."""
        if process in self._processes:
            self._processes.discard(process)
            process.send_signal(signal.SIGTERM)

    @contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        """Let the first stopping signal ask every run to save and end. No further run starts."""

        def stop(*_: object) -> None:
            self.stopped = True
            for process in list(self._processes):
                self._signal(process)

        previous = {number: signal.signal(number, stop) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def command(run: SweepRun, out: Path) -> list[str]:
    """Return the command line of a run."""
    return ["switchcli", *run.arguments, "--out", str(out / run.name), "--quiet"]


def available_slots(jobs: int | None) -> list[dict[str, str]]:
    """Return the environment of each slot: one per GPU that is visible, else one per processor; or `jobs` slots.

    Several slots share a GPU if there are more jobs than GPUs. OpenMP threads are divided among the slots.
    """
    gpus = _visible_gpus()
    cores = available_processors()
    count = jobs or len(gpus) or cores
    threads = {} if is_thread_count_set() else {"OMP_NUM_THREADS": str(max(1, cores // count))}
    if not gpus:
        return [dict(threads) for _ in range(count)]
    return [{**threads, "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} for slot in range(count)]


def _visible_gpus() -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, else all that nvidia-smi lists. torch is not imported."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, check=False, capture_output=True, text=True)
    except OSError:
        return []
    return done.stdout.split() if done.returncode == 0 else []


def _completed_command(log: Path) -> str | None:
    """Return the last command line that a sweep has completed by its log, or None if there is none."""
    if not log.is_file():
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.removeprefix(_COMPLETED) for line in reversed(lines) if line.startswith(_COMPLETED)), None)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].encode("unicode_escape").decode() if lines else "no message"
