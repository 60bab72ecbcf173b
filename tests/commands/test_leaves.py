"""A package that only its command imports can be deleted with it: every other verb works on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_smoke import WORK
from tiny_run import lay_out, lay_out_tuning

ROOT = Path(__file__).resolve().parents[2]
LEAVES = ("plan", "sweep", "doctor", "report")


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_can_be_deleted_with_its_command(
    leaf: str, trained: Path, dense: Path, text: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    for folder in ("switchcli", "recipes"):
        shutil.copytree(ROOT / folder, copy / folder)
    shutil.rmtree(copy / "switchcli" / leaf)
    (copy / f"switchcli/commands/{leaf}.py").unlink()
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}

    here = tmp_path

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "switchcli", *words]
        return subprocess.run(
            command, cwd=here, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    shown = run("--help")
    assert shown.returncode == 0, shown.stderr
    assert leaf not in shown.stdout.split()
    for verb, (words, _) in WORK.items():
        if verb.split()[0] == leaf:
            assert run(leaf).returncode == 2, "no such command"
            continue
        here = tmp_path / verb.replace(" ", "-")
        here.mkdir()
        lay_out(here, text)
        lay_out_tuning(here)
        done = run(*verb.split(), *(word.format(trained=trained, dense=dense) for word in words))
        assert done.returncode == 0, f"{verb} without {leaf}: {done.stderr}"
