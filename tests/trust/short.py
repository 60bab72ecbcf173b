"""The short form of a part, as `scripts/trust PART --short` prints it."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDERS = [HERE, HERE.parent / "train", HERE.parent / "commands", HERE.parent, HERE.parent.parent]


def lost(part: str) -> tuple[dict[str, str], str]:
    """What was lost, by what was done; and the whole table."""
    paths = os.pathsep.join(map(str, FOLDERS))
    done = subprocess.run(
        [sys.executable, HERE, part, "--short"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    table = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()[2:]]
    found = {cells[2]: cells[3] for cells in table}
    assert done.returncode == any(not figure.startswith("0 of ") for figure in found.values()), done.stderr
    return found, done.stdout
