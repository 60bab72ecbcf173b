"""launch: the exit code of the rank that failed, signals that reach all ranks, and ranks that cannot end."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from switchcli.distributed.launch import exit_code
from switchcli.errors import Interrupted

LAUNCH = """
import os, sys
from switchcli.distributed.launch import launch
from switchcli.errors import Interrupted
os.chdir(sys.argv[1])  # `python -m switchcli` then finds what the test put there
try:
    sys.exit(launch(2, sys.argv[2:]))
except Interrupted:
    sys.exit("raised")
"""
RANK = """
import os, signal, sys, time
rank, what = os.environ["RANK"], sys.argv[1]

def wait_for(*names):
    while not all(map(os.path.exists, names)):
        time.sleep(0.01)

def heed(number, frame):
    came.append(number)
    if what == "twice" and len(came) < 2:  # saves for long
        return
    if rank == "1":
        time.sleep(1)  # saves after the other rank has ended
    print(f"rank {rank} got {[signal.Signals(one).name for one in came]}", flush=True)
    os._exit(130 if what == "twice" else 75)

came = []
if what == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if what in ("fail", "hang") and rank == "1":
    if what == "hang":
        wait_for("ready0")
    print("the rule, the numbers, the way out", file=sys.stderr)
    sys.exit(4)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    if what != "early" or rank == "1":
        is_deaf = what in ("stuck", "hang") or (what == "deaf" and rank == "1")
        signal.signal(number, signal.SIG_IGN if is_deaf else heed)
open("ready" + rank, "w").close()
if rank == "0" and what not in ("fail", "kill", "hang"):
    wait_for("ready1")
    first = {"twice": "SIGHUP", "stuck": "SIGINT", "early": "SIGTERM", "deaf": "SIGINT"}.get(what, what)
    os.kill(os.getppid(), signal.Signals[first])
    if what in ("twice", "stuck"):
        time.sleep(1)
        os.kill(os.getppid(), signal.SIGINT)
for _ in range(600):  # a signal just before a long sleep would be handled after it
    time.sleep(0.1)
"""


def launched(what: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Two ranks of a package called switchcli, in `folder`, that only does what it is told."""
    ranks = folder / "switchcli"
    ranks.mkdir()
    (ranks / "__init__.py").touch()
    (ranks / "__main__.py").write_text(RANK)
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, str(folder), what],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


@pytest.mark.integration
def test_the_exit_code_is_that_of_the_rank_that_failed_which_says_why(tmp_path: Path) -> None:
    done = launched("fail", tmp_path)
    assert (done.returncode, done.stderr) == (4, "the rule, the numbers, the way out\n")


@pytest.mark.integration
def test_a_rank_that_was_killed_is_named_by_torchrun(tmp_path: Path) -> None:
    done = launched("kill", tmp_path)
    assert done.returncode == 6
    assert re.search(r"rank +: 1 .*\n.*-9 .*SIGKILL", done.stderr), done.stderr


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", ["SIGUSR1", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("SIGTERM", "SIGINT"))]
)
def test_a_signal_reaches_all_ranks_once_and_each_may_save(name: str, tmp_path: Path) -> None:
    done = launched(name, tmp_path)
    assert (done.returncode, done.stderr) == (75, "")
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} got ['{name}']" for rank in range(2)]


@pytest.mark.integration
def test_a_ctrl_c_after_another_signal_ends_ranks_that_are_saving(tmp_path: Path) -> None:
    done = launched("twice", tmp_path)
    assert done.returncode == 130
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} got ['SIGHUP', 'SIGINT']" for rank in range(2)]


@pytest.mark.integration
def test_a_second_ctrl_c_kills_ranks_that_cannot_end(tmp_path: Path) -> None:
    assert launched("stuck", tmp_path).returncode == 130


@pytest.mark.nightly
def test_a_rank_that_hangs_when_another_fails_is_killed(tmp_path: Path) -> None:
    """torchrun gives it 30 s."""
    assert launched("hang", tmp_path).returncode == 4


@pytest.mark.nightly
def test_a_rank_that_drops_the_signal_is_killed_after_the_others_have_saved(tmp_path: Path) -> None:
    """It has 30 s."""
    assert launched("deaf", tmp_path).returncode == 75


@pytest.mark.integration
def test_a_signal_before_a_rank_handles_it_stops_all(tmp_path: Path) -> None:
    done = launched("early", tmp_path)
    assert done.returncode == 75
    assert done.stdout == "rank 1 got ['SIGTERM']\n"


@pytest.mark.parametrize(
    ("codes", "signals", "code"),
    [
        ([3, -15], [], 3),
        ([6, 5], [], 5),
        ([6, 75], [], 6),
        ([75, 6], [], 75),
        ([6, -9], [], 6),
        ([-11, 1], [], 1),
        ([-9, 6], [], 6),
        ([75, 75], [15], 75),
        ([-15, 75], [15], 75),
        ([4, 75], [15], 4),
        ([-9, -9], [15], 6),  # not saved in time
        ([130, 130], [15, 2], 130),
        ([-9, -9], [2, 2], 130),
        ([75, 75], [2, 2], 75),
    ],
)
def test_the_rank_that_failed_by_itself_counts_before_those_that_followed(
    codes: list[int], signals: list[int], code: int
) -> None:
    assert exit_code(codes, signals) == code


@pytest.mark.parametrize("codes", [[-signal.SIGTERM, -signal.SIGTERM], [130, 130]])
def test_ranks_that_a_signal_ends_before_they_handle_it_are_stopped(codes: list[int]) -> None:
    with pytest.raises(Interrupted):
        exit_code(codes, [signal.SIGTERM])
