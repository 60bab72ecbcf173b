"""Part h: one of four ranks killed, raising, out of memory or slow in each phase of a run that shares experts.

A fault is planted from outside (`planted/sitecustomize.py`): the command is the user's, and every rank a process of its
own. All must be over in time, the first error name rank, cause and step, and the same command again end as a run that
nothing happened to.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from drill import ROUNDING, apart, leftovers, ranks_of, tensors
from table import Row
from tiny_run import RECIPE, write_text

RANKS, STEPS = 4, 12
KEYS = (f"train.steps={STEPS}", "train.batch_tokens=512", "checkpoint.save_every_steps=4", "eval.every_steps=4")
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 200
SLOW_SECONDS = 30.0
PHASES = {
    "start": "outside training",
    "step": "step 5",
    "all-to-all": r"step \d+",
    "save": "step 8",
    "evaluation": "step 4",
    "end": f"step {STEPS}",
}
"""Where a rank fails, and how that is told."""
FAULTS = {
    "kill": (5, 6, r"rank {rank}\b.*\bSIGKILL\b.*{where}\b.*\bcommand\b"),
    "exit": (5, 6, r"rank {rank}\b.*\bcode 3\b.*{where}\b.*\bcommand\b"),
    "raise": (5, 1, r"rank {rank}\b.*{where}\b.*\bValueError: planted"),
    "file": (5, 1, r"rank {rank}\b.*{where}\b.*\bFileNotFoundError: planted"),
    "memory": (5, 1, r"rank {rank}\b.*{where}\b.*(train\.microbatch_tokens|\bmemory\b)"),
    "slow": (PATIENCE_SECONDS, 0, None),
}
"""What happens to it; the seconds within which nothing may be left, the exit code, and the first error."""
QUICK = [fault for fault, (seconds, _, _) in FAULTS.items() if seconds <= 5]
SHORT = [("file", "all-to-all", 1), ("kill", "save", 3), ("kill", "start", 0)]
SUMMARY = {
    "kill": r"rank +: {rank} .*\n +exitcode +: -9 .*\bSIGKILL\b",
    "exit": r"rank +: {rank} .*\n +exitcode +: 3 ",
}
"""How torchrun's own summary names a rank that ends without a word."""


class Trial(NamedTuple):
    fault: str
    phase: str
    rank: int
    broken: str
    seconds: float
    """The time from the fault until nothing was left."""


