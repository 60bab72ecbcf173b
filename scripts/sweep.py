"""Many runs by one command (scripts/sweep): a grid, or a list of them, over the processors or GPUs at hand.

A run is `switchcli VERB ARGUMENTS --out OUT/NAME`. One whose folder holds result.json is skipped; one that was cut
goes on, since the verb itself does so. A run that fails stops none but those that are given its folder: what failed is
said at the end, and the exit code is 1. A signal lets each run save; the exit code is then 75, and the same command
goes on.
"""

import argparse
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

FAILED, USAGE, INTERRUPTED = 1, 2, 75
VERBS = ("pretrain", "finetune", "distill", "eval")
RESULT = "result.json"
HELP = """\
a grid: scripts/sweep --out runs/grid pretrain quickstart/switch model.num_experts=2,4 train.seed=0,1
        makes runs/grid/2-0, 2-1, 4-0, 4-1: values parted by commas are tried in turn, and name the run.
a list: scripts/sweep --out runs/table FILE, where a line of FILE is NAME VERB ARGUMENTS ..., or a grid of them:
            dense    pretrain quickstart/dense train.seed=0,1,2
            teacher  pretrain quickstart/switch train.seed=0,1,2
            ---
            student  distill quickstart/distill --teacher {out}/teacher-{train.seed} train.seed=0,1,2
        makes dense-0, ..., student-2. {out} is the folder, {KEY} the run's value of a key. What stands below a line
        of `---` begins when all above it has ended. KEY=VALUE after FILE hold for every run that trains, in place of
        the line's: train.seed=0 leaves dense-0, teacher-0 and student-0.
"""


class Run(NamedTuple):
    """One run: its folder's name, the arguments of `switchcli`, and how many `---` stand above it."""

    name: str
    arguments: tuple[str, ...]
    stage: int = 0


class Unlisted(ValueError):
    """A list or grid that says no runs."""


def values(text: str) -> list[str]:
    """`2,4` -> 2 and 4; a comma within brackets, braces or quotes parts nothing."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in ")}]")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def grid(name: str, arguments: Sequence[str], out: Path, stage: int = 0, added: Sequence[str] = ()) -> Iterator[Run]:
    """The runs of one line: all combinations of the values of its keys; the last key varies fastest.

    `added` take the place of keys of the line; where that names a run by a key, it still does.
    """
    instead = {argument.partition("=")[0]: argument for argument in added}
    line = [(argument, instead.pop(argument.partition("=")[0], argument)) for argument in arguments]
    line += [(argument, argument) for argument in instead.values()]
    keys = [argument.partition("=")[::2] if is_key(argument) else None for _, argument in line]
    choices = [values(key[1]) if key else [argument] for key, (_, argument) in zip(keys, line, strict=True)]
    names = [
        max(len(several), len(values(was)) if is_key(was) else 1) > 1
        for (was, _), several in zip(line, choices, strict=True)
    ]
    for chosen in itertools.product(*choices):
        own = {key[0]: value for key, value in zip(keys, chosen, strict=True) if key}
        varied = [value for value, is_named in zip(chosen, names, strict=True) if is_named]
        full = [f"{key[0]}={value}" if key else value for key, value in zip(keys, chosen, strict=True)]
        yield Run(
            "-".join(filter(None, [name, *map(_as_name, varied)])),
            tuple(_filled(argument, {"out": str(out), **own}) for argument in full),
            stage,
        )


def listed(path: Path, added: Sequence[str], out: Path) -> list[Run]:
    """The runs of a list; `added` are keys for every line of a verb that trains, in place of its own."""
    runs, stage = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise Unlisted(f"{path}:{number}: {error}") from error
        if words == ["---"]:
            stage += 1
        elif len(words) == 1:
            raise Unlisted(f"{path}:{number}: {line.strip()!r} is no run: write NAME VERB ARGUMENTS ...")
        elif words and "/" in words[0]:
            raise Unlisted(f"{path}:{number}: {words[0]!r} names no folder in {out}: leave out the /")
        elif words:
            runs += grid(words[0], words[1:], out, stage, [] if words[1] == "eval" else added)
    return runs


def is_key(argument: str) -> bool:
    return re.match(r"[A-Za-z_][\w.]*=", argument) is not None


def _as_name(value: str) -> str:
    return re.sub(r"[^\w.-]+", "_", value).strip("_")


def _filled(argument: str, known: dict[str, str]) -> str:
    """`{out}` and `{train.seed}` in their places; other braces are YAML's."""
    return re.sub(r"\{([\w.]+)\}", lambda found: known.get(found[1], found[0]), argument)


