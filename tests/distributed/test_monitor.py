"""Watch: processes that a launcher would have started as ranks, which do nothing but look at one another."""

import json
import os
import re
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
from switchcli.distributed import monitor
monitor.STOPPED_LOOKS = 3
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
def give_up(number):
    print("lost:", looks.lost(), "asked:", number, flush=True)
    os._exit(6)
looks = monitor.Watch(give_up, lambda: os.path.exists(os.environ["SWITCHCLI_REPORTS"] + "/unheeded"))
with looks.looking():
    print("looks", flush=True)
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)  # for ever, whatever signal comes: as in a library that waits for another rank
"""

Start = Callable[..., "subprocess.Popen[str]"]


def place(rank: int, port: int = 1) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": f"{os.getpid()}{port}"}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A rank, looking."""
    started = []

    def one(rank: int, port: int = 1) -> "subprocess.Popen[str]":
        environment = {**os.environ, **place(rank, port), "SWITCHCLI_REPORTS": str(tmp_path)}
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


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_killed_and_one_of_another_run_is_not(start: Start, tmp_path: Path) -> None:
    other, stopped, _ = start(1, port=2), start(1), start(0)
    for process in (other, stopped):
        process.send_signal(signal.SIGSTOP)
    assert stopped.wait(SECONDS) == -signal.SIGKILL
    code, words, _ = json.loads((tmp_path / "1").read_text())
    assert code == 6
    assert re.search(r"\brank 1\b.*\bSIGSTOP\b", words)
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
    assert re.fullmatch(r"lost: .*\brank 1\b.*\bSIGKILL\b.* asked: 15\n", out)


@pytest.mark.slow
def test_a_rank_that_was_asked_to_end_waits_for_one_that_lives(start: Start) -> None:
    _, waits = start(1), start(0)
    waits.send_signal(signal.SIGTERM)
    time.sleep(5)
    assert waits.poll() is None


@pytest.mark.slow
def test_a_rank_that_is_to_end_at_once_waits_for_none(start: Start, tmp_path: Path) -> None:
    """As where it has no one to wait for yet, or has not met one that has ended."""
    (tmp_path / "unheeded").touch()
    waits = start(0)
    waits.send_signal(signal.SIGTERM)
    out, _ = waits.communicate(timeout=SECONDS)
    assert (waits.returncode, out) == (6, "lost:  asked: 15\n")


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["handled in time", "handled by the training loop"])
def test_a_rank_that_has_handled_the_signal_is_left_alone(start: Start, tmp_path: Path, before: bool) -> None:
    """Whether or not what came next would be to end at once."""
    unheeded = tmp_path / "unheeded"
    if before:
        unheeded.touch()
    waits = start(0)
    waits.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    unheeded.unlink() if before else unheeded.touch()
    time.sleep(5)
    assert waits.poll() is None


@pytest.mark.slow
def test_a_rank_that_ended_because_it_was_asked_is_not_lost(start: Start, tmp_path: Path) -> None:
    """Before it could handle the signal, too."""
    (tmp_path / "unheeded").touch()
    new = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, **place(1)})
    waits = start(0)
    new.send_signal(signal.SIGTERM)
    waits.send_signal(signal.SIGTERM)
    out, _ = waits.communicate(timeout=SECONDS)
    new.wait()
    assert (waits.returncode, out) == (6, "lost:  asked: 15\n")
