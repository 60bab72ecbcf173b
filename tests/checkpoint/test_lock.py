"""One run folder, one run: who wins, what the loser is told, and that the dead hold nothing."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from messages import naming

from switchcli.errors import CheckpointError
from switchcli.system.lock import lock

HOLD = """
import sys, time
from pathlib import Path
from switchcli.system.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holding(run: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


@pytest.mark.integration
def test_a_second_run_is_refused_by_name_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    process = holding(tmp_path)
    try:
        with (
            pytest.raises(CheckpointError, match=naming(platform.node(), f"process {process.pid}", "--out")) as caught,
            lock(tmp_path),
        ):
            pass
        assert caught.value.exit_code == 4
        assert json.loads((tmp_path / "run.lock").read_text())["started"] in str(caught.value)
    finally:
        process.kill()
        process.wait()
    assert str(process.pid) in (tmp_path / "run.lock").read_text()  # stale words, no lock
    with lock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    with lock(tmp_path):
        pass


@pytest.mark.integration
def test_a_program_that_the_run_started_does_not_keep_the_lock(tmp_path: Path) -> None:
    with lock(tmp_path):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with lock(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_holder_that_has_not_written_its_name_is_refused_all_the_same(tmp_path: Path) -> None:
    with lock(tmp_path):
        (tmp_path / "run.lock").write_text("{}\n")
        with pytest.raises(CheckpointError, match=naming("run.lock", "wait", "--out")), lock(tmp_path):
            pass


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_lock_is_not_taken_through_a_link(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    link(elsewhere, tmp_path / "run.lock")
    with pytest.raises(CheckpointError), lock(tmp_path):
        pass
    assert elsewhere.read_text() == "mine"


@pytest.mark.integration
def test_of_many_that_start_together_one_wins(tmp_path: Path) -> None:
    for attempt in range(2):
        command = [sys.executable, "-c", HOLD, str(tmp_path / str(attempt))]
        racers = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(4)
        ]
        deadline = time.monotonic() + 30
        while sum(racer.poll() is None for racer in racers) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        winners = [racer for racer in racers if racer.poll() is None]
        for racer in racers:
            racer.kill()
        losers = [racer.communicate()[1] for racer in racers if racer not in winners]
        for racer in winners:
            racer.communicate()
        assert len(winners) == 1
        assert all("in use by another run" in text for text in losers)
