"""Jobs in processes of their own, and what is printed of them: ratios within a round, tables in Markdown."""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from machine import Job, Result


def run(job: Job) -> Result:
    """The answer of `job`, from a process of its own."""
    print(" ".join(str(value) for value in job.values()), file=sys.stderr, flush=True)
    launcher = []
    if (ranks := job.get("ranks", 1)) > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, str(Path(__file__).parent), "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    found = [one / other for one, other in zip(ours, theirs, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> None:
    heads = list(heads)
    for row in chain((heads, ["---"] * len(heads)), rows):
        print("| " + " | ".join(row) + " |", flush=True)
    print()