def rows(folder: Path, long: bool) -> Iterator[Row]:
    write_text(folder / "text.txt")
    (folder / "tiny.yaml").write_text(RECIPE)
    straight = folder / "straight"
    done = subprocess.run(command(straight), env=environment(folder), cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    every = [*product(FAULTS, PHASES)]
    # In the long form each three times, on another rank every time, and once under torchrun.
    asked = [(*one, (n + turn) % RANKS) for n, one in enumerate(every) for turn in range(3)] if long else SHORT
    for fault in FAULTS:
        found = [trial(folder / "-".join(map(str, one)), *one, straight) for one in asked if one[0] == fault]
        if found:
            yield row(fault, found)
    for fault in QUICK if long else ():
        runs = [(folder / f"torchrun-{fault}-{n}", fault, phase, n % RANKS) for n, phase in enumerate(PHASES)]
        yield row(f"under torchrun, {fault}", [trial(*one, straight, ["--max-restarts=0"]) for one in runs])
    if long:
        broken = [again for fault in FAULTS if (again := by_torchrun(folder / f"torchrun-{fault}", fault, straight))]
        yield Row("h", "torchrun --max-restarts=1", len(FAULTS), len(broken), (broken or [""])[0])


def row(fault: str, found: list[Trial]) -> Row:
    lost = [f"{one.phase}, rank {one.rank}: {one.broken}" for one in found if one.broken]
    slowest = f"over in {max(one.seconds for one in found):.1f} s at most"
    what = f"{fault}: one of {RANKS} ranks, in {len({one.phase for one in found})} phases"
    return Row("h", what, len(found), len(lost), lost[0] if lost else slowest)


def command(run: Path, torchrun: Sequence[str] = ()) -> list[str]:
    pretrain = ["-m", "switchcli", "pretrain", "tiny.yaml", *KEYS, "parallel.expert=2", "--out", str(run), "-q"]
    if torchrun:
        agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", *torchrun]
        return [sys.executable, *agent, *pretrain]
    return [sys.executable, *pretrain, "--json", "--processes", str(RANKS)]


def environment(folder: Path, planted: dict[str, object] | None = None) -> dict[str, str]:
    """Return the environment of a command, with a fault for one of its ranks."""
    places = ([str(Path(__file__).with_name("planted"))] if planted else []) + [str(ROOT)]
    cache = {"SWITCHCLI_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    planting = {"PLANTED": json.dumps(planted)} if planted else {}
    return {**os.environ, **cache, **planting, "PYTHONPATH": os.pathsep.join(places)}


def struck(
    run: Path, fault: str, phase: str, rank: int, torchrun: Sequence[str] = ()
) -> tuple[int | None, str, str, float]:
    """Exit code, stdout, stderr, and seconds from the fault until nothing was left, of a run with a fault."""
    moment = run.with_name(f"{run.name}.moment")
    planted: dict[str, object] = {"fault": fault, "phase": phase, "rank": rank}
    planted.update(moment=str(moment), seconds=SLOW_SECONDS)
    process = subprocess.Popen(
        command(run, torchrun),
        env=environment(run.parent, planted),
        cwd=run.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        for left in ranks_of(str(run)):
            os.kill(left, 9)
        process.kill()
        return None, *process.communicate(), PATIENCE_SECONDS
    assert moment.exists(), err
    return process.returncode, out, err, time.time() - float(moment.read_text())


def trial(run: Path, fault: str, phase: str, rank: int, straight: Path, torchrun: Sequence[str] = ()) -> Trial:
    """Under torchrun its exit code is 1, and what it says itself stands between the ranks' lines."""
    code, out, err, seconds = struck(run, fault, phase, rank, torchrun)
    limit, wanted, first = FAULTS[fault]
    wanted = 1 if torchrun else wanted
    lines = err.splitlines()
    hints = ("warning: ", "note: ")  # the note is of a torch before 2.13, which gives ranks less time to save
    said = [line for line in lines if (line.startswith("error: ") if torchrun else not line.startswith(hints))]
    words = first and r"error: .*\b" + first.format(rank=rank, where=PHASES[phase])
    if torchrun and fault in SUMMARY:
        words, said = SUMMARY[fault].format(rank=rank), re.findall(r"rank +: .*\n +exitcode.*", err)
    else:
        said = said[:1]
    broken = ""
    if code != wanted or seconds > limit or ranks_of(str(run)):
        broken = f"exit code {code} after {seconds:.1f} s, left {ranks_of(str(run))}: {said[:1]}"
    elif words and not any(re.match(words, one) for one in said):
        broken = f"says {said[:1]}"
    elif words and not torchrun and json.loads(out)["exit_code"] != wanted:
        broken = f"prints {out}"
    ends = differs if code == 0 else then
    return Trial(fault, phase, rank, broken or ends(run, straight), seconds)


def then(run: Path, straight: Path) -> str:
    """What is wrong with the run when the same command has gone on with it."""
    done = subprocess.run(
        command(run), env=environment(run.parent), cwd=run.parent, capture_output=True, text=True, check=False
    )
    return f"then exit code {done.returncode}: {done.stderr[-300:]}" if done.returncode else differs(run, straight)


def differs(run: Path, straight: Path) -> str:
    """Say how the end of a run differs from that of an undisturbed one; empty if it does not."""
    far, left = apart(tensors(run), tensors(straight)), leftovers(run)
    return f"weights or optimizer state are {far:.1e} apart; left {left}" if far > ROUNDING or left else ""


def by_torchrun(run: Path, fault: str, straight: Path) -> str:
    """What is wrong with a run whose ranks torchrun starts again when one has had a fault."""
    code, _, err, seconds = struck(run, fault, "step", 1, ["--max-restarts=1"])
    if code != 0:
        return f"{fault}: exit code {code} after {seconds:.1f} s: {err[-300:]}"
    return differs(run, straight)
