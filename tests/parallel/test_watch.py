"""Watch: processes that a launcher would have started as ranks, which do nothing but look at one another."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

SECONDS = 40
RANK = """
import ctypes, os, signal, sys
from switchcli.parallel import watch
watch.STOPPED_LOOKS = 3
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
def give_up(number):
    print("lost:", looks.lost(), "asked:", number, flush=True)
    os._exit(6)
looks = watch.Watch(give_up, lambda: "UNHEEDED" in os.environ)
with looks.looking():
    print("looks", flush=True)
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)  # for ever, whatever signal comes: as in a library that waits for another rank
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A rank, looking."""
    started = []

    def one(rank: int, port: int = 1, **more: str) -> "subprocess.Popen[str]":
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": f"{os.getpid()}{port}"}
        environment = {**os.environ, **place, **more, "SWITCHCLI_REPORTS": str(tmp_path)}
        process = subprocess.Popen([sys.executable, "-c", RANK], env=environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "looks\n"
        time.sleep(1.5)  # it has met the others by then
        return process

    yield one
    for process in started:
        process.kill()
        process.communicate()


def test_a_rank_that_is_stopped_is_killed_and_one_of_another_run_is_not(start: Start, tmp_path: Path) -> None:
    other, stopped, _ = start(1, port=2), start(1), start(0)
    for process in (other, stopped):
        process.send_signal(signal.SIGSTOP)
    assert stopped.wait(SECONDS) == -signal.SIGKILL
    code, words, _ = json.loads((tmp_path / "1").read_text())
    assert (code, words[:42]) == (6, "rank 1 was stopped by a signal (SIGSTOP, p")
    assert other.poll() is None


@pytest.mark.slow
def test_a_rank_that_goes_on_is_left_alone(start: Start, tmp_path: Path) -> None:
    stopped, _ = start(1), start(0)
    for _ in range(4):
        stopped.send_signal(signal.SIGSTOP)
        time.sleep(1.2)
        stopped.send_signal(signal.SIGCONT)
        time.sleep(1.2)
    assert stopped.poll() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("is_asked", [True, False])
def test_a_rank_that_was_asked_to_end_does_not_wait_for_a_dead_one(start: Start, is_asked: bool) -> None:
    """Asked alone, or beside a dead one alone, it waits on."""
    dead, waits = start(1), start(0)
    dead.kill()
    time.sleep(1.5)
    if not is_asked:
        time.sleep(5)
        assert waits.poll() is None
        return
    waits.send_signal(signal.SIGTERM)
    out, _ = waits.communicate(timeout=SECONDS)
    assert waits.returncode == 6
    assert out == "lost: rank 1 was killed by signal 9 (SIGKILL: for want of memory, perhaps) asked: 15\n"


@pytest.mark.slow
def test_a_rank_that_was_asked_to_end_waits_for_one_that_lives(start: Start) -> None:
    _, waits = start(1), start(0)
    waits.send_signal(signal.SIGTERM)
    time.sleep(5)
    assert waits.poll() is None


@pytest.mark.slow
def test_a_rank_that_is_to_end_at_once_waits_for_none(start: Start) -> None:
    """As where it has no one to wait for yet, or has not met one that has ended."""
    waits = start(0, UNHEEDED="1")
    waits.send_signal(signal.SIGTERM)
    out, _ = waits.communicate(timeout=SECONDS)
    assert (waits.returncode, out) == (6, "lost:  asked: 15\n")
