"""Part b: runs stopped by signals in each phase, on 1, 2 and 4 ranks, and by a second Ctrl-C.

A signal is sent just before a call of a function of the package, from within the process that makes it: in a fork of
this one, or in a rank of a real launcher, whose Python this file then is.
"""

import json
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, product
from pathlib import Path
from typing import Any, NamedTuple

from drill import ROUNDING, apart, fingerprint, leftovers, tensors
from table import Row
from trial import STEPS, Trial, clear, log_of, said, trials

from switchcli.checkpoint import checkpoint
from switchcli.cli import main
from switchcli.data.prepare import shards
from switchcli.data.text_batches import PreparedTextSource
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.signals import STOPPING
from switchcli.model import generation
from switchcli.model.transformer import SwitchTransformer
from switchcli.runs import pretraining, trainer
from switchcli.training import loop
from switchcli.training.distillation import Teacher
from switchcli.training.optimizers import Optimizer

FORCE = r"error: .*\bsaving\b.*\bcommand\b.*"
SAVED = rf".*\bsaved\b.*\bstep NEWEST\b.*\b{STEPS}\b.*\bcommand\b.*"
"""NEWEST is the step of the newest checkpoint."""
UNSAVED = r".*\bSIG\w+\b.*\bnothing\b.*\bcommand\b.*"
"""Before the first step, and after the last, there is nothing to save."""
LEFT = r"error: .*\branks\b.*\bstep 0\b.*\bcommand\b.*"
"""One that is not yet as far as this one has nothing to save, and leaves at once."""
ASKED = r".*\bteacher\b.*\bkept-answers\b.*\bcommand\b.*"
STOPPED, FORCED, RANK = 75, 130, 6
FORCED_SECONDS = 10
"""The seconds from a second Ctrl-C to the end, on a machine that has other things to do."""
LATE_SECONDS = 10
"""The seconds from a signal to the end of ranks that wait for a late one, on a machine that has nothing else to do."""
ANSWERS = "kept-answers"
"""The folder of a teacher's answers: each run that is struck has its own."""
STRIKE = "TRUST_STRIKE"
"""The environment variable that tells the Python of a launched rank of its signal."""


class Point(NamedTuple):
    """A place in the package where signals come."""

    verb: str
    owner: Any
    name: str
    """The name of the function of `owner` before whose call the signal comes."""
    calls: tuple[int, int, int]
    """Which call, from 1, in each repetition."""
    words: str = SAVED
    more: int | None = None
    """How many calls may follow at most, where it is to end in the middle of something long."""
    training: bool | None = None
    """The mode of the model, training or not, whose calls alone count."""
    main_only: bool = False
    """Whether the main rank alone comes by."""
    keys: tuple[str, ...] = ()
    new_cache: bool = False
    late: float = 0.0
    """Seconds for which this rank keeps the others waiting before."""


FORWARD = (SwitchTransformer, "forward")
POINTS = {
    "start: recipe resolved": Point("pretrain", trainer, "lock_run_dir", (1, 1, 1), UNSAVED),
    "start: the others wait for this rank": Point(
        "pretrain", DistributedContext, "__init__", (1, 1, 1), UNSAVED, late=4.0
    ),
    "start: room made for the model": Point("pretrain", trainer, "preflight", (1, 1, 1), UNSAVED),
    "start: weights drawn": Point("pretrain", pretraining, "initial_weights", (1, 1, 1), UNSAVED),
    "start: ready to train": Point("pretrain", trainer.Trainer, "_loader", (1, 1, 1), f"{SAVED}|{UNSAVED}|{LEFT}"),
    "data: text prepared": Point(
        "pretrain", shards, "write_manifest", (1, 1, 1), UNSAVED, main_only=True, new_cache=True
    ),
    # The first two calls are for the held-out text. Batches are made ahead, when other ranks may not have begun yet.
    "data: batch made": Point("pretrain", PreparedTextSource, "batch", (3, 5, 9), f"{SAVED}|{LEFT}"),
    "step: forward": Point("pretrain", *FORWARD, (1, 5, 11), training=True),
    "step: gradients there": Point("pretrain", loop, "_clip_gradients", (1, 3, 6)),
    "step: weights changed": Point("pretrain", Optimizer, "zero_grad", (1, 4, 6)),
    "accumulation": Point("pretrain", loop, "_seed_noise", (2, 6, 12)),
    "save": Point("pretrain", checkpoint.CheckpointWriter, "write", (1, 2, 3)),
    "save in the background": Point("background", checkpoint.CheckpointWriter, "write", (1, 2, 3)),
    "evaluation": Point("pretrain", *FORWARD, (1, 3, 7), training=False, more=0),
    "teacher's pass": Point("distill", Teacher, "predict", (2, 5, 11), more=1),
    "teacher asked beforehand": Point(
        "distill", Teacher, "predict", (3, 6, 11), ASKED, 0, main_only=True, keys=(f"distill.cache.folder={ANSWERS}",)
    ),
    "generation: answers to tasks": Point("finetune", generation, "_step", (2, 5, 9), more=0),
    "generation: samples": Point(
        "pretrain", trainer, "answer_texts", (1, 2, 1), main_only=True, keys=("log.sample_every_steps=2",)
    ),
    "generation: samples at the end": Point("pretrain", trainer, "answer_texts", (1, 1, 1), UNSAVED, main_only=True),
}


