"""Processor time until a command ends: help, completion, checks of recipes, and one training step."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from machine import Job, Result

ROOT = Path(__file__).resolve().parents[2]
COMMANDS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "`--help`": ["--help"],
        "`pretrain --help`": ["pretrain", "--help"],
        "completion of a key": [],
        "`recipes validate`": ["recipes", "validate", "quickstart/switch"],
        "`pretrain --dry-run`": ["pretrain", "quickstart/switch", "--dry-run", "--out", "run"],
        "a run of one step": [
            "pretrain",
            "quickstart/switch",
            "train.steps=1",
            "schedule.kind=constant",
            "--out",
            "run",
        ],
    }
)
"""The arguments of each row, in an empty folder. The run finds its text prepared: only its first turn prepares it."""
COMPLETION = {
    "_SWITCHCLI_COMPLETE": "complete_bash",
    "COMP_WORDS": "switchcli pretrain mine.yaml train.st",
    "COMP_CWORD": "3",
}


class Cost(NamedTuple):
    """What one command took."""

    cpu: float
    """Processor seconds."""
    seconds: float


def startup(job: Job) -> Result:
    """Costs of a command in this checkout and in another one (`against`), in turns."""
    sides = [Path(job["against"]), ROOT] if job["against"] else [ROOT]
    for root in sides:  # compiles the modules, and prepares the text of the step
        run(root, job["row"])
    costs: list[list[Cost]] = [[] for _ in sides]
    for number in range(job["rounds"]):
        for side in list(range(len(sides)))[:: 1 if number % 2 else -1]:
            costs[side].append(run(sides[side], job["row"]))
    return {"costs": costs}


def run(root: Path, row: str) -> Cost:
    """Run a command of the package in `root` with this interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(root), **({} if COMMANDS[row] else COMPLETION)}
        code = "import sys; sys.argv[0] = 'switchcli'; from switchcli.cli import main; main()"
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", code, *COMMANDS[row]],
            env=environment,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr
        errors = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(errors[-4000:])
        seconds = time.perf_counter() - began
    return Cost(usage.ru_utime + usage.ru_stime, seconds)
