"""How a command ends by a signal, wherever that comes in between."""

import os
import signal
import subprocess
import sys

import pytest

from switchcli.commands._exit import exit_rank, interruptible
from switchcli.errors import DataError, Interrupted, InterruptedByForce, SwitchError, training_location
from switchcli.system.signals import STOPPING

ON_ITS_WAY_OUT = """
import time
from switchcli.commands import _exit
from switchcli.errors import DataError
try:
    with _exit.interruptible():
        try:
            time.sleep(1.5)
            raise DataError("mine")
        finally:
            print("here", flush=True)
            until = time.monotonic() + 4
            while time.monotonic() < until:
                time.sleep(0.1)
            print("tidied", flush=True)
except DataError as error:
    _exit.exit_with_error(error)
"""
IN_A_LIBRARY = """
import ctypes
from switchcli.commands import _exit
from switchcli.system.signals import run_interruptibly
from switchcli.errors import Interrupted
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex)
try:
    with _exit.interruptible():
        print("here", flush=True)
        run_interruptibly(lambda: lock(mutex))  # for ever, whatever signal comes
except Interrupted as error:
    _exit.exit_with_error(error)
"""


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize(("saves_nothing", "kind"), [(False, Interrupted), (True, InterruptedByForce)])
def test_a_signal_ends_it(number: signal.Signals, saves_nothing: bool, kind: type[SwitchError]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(kind, match=number.name), interruptible(saves_nothing):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_what_a_clean_up_makes_of_it_is_the_signals_doing() -> None:
    """Between closing a file and noting that, a signal makes many a library close it twice."""

    def tidy() -> None:
        descriptor = os.open(os.devnull, os.O_RDONLY)
        try:
            os.close(descriptor)
            signal.raise_signal(signal.SIGTERM)
        finally:
            os.close(descriptor)

    with pytest.raises(Interrupted, match="SIGTERM"), interruptible():
        tidy()


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="mine"), interruptible():
        raise ValueError("mine")
    with pytest.raises(InterruptedByForce, match="without saving"), interruptible():
        raise KeyboardInterrupt


def test_a_rank_ends_at_once_with_the_exit_code_of_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    exit_rank(1)
    assert ended == [], "no launcher started this process"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for code in (0, 1, None):
        exit_rank(code)
    assert ended == [0, 1, 0]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("rank", "code", "then"), [(ON_ITS_WAY_OUT, DataError.exit_code, "tidied\n"), (IN_A_LIBRARY, 75, "")]
)
def test_a_rank_is_left_to_tidy_up_and_not_where_it_waits_for_others(rank: str, code: int, then: str) -> None:
    """However long the one takes."""
    here = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", rank], env={**os.environ, **here}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, then)


def test_a_signal_does_not_replace_the_error_that_a_command_ends_by() -> None:
    """A launcher ends the rank so, for the failure that the rank is about to tell."""

    def failing() -> None:
        try:
            raise DataError("mine")
        finally:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(DataError, match="mine"), interruptible():
        failing()


def test_where_it_was_is_found_though_a_chain_of_errors_comes_back_to_its_beginning() -> None:
    """A library raises an error of its own from ours, and ours is raised from that in turn."""
    first, second = Interrupted("stopped"), ValueError("its own")
    second.__cause__, first.__cause__ = first, second
    assert training_location(first) == "outside training"
    second.add_note("after step 3")
    assert training_location(first) == "after step 3"
