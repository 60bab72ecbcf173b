"""launch: the exit code of the rank that failed, and what it said; a rank that was killed."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from switchcli.distributed.launch import Exit, launch, saving_seconds, write_error_file
from switchcli.errors import DataError, LostRankError

LAUNCH = """
import os, signal, sys
from switchcli.distributed.launch import launch
os.chdir(sys.argv[1])  # `python -m switchcli` then finds what the test put there
signal.signal(signal.SIGTERM, lambda *_: sys.exit("heeded"))
ended = launch(2, sys.argv[2:])
print("told:", ended.error)
sys.exit(ended.exit_code)
"""
RANK = """
import glob, json, os, signal, sys, time
rank, what = os.environ["RANK"], sys.argv[1]
def report(code, words, where=""):
    told = {"message": words, "timestamp": time.time(), "exit_code": code, "where": where}
    open(os.environ["TORCHELASTIC_ERROR_FILE"], "w").write(json.dumps(told))
print(f"rank {rank} of {os.environ['WORLD_SIZE']}", flush=True)
if what == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if what in ("fail", "die", "hang") and rank == "1":
    if what == "hang":  # until the other has had time to ignore SIGTERM
        time.sleep(2)
    print("the rule, the numbers, the way out", file=sys.stderr)
    if what != "die":
        report(4, "the rule")
    sys.exit(4)
if what == "hang" or (what == "suspended" and rank == "1"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open("ready" + rank, "w").close()
if what in ("suspended", "late") and rank == "0":  # asked to stop, or told by a library that another rank is gone
    while what == "suspended" and not os.path.exists("ready1"):
        time.sleep(0.01)
    code = 75 if what == "late" else 6
    report(code, "saved", "after step 1")
    sys.exit(code)
if what in ("SIGTERM", "SIGINT", "SIGUSR1", "twice"):  # saves, which takes long for "twice"
    came = []
    def saving(number, frame):
        came.append(number)
        if what != "twice":
            report(75, f"saved at {signal.Signals(number).name}", "after step 1")
            os._exit(75)
        if rank == "0" and len(came) == 1:
            time.sleep(0.5)
            os.kill(os.getppid(), signal.SIGHUP)
            os.kill(os.getppid(), signal.SIGINT)
        if len(came) == 2:
            report(130, "at once")
            os._exit(130)
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(one, signal.SIG_IGN if what == "twice" and one == signal.SIGTERM else saving)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    open("ready" + rank, "w").close()
    while not os.path.exists("ready1"):
        time.sleep(0.01)
    if rank == "0":
        os.kill(os.getppid(), signal.SIGINT if what == "twice" else signal.Signals[what])
if what == "stuck":  # waits for another rank, and runs no handler
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    open("ready" + rank, "w").close()
    while not os.path.exists("ready1"):
        time.sleep(0.01)
    if rank == "0":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(1000)
if what == "fail":  # ended by the launcher, it says so, and is not the one to blame
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    report(75, "stopped", "after step 1")
if what == "asked" and rank == "0":  # sees that the other is gone
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open("ready0", "w").close()
    while not glob.glob(os.environ["TORCHELASTIC_ERROR_FILE"].replace("/0/error", "/1/error")):
        time.sleep(0.001)
    report(6, "cannot be reached", "after step 0")
    os._exit(6)
if what in ("asked", "asked alone") and rank == "1":
    while what == "asked" and not os.path.exists("ready0"):
        time.sleep(0.01)
    report(75, "stopped", "outside training")
    os._exit(75)
if what == "early":  # the main one dies of it, as nothing in it handles signals yet; the other does
    if rank == "1":
        def heed(number, frame):
            report(75, "stopped", "outside training")
            os._exit(75)
        signal.signal(signal.SIGTERM, heed)
        os.kill(os.getppid(), signal.SIGTERM)
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
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


@pytest.mark.integration
@pytest.mark.parametrize("what", ["fail", "die", "kill"])
def test_the_exit_code_is_that_of_the_rank_that_failed_first(what: str, tmp_path: Path) -> None:
    done = launched(what, tmp_path)
    assert "rank 1 of 2" in done.stdout
    if what in ("fail", "die"):
        assert "the rule, the numbers, the way out" in done.stderr
    if what == "fail":
        assert done.returncode == 4
        assert "told: the rule\n" in done.stdout
        assert "Traceback" not in done.stderr
    if what == "die":
        assert re.search(r"LostRankError: .*\brank 1\b.*\b4\b", done.stderr)
    if what == "kill":
        assert re.search(r"LostRankError: .*\brank 1\b.*\bSIGKILL\b", done.stderr)


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", ["SIGUSR1", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("SIGTERM", "SIGINT"))]
)
def test_a_signal_to_the_launcher_reaches_the_ranks_which_save(name: str, tmp_path: Path) -> None:
    done = launched(name, tmp_path)
    assert re.search(rf"Interrupted: saved at {name}$", done.stderr, re.M), done.stderr


