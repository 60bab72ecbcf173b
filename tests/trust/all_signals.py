"""Every signal that a process can catch, sent to a training run in the middle of a step.

A run saves and exits with 75, or goes on as if nothing had happened, or dies of the signal. In each case the same
command then ends as a run that nothing happened to, and nothing hangs. README.md says what each signal does.
"""

import os
import pty
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

from drill import ended, fingerprint, newest, ranks_of
from table import Row
from trial import PATIENCE, STEPS, Trial, clear, said, trials

from switchcli.cli import main
from switchcli.training import loop

SAVED = 75
STEP = 3
"""The step in which the signal comes: the run has saved at step 2."""
STOPPING = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU")
"""The run saves and exits with 75."""
WITHOUT_EFFECT = ("SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH", "SIGPIPE", "SIGXFSZ")
"""The run goes on."""
SUSPENDING = ("SIGTSTP", "SIGTTIN", "SIGTTOU")
"""The run is suspended until SIGCONT. Every other signal ends it at once; nothing is saved."""
STRUCK = "TRUST_SIGNAL"
"""The environment variable that says what happens in a rank of `--processes`."""
CPU_SECONDS = 3.5
"""What a run uses that has a soft limit of 1 s."""
SOON = 30.0
"""Seconds within which the ranks of a launcher that died are gone."""


SHORT = ("SIGWINCH", "SIGPIPE", "SIGTSTP", "SIGQUIT", "SIGALRM")
"""What the short form sends besides those that stop a run."""
TO_LAUNCHER = (*STOPPING, "SIGPIPE", "SIGTSTP", "SIGQUIT", "SIGALRM", "SIGPWR")


def numbers(long: bool) -> list[int]:
    """Return every signal that can be caught, or those of the short form."""
    every = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
    return [one for one in every if long or name(one) in STOPPING + SHORT]


def name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


class Expected(NamedTuple):
    """How a run ends that gets a signal."""

    code: int
    steps: tuple[int, ...]
    """The newest checkpoint then is of one of these."""


HUNG_UP = Expected(SAVED, (STEP - 1, STEP))
"""A terminal is closed as soon as the checkpoint of the step before can be seen."""


def expected(number: int) -> Expected:
    if name(number) in STOPPING:
        return Expected(SAVED, (STEP,))
    if name(number) in (*WITHOUT_EFFECT, *SUSPENDING):
        return Expected(0, (STEPS,))
    return Expected(-number, (STEP - 1,))


def before_update(step: int, act: Callable[[], object]) -> None:
    """Have the process of a run call `act` in this step, once its gradients are there."""
    calls, clip = count(1), loop._clip_gradients

    def clipped(*arguments: object) -> object:
        if next(calls) == step:
            act()
        return clip(*arguments)  # type: ignore[arg-type]

    loop._clip_gradients = clipped  # type: ignore[assignment]


def fault(trial: Trial, run: Path, code: int | None, wanted: Expected, then: Callable[[], int | None]) -> str:
    """Say what is wrong with a run that a signal came to, and with its end when the same command goes on."""
    saved = newest(run)
    found = ""
    if code != wanted.code:
        found = "hangs" if code is None else f"exit code {code}, not {wanted.code}: {said(run)}"
    elif saved not in wanted.steps:
        found = f"saved at step {saved}, not {wanted.steps}"
    elif again := then():
        found = f"then exit code {again}: {said(run)}"
    found = found or trial.differs(run)
    clear(run)
    return found


def sent(trial: Trial, number: int, run: Path) -> str:
    """Send a signal to a run on one rank."""
    child = trial.begin(run, lambda: before_update(STEP, lambda: os.kill(os.getpid(), number)))
    if name(number) in SUSPENDING:
        _wake(child)
    return fault(trial, run, _end(child), expected(number), lambda: trial.run(run))


