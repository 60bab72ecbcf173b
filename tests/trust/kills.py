"""Part a: runs killed before every operation on their files and at random moments, and what power cuts leave."""

import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple, Self

import killed_outputs
from drill import IN_A_ROW, drill, fingerprint, in_a_save, wait_for_a_save
from faulty_files import kill
from table import Row, every
from trial import Trial, clear, lose_power_at, said, strike_at, trials

VERBS = "pretrain background finetune distill"
KILLED = -signal.SIGKILL
ENDS = {KILLED, 0, 6, 75, -signal.SIGTERM}
"""How ranks may end of which one is killed: it, those that were done, lost it, were asked to end, or just began."""
WHOLE = {0: 0, 1: 0}
"""The exit codes of two ranks that nothing happens to."""

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
        for verb, trial in found.items():
            if long or verb == "pretrain":
                yield at_random(verb, trial, folder / f"random-{verb}", 125 if long else 12)
        for verb, trial in found.items() if long else ():
            two = Pair.of(verb, trial)
            yield at_points_of_two(two, 5)
            yield at_random_of_two(two, 125)
    yield from killed_outputs.rows(folder, 1 if long else 6)


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
    told = faults[0] if faults else f"{deaths:,} deaths, {deaths - points:,} of them while it went on"
    return Row("a", f"{verb}: {what} {every(stride, 'file operation')}", points, len(faults), told)


def at_random(verb: str, trial: Trial, folder: Path, times: int) -> Row:
    folder.mkdir()
    report = drill((signal.SIGKILL,), trial.command, folder, times, seed=0)
    lost = len(report["differing"])
    told = f"{report['runs']} runs; {report['in_saves']} kills in a save, {report['resuming']} while resuming"
    times = report["strikes"]
    return Row("a", f"{verb}: SIGKILL at random, several in a row", times, lost, f"{told} {report['differing'] or ''}")


class Pair(NamedTuple):
    """A verb's run on two ranks."""

    verb: str
    trial: Trial
    """Its fingerprint is that of such a run which nothing happens to."""
    seconds: float
    """That one lasts."""

    @classmethod
    def of(cls, verb: str, trial: Trial) -> Self:
        run, began = Path(f"straight-2-{verb}"), time.monotonic()
        codes = trial.together(2, run)
        assert codes == WHOLE, f"{codes}: {said(run)}"
        return cls(verb, trial._replace(wanted=fingerprint(run)), time.monotonic() - began)

    def fault(self, run: Path) -> str:
        """What is wrong with a run once the same command has gone on with it, on both ranks, to its end."""
        codes = self.trial.together(2, run)
        return f"{run.name}: then {codes}: {said(run)}" if codes != WHOLE else self.trial.differs(run)


def at_points_of_two(two: Pair, stride: int) -> Row:
    """Either of two ranks killed before every `stride`-th operation of its own; then both begin again."""
    faults = []
    points = 0
    for rank in (0, 1):
        for at in count(stride - 1, stride):
            run = Path(f"two-{two.verb}-{rank}-{at}")
            codes = two.trial.together(2, run, {rank: partial(killed_at, at, run)})
            if codes == WHOLE:
                break
            points += 1
            sound = codes[rank] == KILLED and {*codes.values()} <= ENDS
            wrong = "" if sound else f"{run.name}: {codes}: {said(run)}"
            faults += [fault] if (fault := wrong or two.fault(run)) else []
            clear(run)
        clear(run)
    what = f"{two.verb} on 2 ranks: SIGKILL of one before {every(stride, 'file operation')} of its own"
    return Row("a", what, points, len(faults), faults[0] if faults else "")


def at_random_of_two(two: Pair, times: int) -> Row:
    """One rank of two killed, or both, at a random moment, several times in a row, every third time in a save."""
    draw = random.Random(0)
    faults = []
    strikes = in_saves = resuming = runs = 0
    while strikes < times:
        run = Path(f"random-two-{two.verb}-{runs}")
        runs += 1
        for _ in range(min(IN_A_ROW, times - strikes)):
            begun, left, victims = run.exists(), in_a_save(run), draw.choice([(0,), (1,), (0, 1)])
            within = two.seconds * draw.uniform(0, 0.7)
            strike = partial(killed_after, within, run, left, in_save=strikes % 3 == 0)
            codes = two.trial.together(2, run, dict.fromkeys(victims, strike))
            if not {*codes.values()} <= (ENDS if KILLED in codes.values() else {0}):
                faults.append(f"{run.name}: {codes}: {said(run)}")
            if KILLED not in codes.values():
                break
            strikes += 1
            in_saves += bool(in_a_save(run) - left)
            resuming += begun
        faults += [fault] if (fault := two.fault(run)) else []
        clear(run)
    what = f"{two.verb} on 2 ranks: SIGKILL of one or both at random, several in a row"
    told = f"{runs} runs; {in_saves} kills in a save, {resuming} of runs that went on"
    return Row("a", what, strikes, len(faults), faults[0] if faults else told)


def killed_after(seconds: float, run: Path, left: set[tuple[str, int]], *, in_save: bool) -> None:
    """In a rank: have it killed from without after so long, or in the save that is next then."""
    rank = os.pidfd_open(os.getpid())
    if os.fork():
        return
    if not select.select([rank], [], [], seconds)[0]:
        if in_save:
            wait_for_a_save(run, left, 1.0)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(rank, signal.SIGKILL)
    os._exit(0)
