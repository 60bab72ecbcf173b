"""`scripts/trust [PART ...]`: the long trials, as one table; the exit code is 1 where anything was lost."""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from table import Row

PARTS = {
    "b": "stops",
    "c": "worlds",
    "g": "nonfinite",
    "h": "rank_deaths",
    "k": "experts",
    "l": "soak",
    "signals": "all_signals",
    "environments": "environments",
}
"""The file of each part, by its name."""


def main() -> int:
    parser = argparse.ArgumentParser("scripts/trust", description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"of {', '.join(f'{letter} ({file})' for letter, file in PARTS.items())}, see README.md beside it",
    )
    parser.add_argument("--short", action="store_true", help="as few trials as the tests make")
    parser.add_argument("--json", action="store_true", help="one JSON object: tried and failed, by part and by class")
    asked = parser.parse_args()
    if unknown := sorted({*asked.parts} - {*PARTS}):
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    report = Report(as_json=asked.json)
    with tempfile.TemporaryDirectory(prefix="trust-cache-") as cache:
        os.environ["SWITCHCLI_CACHE"] = cache  # not the user's
        for part in asked.parts or PARTS:
            trials(part, long=not asked.short, report=report)
    report.finish()
    return int(report.failed > 0)


class Report:
    """The rows of all parts: a Markdown table, a line as soon as a row is known, or one JSON object at the end."""

    def __init__(self, as_json: bool) -> None:
        self.failed = 0
        self._as_json = as_json
        self._rows: list[dict[str, object]] = []
        if not as_json:
            write_line("part", "what was done", "lost", "minutes", "")
            write_line(*["---"] * 5)

    def add(self, row: Row, minutes: float) -> None:
        self.failed += row.lost
        self._rows.append(
            {
                "part": row.part,
                "class": row.what,
                "tried": row.trials,
                "failed": row.lost,
                "minutes": round(minutes, 2),
                "note": row.said,
            }
        )
        if not self._as_json:
            write_line(row.part, row.what, row.figure, f"{minutes:.1f}", row.said)

    def finish(self) -> None:
        if self._as_json:
            total = {key: sum(int(row[key]) for row in self._rows) for key in ("tried", "failed")}
            sys.stdout.write(f"{json.dumps({'rows': self._rows, **total}, indent=2)}\n")


def trials(part: str, long: bool, report: Report) -> None:
    """Run the trials of one part and report each row as soon as it is known.

    The part has a process of its own, so that nothing that it imports or sets up is there for the next one. One that
    ends with an error is a failed row, and the other parts are still run.
    """
    began = time.monotonic()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=make_trials, args=(part, long, sender))
    process.start()
    while process.is_alive() or receiver.poll():
        if receiver.poll(0.1):
            report.add(receiver.recv(), (time.monotonic() - began) / 60)
            began = time.monotonic()
    if process.exitcode:
        report.add(Row(part, "the part itself", 1, 1, "ended with an error, which is on stderr"), 0.0)


def make_trials(part: str, long: bool, sender: Connection) -> None:
    """Send the rows of a part."""
    with tempfile.TemporaryDirectory(prefix=f"trust-{part}-") as folder:
        for row in importlib.import_module(PARTS[part]).rows(Path(folder), long):
            sender.send(row)


def write_line(*cells: str) -> None:
    """Write one row of a Markdown table, so that a table can be kept."""
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
