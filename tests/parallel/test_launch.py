"""launch: the exit code of the rank that failed, and what it said; a rank that was killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from switchcli.parallel.launch import is_rank

LAUNCH = """
import os, sys
from switchcli.parallel.launch import launch
os.chdir(sys.argv[1])  # `python -m switchcli` then finds what the test put there
sys.exit(launch(2, sys.argv[2:]))
"""
RANK = """
import os, signal, sys, time
rank, what = os.environ["RANK"], sys.argv[1]
print(f"rank {rank} of {os.environ['WORLD_SIZE']}", flush=True)
if what == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "fail" and rank == "1":
    print("the rule, the numbers, the way out", file=sys.stderr)
    sys.exit(4)
if what != "end":
    time.sleep(60)
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


@pytest.mark.parametrize("what", ["end", "fail", "kill"])
def test_the_exit_code_is_that_of_the_rank_that_failed_first(what: str, tmp_path: Path) -> None:
    done = launched(what, tmp_path)
    assert "rank 0 of 2" in done.stdout
    assert "rank 1 of 2" in done.stdout
    if what == "end":
        assert done.returncode == 0
    if what == "fail":
        assert done.returncode == 4
        assert "the rule, the numbers, the way out" in done.stderr
        assert "Traceback" not in done.stderr
    if what == "kill":
        assert "DistributedError: rank 1 was killed by signal 9; the others were ended" in done.stderr


def test_a_rank_knows_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not is_rank()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert is_rank()
