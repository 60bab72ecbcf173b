"""Part i: two runs on one folder, the lock of a run that was killed, and readers beside a run that saves every step.

Each start is a fork of this process, which has imported everything; what runs in it is the command's entry point.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from drill import ended, newest, start
from table import Row
from tiny_run import RECIPE, WORDS

from switchcli.runs import conversion, eval_job, run_comparison  # noqa: F401  # so that a fork has them

OFFSET_SECONDS = 0.5
"""Between the two starts, at most."""
PATIENCE_SECONDS = 120
LOSER_SECONDS = 10
"""From its start within which the second run must be refused: seconds on a machine that has other things to do."""


class Trial(NamedTuple):
    """What became of two runs of one folder, and of a third after the winner was killed."""

    broken: str
    not_recovered: str
    seconds: float
    """Until the loser was out."""


def rows(folder: Path, long: bool) -> Iterator[Row]:
    os.environ["SWITCHCLI_CACHE"] = str(folder / "cache")
    recipe, draw = lay_out(folder), random.Random(0)
    trials = [two(folder / f"run-{number}", recipe, draw) for number in range(50 if long else 5)]
    refused = [trial.broken for trial in trials if trial.broken]
    slowest = f"the loser out after {max(trial.seconds for trial in trials):.1f} s at most"
    what = "starts of two runs on one folder, 0 to 500 ms apart"
    yield Row("i", what, len(trials), len(refused), refused[0] if refused else slowest)
    stale = [trial.not_recovered for trial in trials if trial.not_recovered]
    yield Row("i", "locks of a run that was killed", len(trials), len(stale), stale[0] if stale else "")
    yield beside_a_run(folder, recipe, 1000 if long else 50)


def lay_out(folder: Path) -> Path:
    """A recipe of a run that never ends by itself, and its text."""
    text, draw = folder / "text.txt", random.Random(0)
    text.write_text("".join(" ".join(draw.choices(WORDS, k=40)) + "\n" for _ in range(300)))
    endless = RECIPE.replace("text.txt", str(text)).replace("steps: 2,", "steps: 1000000,")
    path = folder / "tiny.yaml"
    path.write_text(endless.replace("save_every_steps: 4", "save_every_steps: 1, keep_last: 1, keep_best: false"))
    assert path.read_text().count("1000000") == 1 == path.read_text().count("keep_last: 1")
    return path


def two(run: Path, recipe: Path, draw: random.Random) -> Trial:
    """One of the two wins; it is killed, and the next run takes its lock."""
    logs, began, children = [], [], []
    for number in range(2):
        logs.append(run.with_name(f"{run.name}-{number}.log"))
        began.append(time.monotonic())
        children.append(start(["pretrain", recipe, "--out", run], logs[-1]))
        if number == 0:
            time.sleep(draw.uniform(0, OFFSET_SECONDS))
    codes: list[int | None] = [None, None]
    while codes == [None, None] and time.monotonic() < began[1] + PATIENCE_SECONDS:
        codes = [ended(child, 0.01) for child in children]
    seconds, loser = time.monotonic() - max(began), 0 if codes[0] is not None else 1
    winner, said = children[1 - loser], logs[loser].read_text()
    broken = ""
    if codes[loser] != 4 or codes[1 - loser] is not None or seconds > LOSER_SECONDS:
        broken = f"codes {codes} after {seconds:.1f} s: {said[-300:]}"
    elif not re.search(rf"\bprocess {winner}\b", said) or holder(run) != winner:
        broken = f"process {winner} holds the lock, run.lock says {holder(run)}, the loser was told: {said}"
    time.sleep(draw.uniform(0, OFFSET_SECONDS))
    for child, code in zip(children, codes, strict=True):
        if code is None:
            os.kill(child, signal.SIGKILL)
            ended(child, PATIENCE_SECONDS)
    return Trial(broken, next_run(recipe, run, run.with_name(f"{run.name}-next.log")), seconds)


def next_run(recipe: Path, run: Path, log: Path) -> str:
    """Why a run does not take the lock of one that was killed, if it does not; it is stopped then."""
    child, deadline = start(["pretrain", recipe, "--out", run], log), time.monotonic() + PATIENCE_SECONDS
    while holder(run) != child and (code := ended(child, 0.01)) is None and time.monotonic() < deadline:
        pass
    if holder(run) == child:
        os.kill(child, signal.SIGTERM)
        code = ended(child, PATIENCE_SECONDS)
    return "" if code == 75 else f"it ended with {code}: {log.read_text()[-300:]}"


def holder(run: Path) -> int | None:
    """The process that a run's lock names."""
    try:
        return int(json.loads((run / "run.lock").read_text())["pid"])
    except (OSError, ValueError):
        return None


def beside_a_run(folder: Path, recipe: Path, polls: int) -> Row:
    """Reports, evaluations and conversions of a run that saves, and removes a checkpoint, in every step."""
    run, export, log = folder / "read", folder / "export", folder / "reader.log"
    writer = start(["pretrain", recipe, "--out", run], folder / "read.log")
    while not any((run / "checkpoints").glob("step-*")):
        assert ended(writer, 0.05) is None, (folder / "read.log").read_text()
    readers = [
        ["report", str(run)],
        ["eval", str(run)],
        ["convert", str(run), str(export), "--to", "huggingface"],
    ]
    lost, first = [], newest(run)
    for poll in range(polls):
        reader = readers[poll % len(readers)]
        log.unlink(missing_ok=True)
        code = ended(start(reader, log), PATIENCE_SECONDS)
        if code != 0:
            lost.append(f"{reader[0]} ended with {code}: {log.read_text()[-500:]}")
        for file in export.glob("*.safetensors"):
            if not all(np.isfinite(array).all() for array in safetensors.numpy.load_file(file).values()):
                lost.append(f"{file}: a number is none")
        shutil.rmtree(export, ignore_errors=True)
    saves = newest(run) - first
    os.kill(writer, signal.SIGTERM)
    code = ended(writer, PATIENCE_SECONDS)
    if code != 75:
        lost.append(f"the run ended with {code}: {(folder / 'read.log').read_text()[-500:]}")
    said = f"{saves} saves meanwhile"
    return Row(
        "i", "report, eval, convert beside a run that saves in every step", polls, len(lost), (lost or [said])[0]
    )
