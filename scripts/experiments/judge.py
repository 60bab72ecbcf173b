"""Compare the arms of a sweep with its first one: losses paired by seed, with Holm's correction over the arms.

    python scripts/experiments/judge.py [--score] FOLDER ARM [ARM ...] > arms.csv

FOLDER holds runs ARM-SEED. The first arm is the baseline. With --score the mean scores of tasks are compared. The
routing is that of the last record: the highest load over the mean in the worst layer, and the entropy of loads and of
probabilities over log E, as means over seeds; a dense model has none.
"""

import csv
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from switchcli.metric_names import HELD_OUT_LOSS, LOAD_ENTROPY, MAX_LOAD


def t_tail(t: float, degrees: int) -> float:
    """Return the two-sided p of Student's t, by Simpson's rule on the density after x = sqrt(degrees) tan(angle)."""

    def density(angle: float) -> float:
        return math.cos(angle) ** (degrees - 1)

    def integral(first: float, last: float, parts: int = 2000) -> float:
        width = (last - first) / parts
        inner = sum((4 if part % 2 else 2) * density(first + part * width) for part in range(1, parts))
        return width / 3 * (density(first) + inner + density(last))

    angle = math.atan(abs(t) / math.sqrt(degrees))
    return integral(angle, math.pi / 2) / integral(0.0, math.pi / 2)


def holm(p: dict[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p of each hypothesis."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        highest = adjusted[name] = max(highest, min(1.0, (len(p) - rank) * p[name]))
    return adjusted


def runs_of(folder: Path, arm: str) -> dict[int, dict[str, Any]]:
    """Return the results of an arm's runs by seed, with their last records as `record`."""
    found = {}
    for result in folder.glob(f"{arm}-*/result.json"):
        seed = result.parent.name.removeprefix(f"{arm}-")
        if seed.isdigit():
            records = [json.loads(line) for line in (result.parent / "metrics.jsonl").read_text().splitlines()]
            found[int(seed)] = json.loads(result.read_text()) | {
                "record": {key: value for record in records for key, value in record.items()}
            }
    return found


def routing(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the figures of the routing, as means over runs."""
    if any("layers" not in run["record"] for run in runs):
        yield from [""] * 3
        return
    layers = [[*run["record"]["layers"].values()] for run in runs]
    log_experts = math.log(len(layers[0][0]["load"]))
    yield f"{fmean(max(layer[MAX_LOAD] for layer in run) for run in layers):.2f}"
    for key in (LOAD_ENTROPY, "entropy"):
        yield f"{fmean(fmean(layer[key] for layer in run) for run in layers) / log_experts:.3f}"


def held_out_loss(run: dict[str, Any]) -> float:
    return float(run[HELD_OUT_LOSS])


def score(run: dict[str, Any]) -> float:
    return float(run["average"]["score"])


def main() -> None:
    arguments = sys.argv[1:]
    measured = score if arguments[0] == "--score" else held_out_loss
    folder, *arms = [argument for argument in arguments if argument != "--score"]
    by_arm = {arm: runs_of(Path(folder), arm) for arm in arms}
    base = by_arm[arms[0]]
    differences = {
        arm: [measured(run) - measured(base[seed]) for seed, run in sorted(runs.items()) if seed in base]
        for arm, runs in by_arm.items()
        if arm != arms[0]
    }
    errors = {arm: stdev(values) / math.sqrt(len(values)) for arm, values in differences.items()}
    p = {arm: t_tail(fmean(values) / errors[arm], len(values) - 1) for arm, values in differences.items()}
    adjusted = holm(p)
    table = csv.writer(sys.stdout)
    columns = (measured.__name__, "difference", "deviation", "p", "holm", "flops", "active", "parameters")
    table.writerow(["arm", "seeds", *columns, "max_load", "load_entropy", "entropy"])
    for arm, runs in by_arm.items():
        compared = [""] * 4
        if values := differences.get(arm):
            compared = [f"{fmean(values):+.4f}", f"{stdev(values):.4f}", f"{p[arm]:.4f}", f"{adjusted[arm]:.4f}"]
        one = next(iter(runs.values()))
        sizes = [one[key] for key in ("flops_per_sequence", "active_parameters", "parameters")]
        mean = f"{fmean(map(measured, runs.values())):.4f}"
        table.writerow([arm, len(runs), mean, *compared, *sizes, *routing([*runs.values()])])


if __name__ == "__main__":
    main()