ON_TWO = ["start: the others wait for this rank", "step: gradients there", "evaluation", "save"]
"""The points of the short form on two ranks."""
LONG = {
    *("start: recipe resolved", "start: room made for the model", "start: the others wait for this rank"),
    *("step: forward", "step: gradients there", "save", "generation: samples"),
}
"""What the short form leaves out on one rank: it has the like there, or on two."""
AT_ITS_SAVE = [("step: forward", 5), ("save", 2)]
"""The third step, and its save."""


class Strike(NamedTuple):
    """A signal at one call of a point."""

    phase: str
    call: int
    number: int
    whom: str
    """`group`: all ranks; `launcher`, which is the parent of one; `self`: this process alone."""
    times: int = 1

    def send(self) -> None:
        for turn in range(self.times):
            time.sleep(0.1 * (turn > 0))
            if self.whom == "group":
                os.killpg(0, self.number)
            else:
                os.kill(os.getppid() if self.whom == "launcher" else os.getpid(), self.number)


def install(strike: Strike, notes: Path) -> None:
    """In the process of a run: have it struck. `notes` gets the step that the run is at, and when; then a line for each
    call that follows."""
    point, calls, state = POINTS[strike.phase], count(1), []
    real, restored = getattr(point.owner, point.name), trainer.TrainState

    def noted_state(*arguments: Any) -> Any:
        state.append(restored(*arguments))
        return state[-1]

    def struck(*arguments: Any, **named: Any) -> Any:
        if point.training is None or arguments[0].training == point.training:
            call = next(calls)
            if call == strike.call:
                time.sleep(point.late)
            if call >= strike.call:
                with notes.open("a") as lines:
                    lines.write(json.dumps([state[0].step if state else 0, time.monotonic()]) + "\n")
            if call == strike.call:
                strike.send()
        return real(*arguments, **named)

    trainer.TrainState = noted_state  # type: ignore[assignment, misc]
    setattr(point.owner, point.name, struck)


class Straight:
    """How runs end that nothing happens to, by what they are asked and on how many ranks."""

    def __init__(self, found: dict[str, Trial]) -> None:
        self._found = found
        self._ended: dict[tuple[object, ...], Path] = {}

    def trial(self, point: Point, world: int) -> Trial:
        """Each rank has two microbatches a step, and two batches an evaluation."""
        trial = self._found[point.verb]
        more = (f"train.batch_tokens={256 * world}", f"eval.sequences={8 * world}") if world > 1 else ()
        # A teacher's answers are to the batches of so many ranks.
        keys = [key.replace(ANSWERS, f"{ANSWERS}-{world}") for key in point.keys]
        return trial._replace(command=(*trial.command, *more, *keys))

    def end(self, point: Point, world: int) -> Path:
        key = (point.verb, world, point.keys)
        if key not in self._ended:
            run = self._ended[key] = Path(f"whole-{len(self._ended)}")
            codes = self.trial(point, world).together(world, run)
            assert [*codes.values()] == [0] * world, log_of(run).read_text()
        return self._ended[key]


class Told(NamedTuple):
    """What became of a run that was struck and went on."""

    fault: str
    seconds: float
    """The seconds from the signal, or the first of two, to the end of the run."""


