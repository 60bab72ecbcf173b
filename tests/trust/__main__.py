"""`scripts/trust [PART ...]`: the long trials, as one table; the exit code is 1 where anything was lost."""

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

from table import Row

PARTS = {
    "a": "kills",
    "b": "stops",
    "c": "worlds",
    "d": "full_disks",
    "e": "damages",
    "f": "fuzz",
    "g": "nonfinite",
    "h": "rank_deaths",
    "i": "two_runs",
    "j": "attacks",
    "k": "experts",
    "l": "soak",
}
"""The file of each part, by its letter."""


def main() -> int:
    parser = argparse.ArgumentParser("scripts/trust", description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"of {', '.join(f'{letter} ({file})' for letter, file in PARTS.items())}, see CONTRIBUTING.md",
    )
    parser.add_argument("--short", action="store_true", help="as few trials as the tests make")
    asked = parser.parse_args()
    if unknown := sorted({*asked.parts} - {*PARTS}):
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    line("part", "what was done", "lost", "minutes", "")
    line(*["---"] * 5)
    with tempfile.TemporaryDirectory(prefix="trust-cache-") as cache:
        os.environ["SWITCHCLI_CACHE"] = cache  # not the user's
        lost = sum(trials(part, long=not asked.short) for part in asked.parts or PARTS)
    return int(lost > 0)


def trials(part: str, long: bool) -> int:
    """Make those of a part, and say how many lost something."""
    lost, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"trust-{part}-") as folder:
        for row in importlib.import_module(PARTS[part]).rows(Path(folder), long):
            show(row, (time.monotonic() - began) / 60)
            lost += row.lost
            began = time.monotonic()
    return lost


def show(row: Row, minutes: float) -> None:
    line(row.part, row.what, row.figure, f"{minutes:.1f}", row.said)


def line(*cells: str) -> None:
    """As Markdown has it, so that a table can be kept."""
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
