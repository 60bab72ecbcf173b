"""A rank that dies: the others end soon and say so, and under torchrun's restart the run goes on to the same result."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drill import kill_one, ranks_of

RANKS, STEPS = 4, 24
FIGURE = "held_out/neg_log_perplexity"
SECONDS = 30
"""The other ranks must have ended after this many seconds."""
KEYS = (f"train.steps={STEPS}", "train.batch_tokens=512", "checkpoint.save_every_steps=4", "parallel.expert=2", "-q")


@pytest.mark.integration
def test_the_others_do_not_wait_for_a_save_beside_them(recipe: str, tmp_path: Path) -> None:
    """tests/trust/rank_deaths.py has deaths without a save."""
    run = str(tmp_path / "run")
    keys = (*KEYS, "checkpoint.background=true", "--processes", str(RANKS))
    command = [sys.executable, "-m", "switchcli", "pretrain", recipe, *keys, "--out", run]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kill_one(run, process)
    before = time.monotonic()
    _, said = process.communicate(timeout=SECONDS)
    assert time.monotonic() - before < SECONDS
    assert process.returncode == 6
    assert re.search(r"^error: rank \d .*\b9\b.*\bSIGKILL\b.*\bafter step \d+\b.*\bsame command\b", said, re.M)
    assert said.count("error: ") == 1
    assert not ranks_of(run)


@pytest.mark.integration
def test_ranks_that_torchrun_starts_again_go_on_from_the_last_save(recipe: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    arguments = ["-m", "switchcli", "pretrain", recipe, *KEYS, "--json", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    straight = [*torchrun, *arguments, "straight"]
    subprocess.run(straight, check=True, capture_output=True, timeout=120)
    again = [*torchrun, "--max-restarts=1", *arguments, run]
    process = subprocess.Popen(again, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kill_one(run, process)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    result, whole = (json.loads(Path(one, "result.json").read_text()) for one in (run, "straight"))
    assert json.loads(out.splitlines()[-1])["step"] == result["step"] == STEPS
    # Not bit by bit: DistributedDataParallel lays its buckets out anew after its first step, and where a number lies
    # says in which order four ranks add it up. With two ranks there is one order.
    assert result[FIGURE] == pytest.approx(whole[FIGURE], abs=1e-5)


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ranks go on without their launcher")
def test_ranks_whose_launcher_was_killed_save_and_end(recipe: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    many = ("train.steps=100000", "checkpoint.save_every_steps=5")
    command = [sys.executable, "-m", "switchcli", "pretrain", recipe, *KEYS, *many, "--out", run, "--processes", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(Path(run).glob("checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + SECONDS
    while ranks_of(run):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ranks go on without their launcher")
@pytest.mark.parametrize("delay", [0.0, 1.5, 5.0])
def test_ranks_end_whose_launcher_is_killed_while_they_start(trained: Path, tmp_path: Path, delay: float) -> None:
    """Seconds from the first rank's start: it imports, or waits for the other rank."""
    out = str(tmp_path / "evaluated")
    launcher = subprocess.Popen(
        [sys.executable, "-m", "switchcli", "eval", str(trained), "--processes", "2", "--out", out],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (ranks := ranks_of(out)):
        assert launcher.poll() is None
        time.sleep(0.01)
    spinning = Path(f"/proc/{ranks[0]}/environ").read_bytes()
    time.sleep(delay)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + SECONDS
    try:
        while ranks_of(out) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not ranks_of(out)
    finally:
        for rank in ranks_of(out):
            os.kill(rank, signal.SIGKILL)
    assert b"GOMP_SPINCOUNT=2000" in spinning