@pytest.mark.integration
def test_a_second_ctrl_c_reaches_ranks_that_are_saving(tmp_path: Path) -> None:
    """It ends them at once, also after another signal. torchrun alone would wait for them, for minutes."""
    done = launched("twice", tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (130, "told: at once"), done.stderr


@pytest.mark.integration
@pytest.mark.timeout(100)
def test_a_second_ctrl_c_kills_ranks_that_cannot_end(tmp_path: Path) -> None:
    done = launched("stuck", tmp_path)
    assert done.returncode in (130, -2), done.stderr


@pytest.mark.integration
@pytest.mark.parametrize("what", ["asked", pytest.param("asked alone", marks=pytest.mark.nightly)])
def test_a_rank_that_was_asked_to_stop_speaks_for_all(what: str, tmp_path: Path) -> None:
    """Also for one that cannot reach it any more, and for one that torchrun ends before it handles signals."""
    done = launched(what, tmp_path)
    assert re.search(r"Interrupted: stopped$", done.stderr, re.M), done.stderr


@pytest.mark.nightly
def test_a_rank_that_hangs_when_another_fails_is_killed_and_not_blamed(tmp_path: Path) -> None:
    """torchrun gives it 30 s."""
    done = launched("hang", tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (4, "told: the rule"), done.stderr


@pytest.mark.integration
def test_a_rank_that_is_suspended_while_the_others_find_one_gone_is_the_one_that_is_named(tmp_path: Path) -> None:
    assert re.search(r"LostRankError: .*\brank 1\b.*\bSIGKILL\b.*\bhung\b", launched("suspended", tmp_path).stderr)


@pytest.mark.integration
def test_a_rank_that_is_ended_by_another_that_has_saved_is_not_lost(tmp_path: Path) -> None:
    """It gets torchrun's SIGTERM on its way out, when nothing in it handles signals any more."""
    assert re.search(r"Interrupted: saved$", launched("late", tmp_path).stderr, re.M)


@pytest.mark.nightly
def test_a_signal_that_ranks_cannot_heed_yet_is_the_launchers_own(tmp_path: Path) -> None:
    done = launched("early", tmp_path)
    assert (done.returncode, done.stderr) == (1, "heeded\n")


@pytest.mark.parametrize("has_option", [True, False])
def test_torchrun_gets_the_saving_time_only_where_it_takes_one(
    has_option: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.13's torchrun has `--shutdown-timeout`, that of torch 2.11 has not and waits 30 s."""
    old, new = argparse.ArgumentParser(), argparse.ArgumentParser()
    new.add_argument("--shutdown-timeout")
    given: list[list[str]] = []

    class Parser:
        def parse_args(self, options: list[str]) -> None:
            given.append(options)

        def format_help(self) -> str:
            return (new if has_option else old).format_help()

    monkeypatch.setattr("torch.distributed.run.get_args_parser", Parser)
    monkeypatch.setattr("torch.distributed.run.run", lambda _: None)
    monkeypatch.setattr("logging.disable", lambda _: None)
    assert launch(2, ["pretrain"]) == Exit(0, None)
    assert [option for option in given[0] if "shutdown" in option] == ["--shutdown-timeout=300"] * has_option
    assert saving_seconds() == (300 if has_option else 30)


def test_a_rank_of_torchrun_reports_why_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun reads `message` and `timestamp`."""
    file = tmp_path / "error.json"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.delenv("SWITCHCLI_LAUNCHER", raising=False)
    assert not write_error_file(DataError("why"), "why")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert not write_error_file(DataError("why"), "why")
    told = json.loads(file.read_text())
    assert (told["message"], told["exit_code"], told["where"]) == ("why", 3, "")
    assert abs(told["timestamp"] - time.time()) < 60
    monkeypatch.setenv("SWITCHCLI_LAUNCHER", "1")
    lost = LostRankError("rank 0 has ended")
    lost.add_note("after step 7")
    assert write_error_file(lost, "why")
    told = json.loads(file.read_text())
    assert (told["exit_code"], told["where"]) == (6, "after step 7")
    assert [*tmp_path.iterdir()] == [file]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))
    assert not write_error_file(lost, "why")