def _wake(child: int) -> None:
    """Continue the process once it is suspended; one whose process group is orphaned is not suspended."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "T":
            os.kill(child, signal.SIGCONT)
        if state in "TZ":
            return
        time.sleep(0.005)


def _end(child: int) -> int | None:
    """Return the exit code; None for a hang, which is then killed."""
    code = ended(child, PATIENCE)
    if code is None:
        os.kill(child, signal.SIGKILL)
        ended(child, PATIENCE)
    return code


def limited(trial: Trial, run: Path) -> str:
    """Let the run reach a soft limit of CPU time: SIGXCPU comes once, and again for each second of CPU time."""

    def reach() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (1, 600))
        while time.process_time() < CPU_SECONDS:
            pass

    code = _end(trial.begin(run, lambda: before_update(STEP, reach)))
    return fault(trial, run, code, Expected(SAVED, (STEP,)), lambda: trial.run(run))


def ignoring(trial: Trial, run: Path) -> str:
    """Send SIGHUP to a run that nohup has started."""

    def within() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        before_update(STEP, lambda: os.kill(os.getpid(), signal.SIGHUP))

    code = _end(trial.begin(run, within))
    return fault(trial, run, code, Expected(0, (STEPS,)), lambda: trial.run(run))


def closed_terminal(trial: Trial, run: Path) -> str:
    """Close the terminal of a run: SIGHUP comes, and nothing can be printed any more."""
    terminal, inside = pty.openpty()

    def within() -> None:
        os.close(terminal)
        _take_terminal(inside)
        before_update(STEP, _await_hangup)

    child = trial.begin(run, within)
    os.close(inside)
    _read_until(terminal, lambda: newest(run) == STEP - 1 or Path(f"/proc/{child}/stat").read_text().find(") Z") > 0)
    os.close(terminal)
    return fault(trial, run, _end(child), HUNG_UP, lambda: trial.run(run))


def _take_terminal(inside: int) -> None:
    """Make it the controlling terminal of this process, and its three streams."""
    path = os.ttyname(inside)
    os.setsid()
    descriptor = os.open(path, os.O_RDWR)
    for stream in range(3):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    os.close(inside)


def _await_hangup() -> None:
    deadline = time.monotonic() + PATIENCE
    while os.isatty(2) and time.monotonic() < deadline:
        time.sleep(0.01)


def _read_until(terminal: int, is_done: Callable[[], bool]) -> None:
    """Read what is written to a terminal, as it would be full else."""
    os.set_blocking(terminal, False)
    deadline = time.monotonic() + PATIENCE
    while not is_done() and time.monotonic() < deadline:
        try:
            os.read(terminal, 4096)
        except OSError:  # nothing there, or nobody at the other end
            time.sleep(0.005)


def on_two_ranks(trial: Trial, number: int, whom: Sequence[int], run: Path) -> str:
    """Send a signal to some of two ranks, each in the same step."""

    def within() -> None:
        before_update(STEP, lambda: os.kill(os.getpid(), number))

    codes = trial.together(2, run, dict.fromkeys(whom, within))
    code = next((code for code in codes.values() if code != SAVED), SAVED)
    wanted = Expected(SAVED, (STEP,))
    return fault(trial, run, code, wanted, lambda: max(map(abs, (one or 0 for one in trial.together(2, run).values()))))


def by_launcher(trial: Trial, number: int, run: Path) -> str:
    """Send a signal to the launcher of two ranks; 0 closes its terminal instead."""
    python = run.with_suffix(".python").absolute()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n')
    python.chmod(0o755)
    terminal, inside = pty.openpty()

    def within() -> None:
        os.close(terminal)
        os.environ.update(PYTHON_EXEC=str(python), PYTHONPATH=os.pathsep.join(sys.path))
        os.environ[STRUCK] = str(number)
        if number == 0:
            _take_terminal(inside)

    child = trial.begin(run, within, "--processes", "2")
    os.close(inside)
    if number == 0:
        _read_until(terminal, lambda: newest(run) == STEP - 1 or not Path(f"/proc/{child}/fd/2").exists())
    if number and name(number) in SUSPENDING:
        _wake(child)
    os.close(terminal)
    code = _end(child)
    deadline = time.monotonic() + SOON
    while (left := ranks_of(str(run))) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    wanted = expected(number) if number else HUNG_UP
    if wanted.code < 0:  # the ranks of a launcher that dies save, on Linux
        wanted = wanted._replace(steps=(STEP - 1, STEP))
    found = fault(trial, run, code, wanted, lambda: trial.run(run, lambda: None, "--processes", "2"))
    return f"leaves {len(left)} ranks" if left else found


def launched_rank() -> None:
    """Run in the Python of a rank, as `all_signals.py -u -m switchcli ARGUMENTS`."""
    number = int(os.environ[STRUCK])

    def act() -> None:
        if number:
            os.kill(os.getppid(), number)
            time.sleep(1)  # it comes in this step
        else:
            _await_hangup()
            time.sleep(1)

    if os.environ["RANK"] == "1":
        before_update(STEP, act)
    sys.argv = ["switchcli", *sys.argv[4:]]
    main()


def rows(folder: Path, long: bool) -> Iterator[Row]:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGHUP, signal.SIGQUIT):  # nohup, and a shell's `&`, have them ignored
        signal.signal(number, signal.SIG_DFL)
    with trials(folder, "pretrain background finetune distill" if long else "pretrain") as found:
        for what, group in _classes(long).items():
            yield row(what, {name(one): sent(found["pretrain"], one, Path(f"one-{one}")) for one in group})
        stopping = [getattr(signal, one) for one in STOPPING]
        for verb in ("background", "finetune", "distill") if long else ():
            yield row(f"{verb}: saves", {name(one): sent(found[verb], one, Path(f"{verb}-{one}")) for one in stopping})
        pretrain = found["pretrain"]
        yield row("a soft limit of CPU time", {"ulimit -St": limited(pretrain, Path("limited"))})
        yield row("SIGHUP under nohup: goes on", {"nohup": ignoring(pretrain, Path("nohup"))})
        yield row("the terminal is closed: saves", {"terminal": closed_terminal(pretrain, Path("terminal"))})
        two = pretrain._replace(command=(*pretrain.command, "train.batch_tokens=512", "eval.sequences=16"))
        straight = Path("straight-two")
        assert [*two.together(2, straight).values()] == [0, 0], said(straight)
        two = two._replace(wanted=fingerprint(straight))
        some = stopping if long else [signal.SIGXCPU]
        cases = [(one, whom) for one in some for whom in ((0, 1), (1,))]
        yield row(
            "2 ranks, sent to all or one: saves",
            {f"{name(one)} {whom}": on_two_ranks(two, one, whom, Path(f"two-{one}-{whom[0]}")) for one, whom in cases},
        )
        launched = [getattr(signal, one) for one in (TO_LAUNCHER if long else ("SIGHUP", "SIGALRM"))]
        yield row(
            "to the launcher of 2 ranks", {name(one): by_launcher(two, one, Path(f"by-{one}")) for one in launched}
        )
        yield row("the launcher's terminal is closed: saves", {"terminal": by_launcher(two, 0, Path("by-terminal"))})


def _classes(long: bool) -> dict[str, list[int]]:
    every = numbers(long)
    return {
        "saves": [one for one in every if name(one) in STOPPING],
        "goes on": [one for one in every if name(one) in WITHOUT_EFFECT],
        "is suspended": [one for one in every if name(one) in SUSPENDING],
        "ends at once": [one for one in every if expected(one).code < 0],
    }


def row(what: str, faults: dict[str, str]) -> Row:
    bad = [f"{who}: {fault}" for who, fault in faults.items() if fault]
    return Row("signals", what, len(faults), len(bad), "; ".join(bad))


if __name__ == "__main__":
    launched_rank()
