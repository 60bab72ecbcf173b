"""A run of minutes, which saves and evaluates all the time, takes no more memory, files or threads late than early."""

import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import RECIPE, write_text

SECONDS = 300
EVERY = ("checkpoint.save_every_steps=20", "eval.every_steps=20", "log.every_steps=2")


def taken(process: int) -> tuple[int, int, int]:
    """Return the kilobytes of its own, open files and threads of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]), len([*Path(f"/proc/{process}/fd").iterdir()]), int(status["Threads"])


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.timeout(2 * SECONDS)
def test_a_run_takes_no_more_late_than_early(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "switchcli", "pretrain", "tiny.yaml", *EVERY, "train.steps=1000000", "-q"]
    process = subprocess.Popen([*command, "--out", "run"], cwd=tmp_path)
    try:
        time.sleep(SECONDS / 4)  # caches fill
        samples = []
        for _ in range(90):
            time.sleep(SECONDS / 120)
            samples.append(taken(process.pid))
        early, late = samples[:30], samples[-30:]
        assert statistics.median(one[0] for one in late) < 1.02 * statistics.median(one[0] for one in early)
        # The fewest: files of a save close again. One more is the text of a second epoch.
        assert min(one[1] for one in late) <= min(one[1] for one in early) + 1
        assert min(one[2] for one in late) <= min(one[2] for one in early)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