def stopped(
    straight: Straight, world: int, strikes: Sequence[Strike], at: int, run: Path, launched: bool = False
) -> Told:
    """Rank `at` of a run struck; all of them begin again, and it ends as if nothing had happened."""
    point, notes = POINTS[strikes[0].phase], run.with_suffix(".notes")
    trial, cache = straight.trial(point, world), os.environ["SWITCHCLI_CACHE"]
    trial = trial._replace(command=tuple(word.replace(ANSWERS, f"{ANSWERS}-{run}") for word in trial.command))
    if point.new_cache:
        os.environ["SWITCHCLI_CACHE"] = f"{run.absolute()}.cache"

    def within() -> None:
        for strike in strikes:
            install(strike, notes)

    if launched:
        codes = by_launcher(trial, run, world, strikes[0], at, notes)
    else:
        codes = trial.together(world, run, {at: within})
    end = time.monotonic()
    told = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    fault = "it was not struck"
    if told:
        forced = sum(strike.times for strike in strikes) > 1
        fault = wrong_end(point, [*codes.values()], forced, at == 0 or launched, told, run, end - told[0][1])
    again = trial.together(world, run)
    os.environ["SWITCHCLI_CACHE"] = cache
    if not fault and [*again.values()] != [0] * world:
        fault = f"then exit codes {again}: {said(run)}"
    fault = fault or differs(run, straight.end(point, world), world)
    clear(run)
    notes.unlink(missing_ok=True)
    seconds = end - told[0][1] if told else 0.0
    return Told(f"{strikes} at rank {at} of {world}: {fault}" if fault else "", seconds)


def wrong_end(
    point: Point, codes: list[int | None], forced: bool, words: bool, told: list[Any], run: Path, seconds: float
) -> str:
    """What is wrong with the end of a run that was struck; its codes are in the order in which its ranks ended."""
    step, saved, left = told[0][0], [one.step for one in sound(run)], leftovers(run)
    lines = log_of(run).read_text().splitlines()  # the command follows, and another rank may tell that this one is gone
    faults = {
        # Two signals may reach a rank as one, which then ends as after one.
        f"exit codes {codes}: {said(run)}": (FORCED not in codes if forced else codes[0] != STOPPED)
        or not {*codes} <= {STOPPED, FORCED, RANK, -signal.SIGTERM},
        "a checkpoint is damaged": len(saved) != len(checkpoint.saved_checkpoints(run / "checkpoints")),
    }
    if forced:
        faults[f"{seconds:.1f} s until it was out"] = seconds > FORCED_SECONDS
        faults[f"said {said(run)!r}"] = len(codes) == 1 and not any(re.fullmatch(FORCE, line) for line in lines)
    else:
        here = (step, step + 1) if SAVED in point.words else (step,)
        words_of_it = point.words.replace("NEWEST", str(saved[0]) if saved else "0")
        expected = words_of_it if len(codes) == 1 else f"{words_of_it}|{UNSAVED}"
        faults |= {
            f"left {left}": bool(left),
            f"struck at step {step}, its checkpoints {saved}": (saved or [0])[0] not in here,
            f"exit codes {codes}": (point.words == SAVED or point.late > 0) and {*codes} != {STOPPED},
            f"{seconds:.1f} s until all were out": point.late > 0 and seconds > LATE_SECONDS,
            f"said {said(run)!r}": words and not any(re.fullmatch(expected, line) for line in lines),
            f"{len(told) - 1} more calls of {point.name}": point.more is not None and len(told) - 1 > point.more,
        }
    return "; ".join(fault for fault, there in faults.items() if there)


def sound(run: Path) -> list[checkpoint.Checkpoint]:
    """The whole checkpoints of a run, newest first."""
    found = checkpoint.verify_all(checkpoint.saved_checkpoints(run / "checkpoints"))
    return [verdict for _, verdict in found if isinstance(verdict, checkpoint.Checkpoint)]


def differs(run: Path, straight: Path, world: int) -> str:
    """In what a run that is done differs from one that nothing happened to."""
    if left := leftovers(run):
        return f"left {left}"
    if world < 4:
        found, wanted = fingerprint(run), fingerprint(straight)
        return ", ".join(f"{name} differs" for name in wanted if found[name] != wanted[name])
    far = apart(tensors(run), tensors(straight))
    return f"weights or optimizer state are {far:.1e} apart" if far > ROUNDING else ""


