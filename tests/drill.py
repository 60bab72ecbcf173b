"""Runs killed or stopped at random moments and started again until they are done, against one that never stopped.

Each start is a fork of one process that has imported everything, which saves the seconds that importing torch takes.
What runs in it is the command's entry point.
"""

import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from switchcli.cli import main
from switchcli.runs import distilling  # noqa: F401  # so that a fork has them

CLOCKS = {"seconds", "seconds_left", "tokens_per_second", "flops_per_second", "data_wait_fraction"}
"""What two runs need not have in common."""
ROUNDING = 1e-4
"""How far `apart` tensors may be whose sums are made in another order: as those of four ranks, which
DistributedDataParallel lays out anew after its first step."""
IN_A_ROW = 6
"""Strikes of one run at most: more would meet it near its end, where little is left to go wrong."""
STEP = re.compile(rb"^\d+/\d+ +-", re.MULTILINE)
"""A line of a logged step."""


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of the last checkpoint's weights and optimizer, and of metrics.jsonl without its clocks."""
    step = newest(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    untimed = [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]
    state = json.loads((checkpoint(run, step) / "state.json").read_text())
    return {
        "step": str(step),
        "model": _digest(tensors(run, "model")),
        "optimizer": _digest(tensors(run, "optimizer")),
        "metrics": hashlib.sha256(json.dumps(untimed, sort_keys=True).encode()).hexdigest(),
        "state": hashlib.sha256(json.dumps({**state, "seconds": None}).encode()).hexdigest(),
    }


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08}"


def newest(run: Path) -> int:
    """The step of a run's newest checkpoint; 0 where it has none."""
    saved = (run / "checkpoints").glob("step-" + "[0-9]" * 8)
    return max((int(path.name.removeprefix("step-")) for path in saved), default=0)


def tensors(run: Path, *kinds: str) -> dict[str, np.ndarray]:
    """Return the tensors of the newest checkpoint: model and optimizer, or one of them."""
    return {
        f"{kind}/{name}": tensor
        for kind in kinds or ("model", "optimizer")
        for file in checkpoint(run, newest(run)).glob(f"{kind}-*")
        for name, tensor in safetensors.numpy.load_file(file).items()
    }


def apart(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """The largest difference of two tensors of one name, relative, L2; infinity where it is no number, or a tensor is
    missing."""
    if not theirs or ours.keys() != theirs.keys():
        return math.inf
    pairs = [(ours[name].astype(np.float64), theirs[name].astype(np.float64)) for name in theirs]
    worst = np.max([np.linalg.norm(one - other) / (np.linalg.norm(other) + 1e-30) for one, other in pairs])
    return math.inf if np.isnan(worst) else float(worst)


def _digest(named: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def ranks_of(run: str) -> list[int]:
    """The processes of a run's ranks, by their command lines."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            is_rank = b"\0RANK=" in b"\0" + (process / "environ").read_bytes()
        except OSError:
            continue
        if is_rank and run in words:
            found.append(int(process.name))
    return found


def kill_one(run: str, process: subprocess.Popen[str]) -> None:
    """Kill a rank once the run has saved, which is in the middle of its steps."""
    while not list(Path(run).glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(max(ranks_of(run)), signal.SIGKILL)


def start(command: Sequence[object], log: Path, within: Callable[[], None] = lambda: None) -> int:
    """`switchcli COMMAND` in a child process, after `within`; its id. What it says is added to the log."""
    child = os.fork()
    if child:
        return child
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["switchcli", *map(str, command)]
        within()
        main()
        os._exit(0)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        traceback.print_exc()  # of what is no end of a command, for the log
        os._exit(1)  # no code of a user's error


def ended(child: int, patience: float) -> int | None:
    """The exit code (minus the signal's number for a death by one), or None while it still runs after `patience` s."""
    deadline = time.monotonic() + patience
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.001)


def leftovers(run: Path) -> list[str]:
    """What a run that is done must not leave: files under a temporary name."""
    return [str(path) for path in run.rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp")]


def in_a_save(run: Path) -> set[tuple[str, int]]:
    """What shows that a checkpoint is, or was when a kill came, being written, replaced or removed."""
    found = set()
    for path in (run / "checkpoints").glob(".*-*"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def wait_for_a_save(run: Path, before: set[tuple[str, int]], patience: float) -> None:
    """Until there is more of it than `before`, which an earlier kill has left."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and not in_a_save(run) - before:
        time.sleep(0.0002)


def drill(
    numbers: tuple[signal.Signals, ...], command: Sequence[object], folder: Path, times: int, seed: int
) -> dict[str, Any]:
    """Strike runs `times` times in all, every third time as soon as a save has begun; each run, struck IN_A_ROW times
    at most, goes on to its end.

    A signal that comes before Python could set a handler ends a process as it does any: that start counts as well.
    """
    draw = random.Random(seed)
    began = time.monotonic()
    assert ended(start([*command, "--out", folder / "straight"], folder / "straight.log"), 240) == 0
    length = time.monotonic() - began
    wanted = fingerprint(folder / "straight")
    codes: Counter[str] = Counter()
    strikes = in_saves = resuming = runs = 0
    differing: list[str] = []
    while strikes < times:
        run, log = folder / f"run-{runs}", folder / f"run-{runs}.log"
        runs += 1
        for turn in count():
            begun, said = run.exists(), log.stat().st_size if log.exists() else 0
            left = in_a_save(run)
            child = start([*command, "--out", run], log)
            if strikes < times and turn < IN_A_ROW:
                code = ended(child, draw.uniform(0, 0.7 * length))
                if code is None and strikes % 3 == 0:
                    wait_for_a_save(run, left, 1.0)
                if code is None:
                    os.kill(child, draw.choice(numbers))
                    code = ended(child, 120)
                    strikes += code != 0
                    in_saves += bool(in_a_save(run) - left)
                    resuming += begun and not STEP.search(log.read_bytes()[said:])
            else:
                code = ended(child, 240)
            codes[str(code)] += 1
            if code == 0 or code not in (75, *(-number for number in numbers)):
                break
        if code != 0 or fingerprint(run) != wanted or leftovers(run):
            differing.append(str(run))
    return {
        "strikes": strikes,
        "in_saves": in_saves,
        "resuming": resuming,
        "runs": runs,
        "differing": differing,
        "exit_codes": codes,
    }
