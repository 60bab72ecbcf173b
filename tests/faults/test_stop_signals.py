"""A signal in any phase of any verb that trains: the run saves or loses only the steps since its last save, and goes on
to the same bits."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple

import pytest
from drill import newest
from faults.conftest import Prepare
from faults.harness import Done, run

from switchcli.checkpoint import checkpoint
from switchcli.data.prepare import shards
from switchcli.data.text_batches import PreparedTextSource
from switchcli.distributed.context import DistributedContext
from switchcli.model.transformer import SwitchTransformer
from switchcli.runs.train import ending, training_task
from switchcli.runs.train.callbacks import ValidationCallback
from switchcli.system.signals import STOPPING
from switchcli.training.distillation import Teacher
from switchcli.training.optimizers import Optimizer

INTERRUPTED = 75
SAVED = r"\bsaved\b.*\bstep {newest}\b.*\bcommand\b"
NOTHING = r"\bSIG\w+\b.*\bnothing\b.*\bcommand\b"
"""What is said before the first step and after the last: there is nothing to save."""


class Phase(NamedTuple):
    """A place where signals come: before a call of a function of the package."""

    verb: str
    owner: Any
    name: str
    calls: tuple[int, ...]
    """Which calls, from 1: the first in integration tests, all in nightly ones."""
    said: str = SAVED


PHASES = {
    "ranks meet": Phase("pretrain", DistributedContext, "__init__", (1,), NOTHING),
    "text is prepared": Phase("pretrain", shards, "write_manifest", (1,), NOTHING),
    "weights are drawn": Phase("pretrain", training_task, "initial_weights", (1,), NOTHING),
    "a batch is made": Phase("pretrain", PreparedTextSource, "batch", (5, 3, 7)),
    "forward": Phase("pretrain", SwitchTransformer, "forward", (4, 1, 7)),
    "weights change": Phase("pretrain", Optimizer, "zero_grad", (3, 1, 4)),
    "save": Phase("pretrain", checkpoint, "encode_files", (1, 2)),
    "evaluation": Phase("pretrain", ValidationCallback, "__call__", (1, 2)),
    "teacher is asked": Phase("distill", Teacher, "predict", (5, 3, 7)),
    "answers to tasks": Phase("finetune", SwitchTransformer, "encode", (2, 5)),
    "samples at the end": Phase("pretrain", ending, "generate", (1,), NOTHING),
}


def before_call(owner: Any, name: str, call: int, act: Callable[[], object]) -> None:
    """Have `act` called before a call of a function, counted from 1."""
    calls, function = count(1), getattr(owner, name)

    def called(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            act()
        return function(*arguments, **named)

    setattr(owner, name, called)


def send(number: int, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


def assert_it_goes_on(prepare: Prepare, verb: str, done: Done, code: int, step: int | None = None) -> None:
    """Assert that a command ended so, with a checkpoint of that step, and that it then ends as if undisturbed."""
    assert "Traceback" not in done.said
    assert done.code == code, done.said
    assert step is None or newest(prepare(verb).folder / "tried/out") == step
    assert not prepare(verb).goes_on()


def stop(prepare: Prepare, phase: Phase, number: int, call: int) -> None:
    ready = prepare(phase.verb)
    with ready.tried():
        if phase.owner is shards:
            subprocess.run(["rm", "-r", "cache"], check=True)
        done = run(*ready.verb.words, within=lambda: before_call(phase.owner, phase.name, call, lambda: send(number)))
        said = phase.said.format(newest=newest(ready.folder / "tried/out"))
        assert re.search(said, done.said), done.said
        assert_it_goes_on(prepare, phase.verb, done, INTERRUPTED)


@pytest.mark.integration
@pytest.mark.parametrize(("phase", "number"), [(name, STOPPING[n % 6]) for n, name in enumerate(PHASES)])
def test_a_stop_in_any_phase_saves_and_the_run_ends_as_if_there_had_been_none(
    phase: str, number: signal.Signals, prepare: Prepare
) -> None:
    stop(prepare, PHASES[phase], number, PHASES[phase].calls[0])


@pytest.mark.nightly
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", STOPPING)
def test_a_stop_by_any_signal_in_any_phase_saves(phase: str, number: signal.Signals, prepare: Prepare) -> None:
    for call in PHASES[phase].calls:
        stop(prepare, PHASES[phase], number, call)


WITHOUT_EFFECT = ("SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH", "SIGPIPE", "SIGXFSZ")
SUSPENDING = ("SIGTSTP", "SIGTTIN", "SIGTTOU")
"""The run is suspended until SIGCONT. Every signal that is in none of these tuples and does not stop a run ends it."""
OTHERS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, *STOPPING})
FEW = (signal.SIGWINCH, signal.SIGPIPE, signal.SIGTSTP, signal.SIGQUIT, signal.SIGALRM)
"""The signals of the integration tests."""


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=pytest.mark.integration if number in FEW else pytest.mark.nightly, id=str(number))
        for number in OTHERS
    ],
)
def test_any_other_signal_does_nothing_suspends_the_run_or_ends_it_at_once(number: int, prepare: Prepare) -> None:
    name = signal.Signals(number).name if number in {*signal.Signals} else ""

    def strike() -> None:
        if name in SUSPENDING:
            subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -CONT {os.getpid()}"])
        send(number)

    def within() -> None:
        for one in (signal.SIGQUIT, signal.SIGALRM):  # which a shell's `&` and this process's time limit have changed
            signal.signal(one, signal.SIG_DFL)
        before_call(Optimizer, "zero_grad", 3, strike)

    ready = prepare("pretrain")
    goes_on = name in (*WITHOUT_EFFECT, *SUSPENDING)
    with ready.tried():
        done = run(*ready.verb.words, within=within)
        assert_it_goes_on(prepare, "pretrain", done, *((0, 4) if goes_on else (-number, 2)))


@pytest.mark.integration
def test_a_second_ctrl_c_leaves_at_once_without_saving(prepare: Prepare) -> None:
    ready = prepare("pretrain")
    with ready.tried():
        done = run(
            *ready.verb.words,
            within=lambda: before_call(SwitchTransformer, "forward", 4, lambda: send(signal.SIGINT, times=2)),
        )
        assert re.search(r"error: .*\bsaving\b.*\bcommand\b", done.said)
        assert_it_goes_on(prepare, "pretrain", done, 130, 0)


@pytest.mark.integration
def test_a_run_whose_terminal_is_closed_saves(prepare: Prepare) -> None:
    """SIGHUP comes, and nothing can be printed any more."""

    def take_terminal() -> None:
        outside, inside = pty.openpty()
        reader = os.fork()
        while reader == 0:  # the user's end of the terminal, until it is killed
            with suppress(OSError):
                os.read(outside, 4096)
        os.close(outside)
        os.setsid()
        terminal = os.open(os.ttyname(inside), os.O_RDWR)
        os.close(inside)
        for stream in range(3):
            os.dup2(terminal, stream)
        sys.stderr = sys.__stderr__
        before_call(Optimizer, "zero_grad", 3, lambda: hang_up(reader))

    def hang_up(reader: int) -> None:
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)

    ready = prepare("pretrain")
    with ready.tried():
        done = run(*ready.verb.words, within=take_terminal)
        assert_it_goes_on(prepare, "pretrain", done, INTERRUPTED, 3)
