"""Part l: an hour of training, saving and evaluating, by a run that is left alone and one that is killed all the time.

Of the first memory, open files, threads and the time of a step must stay as they are. The second goes on after each
kill, saves in the background or not, is read by evaluations meanwhile, and must end with the weights of the first.
"""

import json
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from drill import ended, fingerprint, leftovers, newest, start
from table import Row
from trial import trials

from switchcli.runs import eval_job  # noqa: F401  # so that a fork has it

SECONDS = {True: 3600.0, False: 30.0}
LIVES = {True: (20.0, 90.0), False: (2.0, 6.0)}
"""Within which the second run is killed after a start."""
GROWTH = {"memory": 1.02, "files": 1.2, "threads": 1.0, "step": 1.2}
"""By how much the last third of the samples may exceed the first after the warm-up. A processor that is shared with
others takes more or less time for the same step, in half a minute any: only an hour is judged by it.
Of some nine open files one more is the text of a second epoch."""
WARM_UP = 0.2
"""The share of the samples in which caches fill; and there are no leaks that end by themselves."""
ENDLESS = ["train.steps=1000000", "checkpoint.save_every_steps=20", "eval.every_steps=20", "log.every_steps=2"]
PATIENCE = 240.0
TICKS = os.sysconf("SC_CLK_TCK")


class Sample(NamedTuple):
    """What a process takes at a moment."""

    memory: int
    """Bytes of its own: what it shares with the process that it was forked from may come and go."""
    files: int
    threads: int
    processor: float
    """Seconds of processor time so far: those of the clock are also for who shares the machine."""
    steps: int


def sample(process: int, run: Path) -> Sample:
    status = Path(f"/proc/{process}/status").read_text()
    of = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if len(line.split()) > 1}
    times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    spent = (int(times[11]) + int(times[12])) / TICKS
    files = len([*Path(f"/proc/{process}/fd").iterdir()])
    return Sample(int(of["RssAnon"]) * 1024, files, int(of["Threads"]), spent, taken(run))


def taken(run: Path) -> int:
    """The last step that is logged."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return max((json.loads(line)["step"] for line in lines[-3:] if line.endswith("}")), default=0)


class Struck:
    """A run that is killed all the time, and evaluated before it goes on."""

    def __init__(self, command: Sequence[str], lives: tuple[float, float]) -> None:
        self.run, self.lost, self.strikes, self.readings = Path("struck"), list[str](), 0, 0
        self._command, self._lives, self._draw = command, lives, random.Random(0)
        self._start()

    def _start(self, *keys: str) -> None:
        self.process = start([*self._command, *keys, "--out", self.run], Path("struck.log"))
        self._killed_at = time.monotonic() + self._draw.uniform(*self._lives)

    def strike_when_due(self) -> None:
        if time.monotonic() <= self._killed_at:
            return
        os.kill(self.process, signal.SIGKILL)
        ended(self.process, PATIENCE)
        self.strikes += 1
        if newest(self.run):
            self.readings += 1
            if ended(start(["eval", self.run, "--quiet"], Path("eval.log")), PATIENCE) != 0:
                self.lost.append(f"eval: {Path('eval.log').read_text()[-300:]}")
        self._start(f"checkpoint.background={self._draw.choice(['true', 'false'])}")


def rows(folder: Path, long: bool) -> Iterator[Row]:
    with trials(folder):
        command, alone = ["pretrain", "tiny.yaml", *ENDLESS], Path("alone")
        process, struck = start([*command, "--out", alone], Path("alone.log")), Struck(command, LIVES[long])
        samples = list[Sample]()
        until = time.monotonic() + SECONDS[long]
        while time.monotonic() < until:
            time.sleep(SECONDS[long] / 100)
            if taken(alone):
                samples.append(sample(process, alone))
            struck.strike_when_due()
        lost = struck.lost
        steps = stopped(process, struck.process, alone, struck.run, lost)
        for run in (alone, struck.run):
            done = [*command, f"train.steps={steps}", "--out", run]
            if (code := ended(start(done, Path(f"{run}.log")), PATIENCE + SECONDS[long])) != 0 or leftovers(run):
                lost.append(f"{run} ended with {code}, left {leftovers(run)}")
        yield from flat(samples, long)
        found, wanted = fingerprint(struck.run), fingerprint(alone)
        lost += [f"differs in {name}" for name in ("step", "model", "optimizer") if found[name] != wanted[name]]
        what = f"kills of a run of {steps:,} steps that is saved every 20, beside {struck.readings} evaluations of it"
        told = "weights and optimizer are those of one never killed"
        yield Row("l", what, struck.strikes, len(lost), (lost or [told])[0])


def stopped(process: int, victim: int, alone: Path, struck: Path, lost: list[str]) -> int:
    """Stop both runs; the step to which both are to go on."""
    for one in (process, victim):
        os.kill(one, signal.SIGTERM)
    codes = [ended(one, PATIENCE) for one in (process, victim)]
    lost += [f"stopped with {code}" for code in codes if code not in (75, -signal.SIGTERM)]
    return max(newest(alone), newest(struck)) + 1


def flat(samples: Sequence[Sample], long: bool) -> Iterator[Row]:
    """What a process took early against late. Open files are the fewest: those of a save close again."""
    warm = samples[int(WARM_UP * len(samples)) :]
    third = len(warm) // 3
    parts = warm[:third], warm[-third:]
    minutes, steps = SECONDS[long] / 60, samples[-1].steps
    memory = [statistics.median(each.memory for each in part) for part in parts]
    files, threads = ([min(getattr(each, name) for each in part) for part in parts] for name in ("files", "threads"))
    spent = [(part[-1].processor - part[0].processor) / max(1, part[-1].steps - part[0].steps) for part in parts]
    figures = {
        "memory": (*memory, "{:,.0f} bytes"),
        "files": (*files, "{:.0f} open"),
        "threads": (*threads, "{:.0f}"),
        "step": (*spent, "{:.4f} s of a processor"),
    }
    for name in figures if long else ("memory", "files", "threads"):
        first, last, form = figures[name]
        said = f"{form.format(first)}, then {form.format(last)}"
        what = f"{name} of a run of {steps:,} steps in {minutes:.1f} minutes, late against early"
        yield Row("l", what, 1, int(last > GROWTH[name] * first), said)
