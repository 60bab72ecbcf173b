"""Part a: runs killed before every operation on their files and at random moments, and what power cuts leave."""

import signal
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

from drill import drill, fingerprint, leftovers
from faulty_files import kill
from table import Row, every
from trial import Trial, clear, lose_power_at, strike_at, trials

VERBS = "pretrain background finetune distill"
KILLED = -signal.SIGKILL

Strike = Callable[[int, Path], None]


def killed_at(at: int, run: Path) -> None:
    strike_at(at, run, kill)


def rows(folder: Path, long: bool) -> Iterator[Row]:
    with trials(folder, VERBS if long else "pretrain finetune distill") as found:
        for verb, trial in found.items():
            short = 14 if verb == "pretrain" else 60
            yield at_points(verb, trial, killed_at, "SIGKILL before", 1 if long else short)
        for verb, trial in found.items():
            if long or verb == "pretrain":
                yield at_points(verb, trial, lose_power_at, "power lost before", 1 if long else 14)
        if long:
            yield on_two_ranks(found["pretrain"], 5)
        for verb, trial in found.items():
            if long or verb == "pretrain":
                yield at_random(verb, trial, folder / f"random-{verb}", 125 if long else 12)


def at_points(verb: str, trial: Trial, strike: Strike, what: str, stride: int) -> Row:
    """A run struck before every `stride`-th operation, and while it goes on before an early one, then left alone."""
    faults = []
    points = deaths = 0
    for at in count(stride - 1, stride):
        run = Path(f"{verb}-{at}")
        code = trial.run(run, partial(strike, at, run))
        if code == 0:
            break
        points += 1
        again = trial.run(run, partial(strike, at % 23, run))
        ends = [code, again]
        deaths += ends.count(KILLED)
        wrong = "" if set(ends) <= {KILLED, 0} else f"{run.name}: exit codes {ends}"
        faults += [fault] if (fault := wrong or trial.fault(run)) else []
        clear(run)
    clear(run)
    said = faults[0] if faults else f"{deaths:,} deaths, {deaths - points:,} of them while it went on"
    return Row("a", f"{verb}: {what} {every(stride, 'file operation')}", points, len(faults), said)


def at_random(verb: str, trial: Trial, folder: Path, times: int) -> Row:
    folder.mkdir()
    report = drill((signal.SIGKILL,), trial.command, folder, times, seed=0)
    lost = len(report["differing"])
    said = f"{report['runs']} runs; {report['in_saves']} kills in a save, {report['resuming']} while resuming"
    trials = report["strikes"]
    return Row("a", f"{verb}: SIGKILL at random, several in a row", trials, lost, f"{said} {report['differing'] or ''}")


def on_two_ranks(trial: Trial, stride: int) -> Row:
    """Either of two ranks killed before every `stride`-th operation of its own; then both begin again."""
    whole = {0: 0, 1: 0}
    assert trial.together(2, Path("straight-2")) == whole
    two = trial._replace(wanted=fingerprint(Path("straight-2")))
    faults = []
    points = 0
    for rank in (0, 1):
        for at in count(stride - 1, stride):
            run = Path(f"two-{rank}-{at}")
            codes = two.together(2, run, {rank: partial(killed_at, at, run)})
            if codes == whole:
                break
            points += 1
            again = two.together(2, run)
            differs = again != whole or fingerprint(run) != two.wanted or leftovers(run)
            faults += [f"{run.name}: {codes}, then {again}"] if differs or codes[rank] != KILLED else []
            clear(run)
        clear(run)
    what = f"pretrain on 2 ranks: SIGKILL of one before {every(stride, 'file operation')} of its own"
    return Row("a", what, points, len(faults), faults[0] if faults else "")