def by_launcher(trial: Trial, run: Path, world: int, strike: Strike, at: int, notes: Path) -> dict[int, int | None]:
    """Stop the run through `--processes`; the only exit code is the launcher's."""
    python = run.with_suffix(".python").absolute()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n')
    python.chmod(0o755)

    def within() -> None:
        os.environ.update(PYTHON_EXEC=str(python), PYTHONPATH=os.pathsep.join(sys.path))
        os.environ[STRIKE] = json.dumps([*strike, at, str(notes.absolute())])

    return {0: trial.run(run, within, "--processes", str(world))}


def launched_rank() -> None:
    """In the Python of a rank: `stops.py -u -m switchcli ARGUMENTS`."""
    *strike, at, notes = json.loads(os.environ[STRIKE])
    if int(os.environ["RANK"]) == at:
        install(Strike(*strike), Path(notes))
    sys.argv = ["switchcli", *sys.argv[4:]]
    main()


def rows(folder: Path, long: bool) -> Iterator[Row]:
    with trials(folder, "pretrain background finetune distill") as found:
        straight = Straight(found)
        yield row("stopped in each phase", _each(straight, 1, long))
        for world in (2, 4) if long else (2,):
            yield row(f"stopped in each phase, {world} ranks", _each(straight, world, long))
        yield row("Ctrl-C twice, in each phase", _twice(straight, long))
        yield row("stopped through the launcher", _launched(straight, long))


def row(what: str, told: Iterable[Told]) -> Row:
    done = [*told]
    faults, seconds = [one.fault for one in done if one.fault], [one.seconds for one in done]
    figures = f"out in {statistics.median(seconds):.1f} s, at the most in {max(seconds):.1f} s"
    return Row("b", what, len(done), len(faults), faults[0] if faults else figures)


def _each(straight: Straight, world: int, long: bool) -> Iterator[Told]:
    """Every phase and signal, three times on one rank and once for each whom it is sent to on several; or a few of all
    that."""
    whom = ["group", "self"][: 1 + (world > 1)]
    every = product(POINTS, whom, STOPPING, range(3 if world == 1 else 1))
    # One more in every three: no signal meets a phase in the same repetition throughout.
    sent = ((phase, whose, number, (n + n // 3) % 3) for n, (phase, whose, number, _) in enumerate(every))
    if not long:
        phases = ON_TWO if world == 2 else [phase for phase in POINTS if phase not in LONG]
        sent = ((phase, whom[n % len(whom)], STOPPING[n % 3], n % 3) for n, phase in enumerate(phases, world))
    for number, (phase, whose, signum, turn) in enumerate(sent):
        at = world - 1 if whose == "self" and not POINTS[phase].main_only else 0
        strike = Strike(phase, POINTS[phase].calls[turn], signum, whose)
        yield stopped(straight, world, [strike], at, Path(f"each-{world}-{number}"))


def _twice(straight: Straight, long: bool) -> Iterator[Told]:
    """Where the first does not end it at once; then where a stop is at its own save."""
    phases = [phase for phase, point in POINTS.items() if point.words != UNSAVED]
    sent = product(phases, range(3), (1, 2)) if long else [("step: forward", 1, 1)]
    for number, (phase, turn, world) in enumerate(sent):
        strike = Strike(phase, POINTS[phase].calls[turn], signal.SIGINT, "group", times=2)
        yield stopped(straight, world, [strike], 0, Path(f"twice-{number}"))
    for world in (1, 2) if long else (1,):
        first, second = (Strike(phase, call, signal.SIGINT, "group") for phase, call in AT_ITS_SAVE)
        yield stopped(straight, world, [first, second], 0, Path(f"saving-{world}"))


def _launched(straight: Straight, long: bool) -> Iterator[Told]:
    phases = ["step: forward", "evaluation", "save", "start: weights drawn", "start: the others wait for this rank"]
    every = product(phases, STOPPING, ("launcher", "self"), (2, 4))
    for phase, number, whom, world in every if long else [("step: forward", signal.SIGUSR1, "launcher", 2)]:
        strike = Strike(phase, POINTS[phase].calls[1], number, whom)
        at = world - 1 if whom == "self" else 0
        yield stopped(straight, world, [strike], at, Path("launched"), launched=True)


if __name__ == "__main__":
    launched_rank()
