"""Run a sweep: several runs at once, each on its own GPU or on its share of the processors.

A run is the command `switchcli VERB ARGUMENTS --out OUT/NAME`. A run is skipped if the result.json in its folder says
that this command made it, and no file of its recipe is newer. Any other is left to its verb, which resumes an
interrupted run and one with more steps, and refuses a run of other settings. A failed run stops no other run, except
those that need its folder.
"""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from switchcli import metric_names as metric
from switchcli.distributed.launch import kill_with_children
from switchcli.errors import CheckpointError, Interrupted, RecipeError, disk_errors
from switchcli.recipe import library
from switchcli.sweep.sweep_list import SweepRun, needed_runs
from switchcli.system import publish
from switchcli.system.lock import lock
from switchcli.system.processor import available_processors, is_thread_count_set
from switchcli.system.signals import handling
from switchcli.system.startup import LAUNCHER
from switchcli.system.user_files import open_regular
from switchcli.terminal.console import Console
from switchcli.terminal.metrics_file import parse, read_object, step_of
from switchcli.terminal.safe_text import shell_words

_POLL_SECONDS = 0.5
_TAIL_BYTES = 2**20
"""Bytes at the end of a log or of metrics that are read: a log may be as long as its run likes."""
Status = Literal["done", "skipped", "failed", "not started", "stopped"]


