"""Ranks that cannot meet, by variables that a user or a launcher has set, and ranks that wait for the others."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from messages import lacking
from tiny_run import SwitchCLI

SECONDS = 5
TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
REJECTED = {
    "a world without a rank": ({"WORLD_SIZE": "2"}, "RANK not set"),
    "a rank without a world": ({"RANK": "0"}, "WORLD_SIZE not set"),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR not set"),
    "a rank outside the world": ({**TWO, "RANK": "5"}, "RANK 5 WORLD_SIZE 2"),
    "a rank that is text": ({**TWO, "RANK": "x"}, "RANK 'x'"),
    "a rank with a leading zero": ({**TWO, "RANK": "00"}, "RANK '00'"),
    "an empty world": ({**TWO, "WORLD_SIZE": "0"}, "RANK 0 WORLD_SIZE"),
    "a local rank that is text": ({**TWO, "LOCAL_RANK": ""}, "LOCAL_RANK ''"),
    "a machine without ranks": ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE 0 1"),
    "a port that is text": ({**TWO, "MASTER_PORT": "abc"}, "MASTER_PORT 'abc'"),
    "a port out of range": ({**TWO, "MASTER_PORT": "65536"}, "MASTER_PORT '65536'"),
    "a task of srun with a strange rank": (
        {"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1"},
        "RANK 'x'",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_cannot_work_is_rejected_at_once(case: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, words = REJECTED[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    done = switchcli("pretrain", "quickstart/switch")
    for name in os.environ.keys() - before.keys():  # the command sets them for a task of srun
        del os.environ[name]
    assert (done.code, done.out) == (2, ""), done.err
    assert not lacking(done.err, words)
    assert done.err.count("\n") == 1


# A launcher that starts one rank and is then killed.
LAUNCHER = """
import os, subprocess, sys, time
os.environ["SWITCHCLI_LAUNCHER"] = str(os.getpid())
rank = subprocess.Popen([sys.executable, "-m", "switchcli", *sys.argv[1:]])
print(rank.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def meeting(rank: str, port: str) -> dict[str, str]:
    """The environment of one of three ranks."""
    here = {"RANK": rank, "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, **here}


@pytest.mark.integration
@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=pytest.mark.nightly)])
def test_a_rank_says_that_it_waits_and_ends_when_it_is_asked(rank: str, recipe: str, port: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "switchcli", "pretrain", recipe, "train.device=cpu", "--out", tmp_path / "run"]
    with subprocess.Popen(command, env=meeting(rank, port), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            process.send_signal(signal.SIGUSR1)
            assert process.wait(6 * SECONDS) == 75
        finally:
            process.kill()
    assert said.startswith("warning: ")
    assert not lacking(said, f"rank {rank} 3 '127.0.0.1' port {port}")


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ranks go on without their launcher")
def test_a_rank_that_waits_for_others_ends_with_its_launcher(recipe: str, port: str, tmp_path: Path) -> None:
    arguments = ["pretrain", recipe, "train.device=cpu", "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *arguments],
        env=meeting("0", port),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as launcher:
        assert launcher.stdout is not None
        try:
            process = int(launcher.stdout.readline())
            deadline = time.monotonic() + 12 * SECONDS
            while not _listens(port):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            launcher.kill()
    try:
        deadline = time.monotonic() + 6 * SECONDS
        while Path(f"/proc/{process}").exists() and "Z" not in _state(process):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        if Path(f"/proc/{process}").exists():
            os.kill(process, signal.SIGKILL)


def _listens(port: str) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", int(port))) == 0


def _state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
