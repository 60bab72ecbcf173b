"""Tokens per second of greedy answers of several runs, in turns in one process. No answer ends early.

    python scripts/experiments/served.py TEXT RUN [RUN ...] > served.csv

TEXT is JSON Lines with a field `text`. An input is the first twelve words of one of 64 texts, and a gap. Seconds are
those of the processor, of one thread.
"""

import csv
import json
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import median

import torch

import switchcli
from switchcli.model import generation

ROUNDS, TEXTS, TOKENS = 7, 64, 32


def main() -> None:
    text, *runs = sys.argv[1:]
    torch.set_num_threads(1)
    generation.EOS = -1  # which no token is
    with Path(text).open(encoding="utf-8") as file:
        inputs = [
            " ".join(json.loads(line)["text"].split()[:12]) + " <extra_id_0>"
            for line in islice(filter(str.strip, file), TEXTS)
        ]
    models = {run: switchcli.load(run) for run in runs}
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    for _ in range(1 + ROUNDS):  # the first round warms up
        for run, model in models.items():
            begin = time.process_time()
            model.generate(inputs, max_tokens=TOKENS, batch_size=16)
            seconds[run].append(time.process_time() - begin)
    table = csv.writer(sys.stdout)
    table.writerow(["run", "parameters", "tokens_per_second", "least", "most", "over_first"])
    first = seconds[runs[0]][1:]
    for run, model in models.items():
        times = seconds[run][1:]
        speeds = [TEXTS * TOKENS / value for value in times]
        ratio = median(theirs / ours for ours, theirs in zip(times, first, strict=True))
        count = sum(parameter.numel() for parameter in model.model.parameters())
        figures = f"{median(speeds):.0f}", f"{min(speeds):.0f}", f"{max(speeds):.0f}", f"{ratio:.2f}"
        table.writerow([Path(run).name, count, *figures])


if __name__ == "__main__":
    main()