class Outcome(NamedTuple):
    """How a run of a sweep ended."""

    status: Status
    """`skipped`: it was complete before. `not started`: it needs a run that failed. `stopped`: with the sweep."""
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
        self._processes: set[subprocess.Popen[str]] = set()
        """The processes of the runs that go on."""
        self._lock = threading.Lock()
        self._num_started = 0
        self.stopped = False
        """Whether a signal has stopped the sweep."""
        self.killed = False
        """Whether a Ctrl-C after that signal has ended the runs at once, without saving."""
        self.outcomes: dict[str, Outcome] = {}
        """How each run ended, by name."""

    def run(self) -> None:
        """Run everything that is not complete, stage by stage. The folder of the sweep is locked meanwhile.

        After a signal (`stopped`) all runs have saved, unless a Ctrl-C followed (`killed`).

        Raises:
            CheckpointError: another sweep goes on in the folder, or it cannot be written.
            RecipeError: the folder is a file.
        """
        with lock(self._out), self._stopped_by_signals():
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
        if self._is_complete(run):
            self._console.message(f"{label}: complete already")
            for name in self._trained_since(run):
                self._console.warning(
                    f"{run.name}: used {name}, which was trained again or longer since: run its command with "
                    "--no-resume to use what is there now"
                )
            return Outcome("skipped")
        if self.stopped:
            return Outcome("stopped")
        if needed := next((name for name in failed if name in needed_runs(run, self._out)), None):
            self._console.message(f"{label}: not started: {needed} failed")
            return Outcome("not started", f"needs {needed}")
        with self._lock:
            slot = self._free_slots.pop()
        try:
            if (self._out / run.name / "run.lock").exists():
                with lock(self._out / run.name):  # refused here: a run that goes on may print into the same log
                    pass
            return self._run_on(slot, run, label)
        except (OSError, CheckpointError) as error:
            self._console.message(f"{label}: not started: {error}")
            return Outcome("failed", str(error))
        finally:
            with self._lock:
                self._free_slots.append(slot)

    def _run_on(self, slot: Mapping[str, str], run: SweepRun, label: str) -> Outcome:
        log = self._out / f"{run.name}.log"
        self._console.message(f"{label}: {shell_words(*command(run, self._out))}")
        started = time.monotonic()
        with disk_errors(log):
            file = publish.open_append(log)
        with file:
            with self._start(run, file, {**os.environ, **slot}) as process:
                code = self._wait(process, run, label)
            self._processes.discard(process)
        minutes = (time.monotonic() - started) / 60
        end = "done" if code == 0 else f"exit code {code}"
        self._console.message(f"{label}: {end} after {minutes:.1f} minutes")
        if code == 0:
            return Outcome("done", minutes=minutes)
        # A run that is stopped while Python still starts dies of the signal itself: it has nothing to save.
        if self.stopped and code in (Interrupted.exit_code, -signal.SIGTERM, -signal.SIGKILL):
            return Outcome("stopped", minutes=minutes)
        last = next((line.strip() for line in reversed(_tail(log)) if line.strip()), "no message")
        return Outcome("failed", f"exit code {code}: {last.encode('unicode_escape').decode()} ({log})", minutes)

    def _wait(self, process: subprocess.Popen[str], run: SweepRun, label: str) -> int:
        """Return the exit code of a run. Until it ends, show the last step that it has logged since it started."""
        folder, steps = self._out / run.name, 0
        earlier = _last_record(folder / "metrics.jsonl")
        with self._console.stepping(label) as show:
            while True:
                try:
                    return process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    logged = _last_record(folder / "metrics.jsonl")
                    if logged is not None and logged != earlier:  # recipe.yaml is of this start, too
                        steps = steps or _steps(folder / "recipe.yaml")
                        show(step_of(logged) or 0, steps, logged.get(metric.LOSS))

    def _is_complete(self, run: SweepRun) -> bool:
        """Return whether the run has a result, this command made it, and its recipe was not written since."""
        file = self._out / run.name / "result.json"
        if (read_object(file) or {}).get("command") != command(run, self._out):
            return False
        with suppress(RecipeError):
            recipe = library.read_files(library.locate(run.arguments[1]))
            return all(path.stat().st_mtime <= file.stat().st_mtime for path in recipe)
        return True  # the second argument is no recipe

    def _trained_since(self, run: SweepRun) -> list[str]:
        """Return the runs whose folders a complete run needed, and whose results are newer than its own."""
        results = {name: self._out / name / "result.json" for name in (run.name, *needed_runs(run, self._out))}
        times = {name: path.stat().st_mtime for name, path in results.items() if path.is_file()}
        return [name for name, time in times.items() if time > times[run.name]]

    def _start(self, run: SweepRun, log: IO[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        # A session of its own: Ctrl-C then reaches the sweep alone, which forwards it. If the sweep is killed, its run
        # gets a signal (LAUNCHER). The kernel sends it when the thread ends that made the process, so that thread waits
        # for the process.
        process = subprocess.Popen(
            [sys.executable, "-m", *command(run, self._out)],
            stdout=log,
            stderr=log,
            text=True,
            env={**environment, LAUNCHER: str(os.getpid())},
            start_new_session=True,
        )
        self._processes.add(process)
        if self.stopped:  # before the process was in the set
            process.terminate()
        return process

    @contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        """Let the first stopping signal ask every run to save and end, and a later Ctrl-C kill them. None starts."""

        def stop(number: int, frame: object) -> None:
            self.killed |= self.stopped and number == signal.SIGINT
            is_first, self.stopped = not self.stopped, True
            for process in list(self._processes):
                if self.killed:
                    kill_with_children(process.pid)
                elif is_first:
                    process.terminate()

        with handling(stop):
            yield


def command(run: SweepRun, out: Path) -> list[str]:
    """Return the command line of a run."""
    return ["switchcli", *run.arguments, "--out", str(out / run.name), "--quiet"]


def available_slots(jobs: int | None, num_runs: int) -> list[dict[str, str]]:
    """Return the environment of each slot: one per GPU that is visible, else one per processor; or `jobs` slots.

    Several slots share a GPU if there are more jobs than GPUs. OpenMP threads are divided among the slots. No more than
    `num_runs` slots are returned.
    """
    gpus = _visible_gpus()
    cores = available_processors()
    count = min(jobs or len(gpus) or cores, num_runs)
    threads = {} if is_thread_count_set() else {"OMP_NUM_THREADS": str(max(1, cores // count))}
    if not gpus:
        return [dict(threads) for _ in range(count)]
    return [{**threads, "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} for slot in range(count)]


def _visible_gpus() -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, else all that nvidia-smi lists. torch is not imported."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [*itertools.takewhile(lambda gpu: gpu not in ("", "-1"), named.split(","))]  # CUDA stops there too
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, check=False, capture_output=True, text=True)
    except OSError:
        return []
    return done.stdout.split() if done.returncode == 0 else []


def _tail(path: Path) -> list[str]:
    """Return the last lines of a file, or none if it cannot be read."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read(_TAIL_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return []


def _last_record(metrics: Path) -> dict[str, Any] | None:
    """Return the newest record of a training step, or None if there is none yet."""
    records = (parse(line.encode()) for line in reversed(_tail(metrics)))
    return next((record for record in records if record is not None and metric.LOSS in record), None)


def _steps(recipe: Path) -> int:
    """Return the number of steps of a run, or 0 if it is not known."""
    from switchcli.recipe import resolve

    with suppress(RecipeError):
        steps = resolve.load(str(recipe)).stated("train.steps")
        return steps if isinstance(steps, int) else 0
    return 0