class Sweep:
    """Runs under way, on so many slots; a slot is a GPU, or a share of the processors."""

    def __init__(self, out: Path, slots: Sequence[dict[str, str]], total: int) -> None:
        """`slots` are what each adds to the environment of a run."""
        self._out, self._total = out, total
        self._free = list(slots)
        self._going: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._began = 0
        self.stopped = False
        self.failed: dict[str, str] = {}
        """By a run's name, why."""

    def run(self, run: Run) -> None:
        """The run to its end, unless it is whole already; notes a failure."""
        folder = self._out / run.name
        with self._lock:
            self._began += 1
            at = f"[{self._began}/{self._total}] {run.name}"
        if self.stopped:
            return
        if (folder / RESULT).exists():
            print(f"{at}: done before", flush=True)
            return
        if needed := next((name for name in [*self.failed] if self._names(run, name)), None):
            print(f"{at}: not begun: {needed} failed", flush=True)
            self._fails(run, f"not begun: it needs {needed}")
            return
        command = [sys.executable, "-m", "switchcli", *run.arguments, "--out", str(folder), "--quiet"]
        started, log = time.monotonic(), self._out / f"{run.name}.log"
        with self._lock:
            slot = self._free.pop()
        print(f"{at}: {shlex.join(['switchcli', *command[3:]])}", flush=True)
        try:
            with log.open("ab") as file, self._started(command, file, {**os.environ, **slot}) as process:
                code = process.wait()
        except OSError as error:
            self._fails(run, str(error))
            return
        finally:
            with self._lock:
                self._free.append(slot)
        minutes = (time.monotonic() - started) / 60
        print(f"{at}: {'done' if code == 0 else f'exit code {code}'} after {minutes:.1f} minutes", flush=True)
        if code != 0 and not (self.stopped and code in (INTERRUPTED, -signal.SIGTERM)):  # the latter before it looked
            self._fails(run, f"exit code {code}: {_last_line(log)} ({log})")

    def _names(self, run: Run, other: str) -> bool:
        """Whether the run is given the other's folder, or something in it."""
        folder = re.compile(rf"(?<![\w./-]){re.escape(str(self._out / other))}(?![\w.-])")
        return any(folder.search(argument) for argument in run.arguments)

    def _fails(self, run: Run, why: str) -> None:
        with self._lock:
            self.failed[run.name] = why

    def _started(self, command: list[str], file: object, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        # A group of its own: a Ctrl-C reaches the sweep alone, which hands it on once.
        process = subprocess.Popen(  # type: ignore[call-overload]
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        with self._lock:
            self._going.add(process)
            if self.stopped:
                process.send_signal(signal.SIGTERM)
        return process

    def stop(self) -> None:
        """Let what goes on save and leave; nothing more begins."""
        self.stopped = True
        for process in list(self._going):
            process.send_signal(signal.SIGTERM)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].encode("unicode_escape").decode() if lines else "no message"


def slots_at_hand(jobs: int | None) -> list[dict[str, str]]:
    """One a GPU that CUDA_VISIBLE_DEVICES or `nvidia-smi` names, else one a processor; or `jobs`."""
    gpus = _gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = jobs or len(gpus) or cores
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // count))}
    return [{**threads, **({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})} for slot in range(count)]


def _gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one for one in named.split(",") if one]
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], check=False, capture_output=True, text=True
        )
    except OSError:
        return []
    return found.stdout.split() if found.returncode == 0 else []


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "scripts/sweep", epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the runs' folders (runs/sweep)")
    parser.add_argument("--jobs", type=int, help="runs at once; absent: one a GPU, else one a processor")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and stop")
    parser.add_argument("what", nargs="+", metavar="FILE [KEY=VALUE ...] | VERB RECIPE [KEY=VALUE ...]")
    found, options = parser.parse_known_args()
    found.what += options  # --teacher and the like are the verb's
    if found.jobs is not None and found.jobs < 1:
        parser.error(f"--jobs ({found.jobs}) must be at least 1")
    return found


def runs_of(what: Sequence[str], out: Path) -> list[Run]:
    """The runs that a command line names; Unlisted says what is wrong with it."""
    path = Path(what[0])
    runs = listed(path, what[1:], out) if path.is_file() else list(grid("", what, out))
    if not runs:
        raise Unlisted(f"{path}: lists no run")
    for run in runs:
        if len(run.arguments) < 2 or run.arguments[0] not in VERBS:
            known = ", ".join(VERBS)
            raise Unlisted(f"{run.arguments[0]}: no such list, nor one of {known} with a recipe and its keys")
    runs = [run._replace(name=run.name or Path(run.arguments[1]).stem) for run in runs]
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Unlisted(f"two runs of one name: {', '.join(twice)}: name their lines apart")
    return runs


def not_made(runs: Sequence[Run], out: Path) -> Iterator[str]:
    """What is wrong with runs that are given the folder of another one, which neither is there nor comes before."""
    stages = {run.name: run.stage for run in runs}
    for run in runs:
        for argument in run.arguments:
            name = argument.removeprefix(f"{out}/").partition("/")[0]
            if (
                argument.startswith(f"{out}/")
                and stages.get(name, run.stage) >= run.stage
                and not (out / name).exists()
            ):
                yield f"{run.name}: needs {out / name}, which is not there, nor is it a run above a line of ---"


def main() -> int:
    asked = arguments()
    try:
        runs = runs_of(asked.what, asked.out)
    except (Unlisted, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    if asked.dry_run:
        for run in runs:
            print(shlex.join(["switchcli", *run.arguments, "--out", str(asked.out / run.name), "--quiet"]))
        return 0
    if faults := list(not_made(runs, asked.out)):
        print(*(f"error: {fault}" for fault in faults), sep="\n", file=sys.stderr)
        return USAGE
    asked.out.mkdir(parents=True, exist_ok=True)
    slots = slots_at_hand(asked.jobs)
    sweep = Sweep(asked.out, slots, len(runs))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sweep.stop())
    for _, stage in itertools.groupby(runs, key=lambda run: run.stage):
        with ThreadPoolExecutor(len(slots)) as pool:
            list(pool.map(sweep.run, stage))
    for name, why in sweep.failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if sweep.stopped:
        print("stopped: the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return FAILED if sweep.failed else 0


if __name__ == "__main__":
    sys.exit(main())
